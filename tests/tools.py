"""The tools, extras and rights that some tests need.

Mark a test with what it needs, as in `@needs("strace")`. Where that is missing the test is skipped, and the reason says
how to get it. With `--require-tools`, as CI runs them, a test fails if its tool could have been installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

needs = pytest.mark.needs

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """How to see whether a tool is here, and how to get it; `is_right` marks a right, which nothing installs."""

    is_here: Callable[[], bool]
    how_to_get: str
    is_right: bool = False


def browser() -> str | None:
    """Return the path of Chromium, or of a browser like it."""
    for name in _BROWSERS:
        if path := shutil.which(name):
            return path
    return None


def faketime_library() -> Path | None:
    """Return the library of faketime, which shifts the clock of a program that loads it."""
    return next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


def _can_trace() -> bool:
    done = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, check=False)
    return done.returncode == 0


def _can_mount(*options: str) -> bool:
    """Return True if this user may mount file systems. In most containers not even root may."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        return False
    with tempfile.TemporaryDirectory(prefix="mount-") as folder:
        done = subprocess.run(["mount", *options, folder], capture_output=True, check=False)
        if done.returncode == 0:
            subprocess.run(["umount", folder], check=True)
    return done.returncode == 0


def _can_mount_images() -> bool:
    with tempfile.TemporaryDirectory(prefix="disk-") as folder:
        image = Path(folder) / "disk.img"
        with image.open("wb") as file:
            file.truncate(1024 * 1024)
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, capture_output=True)
        return _can_mount("-o", "loop", str(image))


def _is_command(name: str) -> Callable[[], bool]:
    return lambda: shutil.which(name) is not None


_TOOLS: Mapping[str, Tool] = {
    "strace": Tool(is_here=_is_command("strace"), how_to_get="apt-get install strace"),
    "tracing": Tool(is_here=_can_trace, how_to_get="a container that lets strace trace processes", is_right=True),
    "faketime": Tool(is_here=lambda: faketime_library() is not None, how_to_get="apt-get install faketime"),
    "openssl": Tool(is_here=_is_command("openssl"), how_to_get="apt-get install openssl"),
    "chromium": Tool(is_here=lambda: browser() is not None, how_to_get="apt-get install chromium"),
    "git": Tool(is_here=_is_command("git"), how_to_get="apt-get install git"),
    "pgrep": Tool(is_here=_is_command("pgrep"), how_to_get="apt-get install procps"),
    "ray": Tool(is_here=lambda: find_spec("ray") is not None, how_to_get="pip install -e '.[dev,ray]'"),
    "mkfs.ext4": Tool(is_here=_is_command("mkfs.ext4"), how_to_get="apt-get install e2fsprogs"),
    "mounting": Tool(
        is_here=lambda: _can_mount("-t", "tmpfs", "tmpfs"),
        how_to_get="root, where root may mount file systems",
        is_right=True,
    ),
    "loop devices": Tool(
        is_here=_can_mount_images, how_to_get="root, where root may mount images of disks", is_right=True
    ),
}


@cache
def _is_here(name: str) -> bool:
    return _TOOLS[name].is_here()


def require(*names: str, is_strict: bool) -> None:
    """Skip the running test if a tool is missing. If `is_strict` and it could be installed, fail the test."""
    for name in names:
        if _is_here(name):
            continue
        tool = _TOOLS[name]
        reason = f"needs {name}: {tool.how_to_get}"
        if is_strict and not tool.is_right:
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
