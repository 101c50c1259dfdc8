"""Every bug that can be planted still fits the program, and leaves Python behind."""

import shutil

import pytest

from tests.planted_bugs import BUGS, ROOT, plant


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_fits_the_program_as_it_is(bug, tmp_path):
    (tmp_path / bug.file).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / bug.file, tmp_path / bug.file)
    assert plant(bug, tmp_path) == ""


def test_names_are_unique():
    assert len({bug.name for bug in BUGS}) == len(BUGS)


def test_a_bug_that_leaves_no_python_is_not_planted(tmp_path):
    (tmp_path / "a.py").write_text("if True:\n    pass\n")
    assert plant(BUGS[0]._replace(file="a.py", edits=[("    pass\n", "")]), tmp_path).startswith("that is no Python")
