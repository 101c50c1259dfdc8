"""What a contributor's tools go by: the dev container, .editorconfig, CONTRIBUTING.md."""

import json
import re
import subprocess

import yaml

from core.base.settings import ROOT, VARIABLES

CONTAINER = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
TARGETS = re.findall(r"^([./a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_dev_container_opens_with_a_tested_python_and_all_that_make_needs():
    python = re.fullmatch(r"mcr\.microsoft\.com/devcontainers/python:(3\.\d+)-bookworm", CONTAINER["image"])[1]
    tested = {row["python"] for row in WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["include"]}
    assert python in tested and python != "3.14", "the bundled store has no wheel for 3.14"
    program, target = CONTAINER["postCreateCommand"].split()
    assert program == "make" and target in TARGETS
    assert CONTAINER["forwardPorts"] == [int(VARIABLES["PORT"]["default"])]
    assert set(map(int, CONTAINER["portsAttributes"])) == set(CONTAINER["forwardPorts"])


def test_every_text_file_is_as_editorconfig_says():
    listed = subprocess.run(["git", "grep", "-Il", ""], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wrong = []
    for name in listed.splitlines():
        text = (ROOT / name).read_bytes().decode()
        clean = text.endswith("\n") and "\r" not in text and not re.search(r"[ \t]$", text, re.MULTILINE)
        indented = re.search(r"^\t", text, re.MULTILINE) is None or name.endswith("Makefile")
        wrong += [name] if not (clean and indented) else []
    assert len(listed.splitlines()) > 100 and wrong == []


def test_what_contributing_names_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = [name for name in re.findall(r"`(\.?[\w./-]+)`", text) if "/" in name]
    assert len(paths) >= 4 and [name for name in paths if not (ROOT / name).exists()] == []
    for folder in re.findall(r"`(fast|servers|processes|deploy)`", text):
        assert (ROOT / "tests" / folder).is_dir()
