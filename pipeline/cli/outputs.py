"""Which results file belongs to which inputs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.core import object_store
from pipeline.core.errors import UsageError
from pipeline.inputs import reader
from pipeline.inputs.sources import STDIN
from pipeline.results import object_store_writer


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputTarget:
    """One results file and its inputs."""

    inputs: Sequence[str]
    output: str


def output_targets(inputs: Sequence[str], output: str | None, directory: str | None) -> list[OutputTarget]:
    """Return the results files to write: `output`, one for each input in `directory`, or one beside a single input.

    Creates the directory. Raises `UsageError` if the options do not say where results go, or two inputs share a file.
    """
    if output and directory:
        raise UsageError("give -o (one results file) or -d (one results file per input), not both")
    sources = reader.sources(inputs, may_be_empty=directory is not None, but=results_path(output))
    if output:
        return [OutputTarget(inputs=sources, output=output)]
    if directory:
        targets = _targets_in(directory, sources)
        if not object_store.is_url(directory):
            _make_directory(directory)
        return targets
    # stdin has no name from which the name of the results could come.
    if len(sources) > 1 or sources == [STDIN]:
        raise UsageError("say where results go: -o FILE for one file, or -d DIR for one file per input")
    return _targets_in(_directory_of(sources[0]), sources)


def _targets_in(directory: str, sources: Sequence[str]) -> list[OutputTarget]:
    """Return one results file in this directory for each input."""
    targets: list[OutputTarget] = []
    taken: set[str] = set()
    for source in sources:
        output = _output_in(directory, reader.stem(source))
        # For example `a.jsonl` and `a.jsonl.gz`, or the same name in two directories.
        if output in taken:
            raise UsageError(
                f"two inputs would write {output!r}: their names differ only in directory or suffix",
                hint="rename one of them, or send each with its own -o FILE",
            )
        taken.add(output)
        targets.append(OutputTarget(inputs=[source], output=output))
    return targets


def _directory_of(source: str) -> str:
    if object_store.is_url(source):
        return source.rpartition("/")[0]
    return str(Path(source).parent)


def _output_in(directory: str, stem: str) -> str:
    if object_store.is_url(directory):
        return f"{directory.removesuffix('/')}/{stem}.results/"
    return str(Path(directory) / f"{stem}.results.jsonl")


def _make_directory(directory: str) -> None:
    # Results contain conversations: only their owner may list and read them.
    try:
        Path(directory).mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as exc:
        raise UsageError(f"cannot create the directory {directory!r} (-d): {exc.strerror}") from exc


def results_path(output: str | None) -> str | Path | None:
    """Return the file, or the folder in an object store, that an output names."""
    if not output:
        return None
    return object_store_writer.output_place(output)


@contextmanager
def local_results(results: str) -> Iterator[Path]:
    """Yield results as a file; those in an object store are copied into a temporary one."""
    if not object_store.is_url(results):
        yield Path(results)
        return
    with tempfile.TemporaryDirectory() as directory:
        yield object_store_writer.fetch(object_store_writer.folder_of(results), Path(directory))
