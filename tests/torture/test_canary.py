"""The key, looked for in everything that a run leaves behind, while the server repeats it wherever it can."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import anyio
import pytest

import pipeline
from pipeline import Config, PipelineError, Result
from tests.torture import chaos, trial
from tests.torture.chaos import Plan
from tests.torture.faults import PROTOCOLS, End, Fault
from tests.torture.trial import MAX_ATTEMPTS, Record

SLICE = 12
KEYS = {"of a provider": trial.KEY, "without a mark": "9f3c7A1e5b8D2c6f4a0E7d1B3c5f8a2e"}
# Refusals and what needs a deadline take time and say nothing that others do not.
PASSABLE = [
    fault
    for fault, protocol in trial.matrix(End.ANSWERED, End.RETRIED, End.EITHER, End.LINE_ERROR)
    if protocol == "openai" and not fault.outlasts and fault.group not in ("C7", "C11")
]
STOPPING = [
    fault
    for fault, protocol in trial.matrix(End.RUN_STOPS)
    if protocol == "openai" and fault.name in ("wrong_key_401", "html_401", "no_credit", "redirect_307")
]
pytestmark = pytest.mark.timeout(trial.HANG_SECONDS + 20)


def needles(key: str) -> list[bytes]:
    """Return what must not be found, in lower case: every slice of the key and of its usual spellings."""
    escaped = "".join(f"\\u{ord(character):04x}" for character in key)
    shifted = [base64.b64encode(b"\0" * shift + key.encode()).decode()[4:-4] for shift in range(3)]
    spellings = [(key, SLICE), (quote(key, safe=""), SLICE), (key.encode().hex(), 2 * SLICE), (escaped, 6 * SLICE)]
    spellings += [(text, SLICE + 4) for text in shifted]
    found = {text[start : start + size] for text, size in spellings for start in range(len(text) - size + 1)}
    return sorted(needle.lower().encode() for needle in found)


def records(faults: Sequence[Fault]) -> list[Record]:
    """Return for each fault and protocol a record that meets it once and one that meets nothing else."""
    return [
        Record(id=f"{fault.name}.{protocol}.{times}", lane=fault.name + protocol, protocol=protocol, faults=met)
        for fault in faults
        for protocol in PROTOCOLS
        for times, met in (("once", [fault.name]), ("always", [fault.name] * (MAX_ATTEMPTS + 1)))
        if times == "once" or not fault.is_capacity
    ]


def leaks(artefacts: dict[str, bytes], key: str) -> dict[str, list[str]]:
    """Return which artefacts hold anything of the key."""
    sought = needles(key)
    found = {name: [n.decode() for n in sought if n in data.lower()] for name, data in artefacts.items()}
    return {name: hits for name, hits in found.items() if hits}


def process_artefacts(folder: Path, faults: Sequence[Fault], key: str) -> Iterator[tuple[str, bytes]]:
    """Run the command and yield what it printed and every file that it wrote."""
    cases = records(faults)
    work = folder / "work"
    work.mkdir()
    with chaos.serving(folder / "journal.jsonl", Plan(script=trial.script(cases), echo=True)) as server:
        done = trial.process(work, cases, trial.settings(server, cases), key=key)
    assert done.returncode in (1, 3)
    yield "stdout", done.stdout
    yield "stderr", done.stderr
    for path in work.rglob("*"):
        if path.name not in ("in.jsonl", "config.yaml"):
            yield path.name, path.read_bytes()
    assert (work / "out.jsonl").stat().st_size > 0 or done.returncode == 3


def object_artefacts(folder: Path, faults: Sequence[Fault], key: str) -> Iterator[tuple[str, bytes]]:
    """Stream in this process and yield the repr of every result, of the settings and of what was raised."""
    cases = records(faults)
    results: list[Result] = []
    errors: list[BaseException] = []

    async def work(config: Config) -> None:
        try:
            async for result in pipeline.stream([case.line() for case in cases], config=config):
                results.append(result)
        except PipelineError as exc:
            errors.append(exc)

    with (
        chaos.serving(folder / "journal.jsonl", Plan(script=trial.script(cases), echo=True)) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv(trial.KEY_VARIABLE, key)
        config = Config.model_validate(trial.settings(server, cases))
        anyio.run(work, config)
    yield "config", repr(config).encode()
    for index, result in enumerate(results):
        yield f"result {index}", repr(result).encode()
    while errors:
        error = errors.pop()
        yield f"{type(error).__name__}", repr((error, error.args, vars(error))).encode()
        errors += [cause for cause in (error.__cause__, error.__context__) if cause]


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(KEYS["of a provider"], id="of a provider"),
        pytest.param(KEYS["without a mark"], id="without a mark", marks=pytest.mark.slow),
    ],
)
def test_the_key_is_nowhere(tmp_path: Path, key: str) -> None:
    """No file, no output, no error and no repr holds twelve characters of the key, whatever a server echoes."""
    artefacts: dict[str, bytes] = {}
    for number, faults in enumerate([PASSABLE, *([fault] for fault in STOPPING)]):
        for kind in (process_artefacts, object_artefacts):
            folder = tmp_path / f"{kind.__name__}.{number}"
            folder.mkdir()
            artefacts |= {f"{folder.name}/{name}": data for name, data in kind(folder, faults, key)}

    assert len(PASSABLE) + len(STOPPING) >= 40
    assert len(artefacts) >= 400
    assert leaks(artefacts, key) == {}


def test_the_search_finds() -> None:
    """The key, twelve characters of it, or its base64 in any place would be found."""
    key = trial.KEY
    hidden = {
        "whole": f"x{key}y".encode(),
        "slice": key[5 : 5 + SLICE].encode(),
        "lower": key.lower().encode(),
        "base64": base64.b64encode(b"user:" + key.encode()),
        "hex": key.encode().hex().encode(),
        "nothing": b"sk-\xe2\x80\xa6",
    }

    assert leaks(hidden, key).keys() == hidden.keys() - {"nothing"}
