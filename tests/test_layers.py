from __future__ import annotations

import ast
import dataclasses
import graphlib
import pickle
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

import pipeline
from pipeline.core import errors, types
from pipeline.core.errors import ErrorScope, PipelineError
from tests.tools import needs

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pipeline"

# The packages, from the top down. A package may import only those in rows below its own.
LAYERS = (
    ("cli",),
    ("runner",),
    ("dispatch",),
    ("accounting",),
    ("inputs", "results"),
    ("providers",),
    ("core",),
)
SIMULATOR = "simulator"  # a provider to test against: it imports nothing of the rest

# Which modules may import an outside library. A package in this table stands for every module in it.
OWNERS = {
    "httpx": {"core.http"},
    "pyreqwest": {"core.http"},
    "yaml": {"core.config_file"},
    "pydantic": {"core.config"},
    "tenacity": {"dispatch.retry"},
    "aiolimiter": {"dispatch.live.token_bucket"},
    "fcntl": {"core.files"},
    "rich": {"cli", "accounting.report"},
    "sqlite3": {"accounting.ledger", "dispatch.live.shared_limits"},
    "click": {"cli"},
    "genai_prices": {"accounting.pricing", "accounting.rates"},
    "obstore": {"core.object_store"},
    "starlette": {"simulator"},
    "uvicorn": {"simulator"},
    "ray": {"runner.cluster.ray"},
    "requests": set[str](),
    "pickle": set[str](),
    "marshal": set[str](),
}
MOST_ENTRIES = 12  # directly under pipeline/
MOST_FILES = 16  # directly in one folder


def module(path: Path) -> str:
    """Return the dotted name of a file within the package: `core.http`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package(path: Path) -> str:
    """Return the top-level package that a file is in."""
    return path.relative_to(PACKAGE).parts[0]


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE]
TREES = {path: ast.parse(path.read_text()) for path in FILES}
MODULES = {f"pipeline.{module(path)}": path for path in FILES}


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield the dotted names that a module imports, `from a import b` as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_imports() -> set[tuple[str, str]]:
    """Return which package imports which other."""
    found = {
        (package(path), name.split(".")[1])
        for path, tree in TREES.items()
        for name in imported(tree)
        if name.startswith("pipeline.")
    }
    return {(importer, target) for importer, target in found if importer != target}


def module_imports() -> dict[str, set[str]]:
    """Return, for each module, the modules of this program that it imports when it is loaded."""
    found: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        at_load = ast.Module(body=[*_statements_at_load(TREES[path])], type_ignores=[])
        names = {each for each in imported(at_load) if each.startswith("pipeline.")}
        targets = {each if each in MODULES else each.rpartition(".")[0] for each in names}
        found[name] = targets & set(MODULES) - {name}
    return found


def _statements_at_load(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yield the imports that run when a module is loaded: not those in functions or for type checkers only."""
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def owners_of(library: str) -> set[str]:
    """Return the modules that import a library."""
    return {module(path) for path, tree in TREES.items() if library in {name.split(".")[0] for name in imported(tree)}}


def calls() -> Iterator[tuple[str, str]]:
    """Yield the module and the text of every name and attribute that is used."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Name | ast.Attribute):
                yield module(path), ast.unparse(node)


# ── imports ───────────────────────────────────────────────────────────────────────────────────────────


def test_every_package_has_its_layer() -> None:
    """The table of layers names every package and no other."""
    assert sorted([SIMULATOR, *(name for layer in LAYERS for name in layer)]) == sorted({package(f) for f in FILES})


def test_imports_follow_the_direction() -> None:
    """No package imports one of its own row or of a row above."""
    row = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    allowed_to_simulate = {("runner", SIMULATOR), ("cli", SIMULATOR)}

    between = package_imports() - allowed_to_simulate
    assert [edge for edge in sorted(between) if SIMULATOR in edge] == []
    assert [edge for edge in sorted(between) if row[edge[0]] >= row[edge[1]]] == []


def test_no_module_imports_itself_through_others() -> None:
    """There is no import cycle between modules."""
    graphlib.TopologicalSorter(module_imports()).prepare()


def test_a_folder_can_be_taken_in_at_a_glance() -> None:
    """There are at most 12 entries under `pipeline/`, and about 15 modules in each folder."""
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    modules = Counter(path.parent for path in FILES if path.name != "__init__.py")

    assert len(entries) <= MOST_ENTRIES
    assert {str(folder.relative_to(ROOT)): n for folder, n in modules.items() if n > MOST_FILES} == {}


def test_test_folders_mirror_the_packages() -> None:
    """Each package has its folder of tests under the same name."""
    packages = {package(path) for path in FILES}

    assert [name for name in sorted(packages) if not (ROOT / "tests" / name).is_dir()] == []


@pytest.mark.parametrize("library", OWNERS)
def test_each_outside_library_has_one_owner(library: str) -> None:
    """Each outside library is imported by its owner only."""
    owners = OWNERS[library]

    found = owners_of(library)
    assert [name for name in sorted(found) if not any(f"{name}.".startswith(f"{owner}.") for owner in owners)] == []
    assert bool(found) == bool(owners)


def test_only_config_reads_the_environment() -> None:
    """The environment is read in one place."""
    assert {where for where, name in calls() if name in ("os.environ", "os.getenv", "os.environb")} == {
        "core.environment"
    }


def test_only_the_command_line_prints() -> None:
    """Nothing but the command line writes to stdout and stderr; the screen is given its console."""
    printing = ("print", "sys.stdout", "sys.stderr", "click.echo", "logging.getLogger")

    assert {where.partition(".")[0] for where, name in calls() if name in printing} <= {"cli"}


def test_nothing_evaluates_text() -> None:
    """No text from outside becomes code."""
    dangerous = ("eval", "exec", "compile", "__import__", "os.system", "yaml.load", "yaml.unsafe_load", "pickle.loads")

    assert {(where, name) for where, name in calls() if name in dangerous} == set()


def test_the_clock_is_the_event_loops() -> None:
    """Nobody asks the wall clock or sleeps but through the event loop; one clock reads the time of day once.

    What measures the processor does so in a thread, beside the loop.
    """
    clocks = ("time.time", "time.monotonic", "time.perf_counter", "time.sleep", "datetime.now", "datetime.utcnow")
    used = {(where, name) for where, name in calls() if name in clocks and not where.startswith(SIMULATOR)}

    assert used <= {
        ("core.clock", "datetime.now"),
        ("core.cpu_affinity", "time.monotonic"),
        ("core.cpu_affinity", "time.sleep"),
    }


def test_importing_the_package_is_cheap() -> None:
    """`import pipeline` loads no HTTP client and no schema library: `--help` is quick."""
    heavy = ["anyio", "httpx", "obstore", "orjson", "pydantic", "pyreqwest", "rich", "yaml"]
    script = f"import sys, pipeline; print([name for name in {heavy} if name in sys.modules])"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)

    assert done.stdout == "[]\n"


def test_all_public_names_are_there() -> None:
    """Every name that the package exports can be imported, and no other one is invented."""
    assert [name for name in pipeline.__all__ if not hasattr(pipeline, name)] == []
    assert sorted(pipeline.__all__) == pipeline.__all__
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        pipeline.nonsense  # noqa: B018


def test_no_export_hides_a_module() -> None:
    """No exported name is that of a module, which it would hide."""
    assert set(pipeline.__all__) & {package(path) for path in FILES} == set()


# ── the repository ────────────────────────────────────────────────────────────────────────────────────


@needs("git")
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_the_top_level_is_as_designed() -> None:
    """At the top of the repository there is what the design names, and hidden files."""
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.splitlines()

    top = {name.split("/")[0] for name in listed}
    assert {name for name in top if not name.startswith(".")} == {
        "README.md",
        "config.yaml",
        "pipeline",
        "pyproject.toml",
        "samples",
        "tests",
    }


# ── errors and values ─────────────────────────────────────────────────────────────────────────────────


def family(cls: type[PipelineError]) -> Iterator[type[PipelineError]]:
    """Yield a class and all that are derived from it."""
    yield cls
    for child in cls.__subclasses__():
        yield from family(child)


ERRORS = list(family(PipelineError))


def test_the_drawing_of_errors_is_true() -> None:
    """The tree that the docstring draws is the tree of the classes."""
    drawn: list[tuple[str, str]] = []
    above = [""]
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r" {4}((?:│   |    |├── |└── )*)([A-Z]\w+)", line):
            depth = len(match[1]) // 4
            above = [*above[: depth + 1], match[2]]
            drawn.append((above[depth], match[2]))

    real = [(cls.__bases__[0].__name__, cls.__name__) for cls in ERRORS]
    assert sorted(drawn) == sorted([("", "PipelineError"), *real[1:]])
    assert all(cls.__module__ == "pipeline.core.errors" for cls in ERRORS)


EXTRA: dict[str, dict[str, Any]] = {
    "LineError": {"type": "duplicate_custom_id"},
    "TransportError": {"type": "timeout", "is_sent": True, "scope": ErrorScope.RUN},
}
OF_PROVIDERS = {
    "type": "rate_limit_error",
    "scope": ErrorScope.MODEL,
    "code": "c",
    "status": 429,
    "request_id": "req_1",
    "retry_after": 1.5,
    "may_be_billed": True,
    "attempts": 3,
}


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
def test_errors_travel(cls: type[PipelineError]) -> None:
    """Every error can be pickled and comes back with its class, message, fields, hint and scope."""
    fields = OF_PROVIDERS if issubclass(cls, errors.ProviderError) else EXTRA.get(cls.__name__, {"hint": "do this"})
    error = cls("what, 'ü'", **fields)

    back = pickle.loads(pickle.dumps(error))

    assert type(back) is cls
    assert (str(back), back.args, vars(back)) == (str(error), error.args, vars(error))
    assert {name: getattr(back, name) for name in fields} == fields
    assert (back.scope, back.exit_code) == (error.scope, error.exit_code)


@pytest.mark.parametrize(
    ("cls", "code"),
    [
        pytest.param(errors.UsageError, 2, id="usage"),
        pytest.param(errors.ConfigError, 2, id="configuration"),
        pytest.param(errors.BudgetReachedError, 4, id="budget"),
        pytest.param(errors.StorageError, 5, id="storage"),
        pytest.param(errors.TryLaterError, 75, id="try later"),
    ],
)
def test_errors_have_the_documented_exit_codes(cls: type[PipelineError], code: int) -> None:
    """The exit code of an error is that of the contract."""
    assert cls("x").exit_code == code


VALUES = [cls for cls in vars(types).values() if dataclasses.is_dataclass(cls) and isinstance(cls, type)]


def example(annotation: str, name: str) -> Any:
    """Return some value for a field; which one does not matter, as nothing is checked."""
    return {"int": 7, "bool": True, "bytes": b"\xff", "float": 1.5}.get(annotation.removesuffix(" | None"), f"{name} ü")


@pytest.mark.parametrize("cls", VALUES, ids=lambda cls: cls.__name__)
def test_values_travel(cls: Any) -> None:
    """Every value can be pickled and comes back equal, field by field."""
    value = cls(**{field.name: example(str(field.type), field.name) for field in dataclasses.fields(cls)})

    back = pickle.loads(pickle.dumps(value))

    assert back == value
    assert dataclasses.asdict(back) == dataclasses.asdict(value)


@pytest.mark.parametrize("cls", VALUES, ids=lambda cls: cls.__name__)
def test_values_are_frozen_and_named(cls: Any) -> None:
    """Every value is frozen, slotted, and made by naming its fields, so a new field breaks nobody."""
    parameters = cls.__dataclass_params__

    assert parameters.frozen
    assert hasattr(cls, "__slots__")
    assert all(field.kw_only for field in dataclasses.fields(cls))


def test_enumerations_are_texts() -> None:
    """Enumerations are their own text, so they can stand in files and messages."""
    members = [member for cls in (types.Protocol, types.OutputFormat, ErrorScope) for member in cls]

    assert [str(member) for member in members] == [member.value for member in members]
    assert all(isinstance(member, Enum) for member in members)
