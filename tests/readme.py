"""The two commands of the README: the one to try the program, and the one to test it.

    python3 -m tests.readme "Try it"
    python3 -m tests.readme "Tests"

Print the first ```bash block of a section, word for word. `.ci/run` runs what this prints, so that CI and the README
cannot differ. It needs nothing but Python, as CI calls it before it installs anything.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
TRY = "Try it"
TEST = "Tests"


def command(section: str, text: str | None = None) -> str:
    """Return the first ```bash block of the README's section, without the line end.

    Raises:
        LookupError: The section, or a block in it, is missing.
    """
    readme = README.read_text(encoding="utf-8") if text is None else text
    _, heading, rest = readme.partition(f"\n## {section}\n")
    if not heading:
        raise LookupError(f"README.md has no section '## {section}'")
    body, *_ = re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)
    block = re.search(r"^```bash\n(.+?)\n```$", body, flags=re.MULTILINE | re.DOTALL)
    if block is None:
        raise LookupError(f"the section '## {section}' of README.md has no ```bash block")
    return block[1]


if __name__ == "__main__":
    print(command(sys.argv[1]))
