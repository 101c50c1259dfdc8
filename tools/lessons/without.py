"""What would be without it? Applies the diff of a lesson's stop to a copy, and runs the test that misses what is gone.

without 3.1              once `. docs/lessons/words` was said; `make .venv/dev` installs what tests need
"""

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.planted_bugs import Bug, failing_test, plant
from tools.lessons import ROOT

LESSONS = sorted((ROOT / "docs/lessons").glob("[1-9]-*.md"))


class Without(NamedTuple):
    """A stop's diff, and the test that notices."""

    bug: Bug
    test: str


def all_diffs() -> dict[str, Without]:
    """Stop -> what its diff removes, of every lesson."""
    return {stop: read(stop, text) for path in LESSONS for stop, text in stops(path.read_text()).items()}


def stops(text: str) -> dict[str, str]:
    """Number, as 3.1 -> text, of a lesson's stops."""
    parts = re.split(r"^## (\d\.\d) ", text, flags=re.MULTILINE)[1:]
    return {stop: body.split("\n## ")[0] for stop, body in zip(parts[::2], parts[1::2], strict=True)}


def read(stop: str, text: str) -> Without:
    """The diff of a stop. Its first line names the file; lines are old (-), new (+) or around them (blank)."""
    file, lines = re.search(r"```diff\n--- (\S+)\n(.*?)```", text, re.DOTALL).groups()
    old, new = ("".join(line[1:] for line in lines.splitlines(True) if line[0] in kind) for kind in (" -", " +"))
    test = re.search(r"`(tests/\S+?::\S+)`", text)[1]
    return Without(Bug(stop, file, [(old, new)], test.split("::")[0].removeprefix("tests/")), test)


def notice(without: Without) -> str:
    """The test that fails in a copy with the diff; says why where there is none. Empty where all passes."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        kept = shutil.ignore_patterns(".*", "data", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=kept, symlinks=True)
        return plant(without.bug, copy) or failing_test(copy, [without.test])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = all_diffs()
    parser.add_argument("stop", choices=known)
    without = known[parser.parse_args().stop]
    failed = notice(without)
    print(f"changed in a copy: {without.bug.file}\nfails now: {failed or 'no test'}")
    return 0 if failed.startswith(without.test) else 1


if __name__ == "__main__":
    sys.exit(main())
