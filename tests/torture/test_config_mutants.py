"""Wrong settings: each ends with exit 2 and the key and line that is wrong, before anything is sent or written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli.main import main
from pipeline.simulator import Options, Server, serving

LINE = b'{"custom_id":"a","model":"gpt-6-luna","messages":[{"role":"user","content":"x"}]}\n'


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A configuration, words or variables with one fault, and what has to be said of it."""

    id: str
    says: str
    yaml: str | bytes | None = None
    words: tuple[str, ...] = ()
    environ: Mapping[str, str | None] = field(default_factory=dict)


def wrong(id: str, yaml: str | bytes, says: str) -> Mutant:
    """Return a mutant of the file; where `says` begins with a colon, a line number follows the file's name."""
    return Mutant(id=id, yaml=yaml, says=f"config.yaml{says}" if says.startswith(":") else says)


def openai(id: str, yaml: str, says: str) -> Mutant:
    """Return a mutant of the settings of OpenAI."""
    return wrong(id, f"providers: {{openai: {{{yaml}}}}}", f":1: providers.openai: {says}")


def address(id: str, url: str, says: str) -> Mutant:
    """Return a mutant whose conversations and key would go to this address."""
    return wrong(id, f"providers: {{x: {{protocol: openai, base_url: '{url}'}}}}", f":1: providers.x: {says}")


_NESTED = "[" * 5_000 + "]" * 5_000
_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MUTANTS: tuple[Mutant, ...] = (
    # misspelt
    wrong("typo in a section", "\nsendin: {}", ":2: sendin: unknown setting; did you mean 'sending'?"),
    wrong("typo", "sending:\n  concurency: 5", ":2: sending.concurency: unknown setting; did you mean 'concurrency'?"),
    wrong("wrong case", "sending: {Timeout: 5}", ":1: sending.Timeout: unknown setting; did you mean 'timeout'?"),
    wrong("hyphen", "sending:\n  max-attempts: 5", ":2: sending.max-attempts: unknown setting; did you mean 'max_at"),
    wrong("setting in the wrong section", "output: {timeout: 5}", ":1: output.timeout: unknown setting"),
    wrong("setting at the top", "timeout: 5", ":1: timeout: unknown setting"),
    wrong("typo in a provider", "providers:\n  openai: {modle: x}", ":2: providers.openai.modle: unknown setting"),
    wrong("typo in a model's caps", "limits: {models: {openai/a: {rmp: 5}}}", ":1: limits.models.openai/a.rmp: "),
    wrong("typo in an unknown provider", "providers: {opnai: {model: x}}", ":1: providers.opnai"),
    # of the wrong kind
    wrong("text for a number", "sending: {timeout: fast}", ":1: sending.timeout: Input should be a valid number"),
    wrong("quoted number", "sending:\n\n  timeout: '60'", ":3: sending.timeout: Input should be a valid number"),
    wrong("unit", "sending: {timeout: 60s}", ":1: sending.timeout: Input should be a valid number"),
    wrong("true for a number", "limits: {rpm: yes}", ":1: limits.rpm: Input should be a valid integer"),
    wrong("half a token", "request: {max_tokens: 1.5}", ":1: request.max_tokens: Input should be a valid integer"),
    wrong("number for text", "request: {system: 5}", ":1: request.system: Input should be a valid string"),
    wrong("number for true", "output: {ordered: 1}", ":1: output.ordered: Input should be a valid boolean"),
    wrong("section is a list", "sending: [timeout]", ":1: sending: Input should be"),
    wrong("providers are a list", "providers: [openai]", ":1: providers: Input should be"),
    wrong("number as a tag", "tags:\n  team: 5", ":2: tags.team: Input should be a valid string"),
    wrong("file is a list", "- a\n- b", "must contain settings"),
    # out of range
    wrong("negative timeout", "sending: {timeout: -1}", ":1: sending.timeout: Input should be greater than 0"),
    wrong("no timeout", "sending: {timeout: 0}", ":1: sending.timeout: Input should be greater than 0"),
    wrong("endless", "sending: {timeout: .inf}", ":1: sending.timeout: Input should be"),
    wrong("not a number", "request: {temperature: .nan}", ":1: request.temperature: Input should be"),
    wrong("nothing in flight", "sending: {concurrency: 0}", ":1: sending.concurrency: Input should be greater than"),
    wrong("too much in flight", "sending: {concurrency: 1000000}", ":1: sending.concurrency: Input should be less"),
    wrong("negative cap", "limits: {input_tpm: -5}", ":1: limits.input_tpm: Input should be greater than"),
    wrong("too hot", "request: {temperature: 2.5}", ":1: request.temperature: Input should be less than or equal to 2"),
    wrong("no bytes in a line", "input: {max_line_bytes: 0}", ":1: input.max_line_bytes: Input should be greater"),
    wrong("share over 1", "simulator: {faults: {'529': 2}}", ":1: simulator.faults.529: Input should be less"),
    # what does not exist
    wrong("unknown provider", "tags: {}\nprovider: nobody", ":2: provider: provider 'nobody' is not one of anthropic"),
    wrong("cap on an unknown provider", "limits: {models: {opnai/a: {rpm: 1}}}", ":1: limits: provider 'opnai' is not"),
    wrong("cap on a model without provider", "limits: {models: {gpt: {rpm: 1}}}", ":1: limits: models: 'gpt' must be"),
    wrong("unknown protocol", "providers: {x: {protocol: gemini, base_url: 'https://x'}}", ":1: providers.x.protocol"),
    wrong("unknown choice", "output: {format: xml}", ":1: output.format: Input should be 'native'"),
    wrong("unknown progress", "progress: loud", ":1: progress: Input should be 'auto'"),
    openai("other protocol's setting", "version: '1'", "version: not a"),
    wrong("certificates missing", "sending: {ca_file: none.pem}", ":1: sending.ca_file: cannot read 'none.pem'"),
    wrong("no certificates", "sending: {ca_file: in.jsonl}", ":1: sending.ca_file: 'in.jsonl' contains no PEM"),
    Mutant(id="file missing", words=("-c", "none.yaml"), says="cannot read the configuration 'none.yaml'"),
    Mutant(id="file is a folder", words=("-c", "."), says="cannot read the configuration '.'"),
    Mutant(id="PIPELINE_CONFIG missing", environ={"PIPELINE_CONFIG": "none.yaml"}, says="configuration 'none.yaml'"),
    Mutant(id="input missing", words=("none.jsonl",), says="the input 'none.jsonl' does not exist"),
    # where keys and conversations go
    address("plain http", "http://example.com", "base_url 'http"),
    address("no scheme", "example.com", "base_url 'example.com'"),
    address("file", "file:///x", "base_url 'file:///x' is not"),
    address("password", "https://a:b@c", "base_url must not contain"),
    address("space in an address", "https://a b", "base_url and"),
    openai("line end in a path", 'path: "/a\\nb"', "base_url and path must"),
    openai("key in a header", "headers: {Cookie: x}", "headers: Cookie"),
    openai("line end in a header", 'headers: {a: "b\\nc: d"}', "the value of a"),
    openai("space in a header's name", "api_key_header: x y", "'x y' is not a valid"),
    openai("key for its variable's name", "api_key_env: sk-1", "api_key_env"),
    Mutant(id="no key", environ={"OPENAI_API_KEY": None}, says="variable OPENAI_API_KEY is not set"),
    Mutant(id="empty key", environ={"OPENAI_API_KEY": " "}, says="variable OPENAI_API_KEY is not set"),
    Mutant(id="line end in a key", environ={"OPENAI_API_KEY": "a\nb"}, says="OPENAI_API_KEY does not hold a key"),
    Mutant(id="address of the environment", environ={"OPENAI_BASE_URL": "http://example.com"}, says="unencrypted"),
    # YAML that explodes, acts or hides
    wrong("tab", "sending:\n\ttimeout: 5", ":2: not valid YAML"),
    wrong("not closed", "sending: {timeout: 5", ":1: not valid YAML"),
    wrong("key twice", "progress: log\nprogress: bar", ":2: not valid YAML: progress is given twice"),
    wrong("two documents", "progress: log\n---\nprogress: bar", ":2: not valid YAML"),
    wrong("alias bomb", _BOMB, ":2: not valid YAML: aliases (*name) are not allowed"),
    wrong("merge key", "sending: &a {timeout: 5}\noutput: {<<: *a}", ":2: not valid YAML: aliases"),
    wrong("call", "tags: !!python/object/apply:os.abort []", ":1: not valid YAML: could not determine a constructor"),
    wrong("depth 5,000", f"tags: {_NESTED}", ":1: not valid YAML: nested more than 20 deep"),
    wrong("400,000 values", f"tags: [{'a,' * 400_000}]", ":1: not valid YAML: more than 10,000 keys and values"),
    wrong("2 MB", "# " + "x" * 2_000_000, "larger than 1,000,000 bytes"),
    wrong("invalid UTF-8", b"progress: \xff", "not valid YAML"),
    wrong("NUL", b"progress: log\0", "not valid YAML"),
    wrong("JSON Lines", LINE, ":1: "),
    # on the command line
    Mutant(id="--timeout", words=("--timeout", "0"), says="sending.timeout: Input should be greater than 0"),
    Mutant(id="--timeout nan", words=("--timeout", "nan"), says="sending.timeout: Input should be"),
    Mutant(id="--concurrency", words=("--concurrency", "-1"), says="sending.concurrency: Input should be greater"),
    Mutant(id="--concurrency text", words=("--concurrency", "many"), says="'many' is not a valid integer"),
    Mutant(id="--rpm", words=("--rpm", "0"), says="limits.rpm: Input should be greater than or equal to 1"),
    Mutant(id="--temperature", words=("--temperature", "9"), says="request.temperature: Input should be less"),
    Mutant(id="--max-tokens", words=("--max-tokens", "0"), says="request.max_tokens: Input should be greater"),
    Mutant(id="--limit", words=("--limit", "0"), says="0 is not in the range"),
    Mutant(id="--provider", words=("--provider", "nobody"), says="provider 'nobody' is not one of"),
    Mutant(id="--format", words=("--format", "xml"), says="'xml' is not one of 'native'"),
    Mutant(id="--tag", words=("--tag", "team"), says="--tag"),
    Mutant(id="misspelt option", words=("--concurency", "5"), says="--concurrency"),
    Mutant(id="-o and -d", words=("-d", "there"), says="give -o (one results file) or -d"),
    Mutant(id="-o in no folder", words=("-o", "none/out.jsonl"), says="'none' does not exist"),
)  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(Options()) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> Path:
    """A current directory with one good line, and an environment that points at the server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    (tmp_path / "in.jsonl").write_bytes(LINE)
    return tmp_path


def call(folder: Path, mutant: Mutant) -> tuple[int, str]:
    """Run the command with a fault; return its exit code and what it says."""
    if mutant.yaml is not None:
        (folder / "config.yaml").write_bytes(mutant.yaml if isinstance(mutant.yaml, bytes) else mutant.yaml.encode())
    words = ["run", "in.jsonl", "-o", "out.jsonl", *mutant.words]
    done = CliRunner(env=mutant.environ).invoke(main, words)
    return done.exit_code, done.stderr


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.id for mutant in MUTANTS])
def test_a_wrong_setting_stops_everything(folder: Path, server: Server, mutant: Mutant) -> None:
    """One fault in settings, words or variables: exit 2, its key and line are named, nothing is sent or written."""
    before = server.statistics()["received"]

    code, said = call(folder, mutant)

    assert code == 2, said
    assert mutant.says in said
    assert server.statistics()["received"] == before
    assert {path.name for path in folder.iterdir()} <= {"in.jsonl", "config.yaml"}


def test_the_same_without_a_fault_runs(folder: Path) -> None:
    """The settings that the mutants harm are good ones: without a fault the line is answered."""
    code, said = call(folder, Mutant(id="none", yaml="sending:\n  timeout: 5\n", says=""))

    assert (code, (folder / "out.jsonl").exists()) == (0, True), said
