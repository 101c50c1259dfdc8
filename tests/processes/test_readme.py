"""The README is true: its commands run, their answers are as shown, its tables name what is there."""

import ast
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from core.base.settings import VARIABLES
from core.order.schemas import event_schemas
from core.order.state_machine import TRANSITIONS, Outcome
from core.running.discovery import discover
from tests.support.code_size import MUST_READ, program, size
from tools.chaos.system import ROOT, wait_for

README = (ROOT / "README.md").read_text()
VARYING = [
    (r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "<id>"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", "<time>"),
    (r'"trackingNumber": "\w+"', '"trackingNumber": "<number>"'),
]


def examples() -> list[tuple[str, str]]:
    """(command, expected output) of every console block but the one that starts the program."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output))
    return [(command, output) for command, output in found if not command.startswith("make ")]


def same_form(text: str) -> str:
    for pattern, word in VARYING:
        text = re.sub(pattern, word, text)
    return text.strip()


@pytest.fixture
def running(tmp_path):
    """`make run` itself, on the default port, with a data folder of its own."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("AMQP_URL", "MONGODB_URL", "API_KEYS")
    }
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            ["make", "run"], cwd=ROOT, env=environment | {"DATA_DIR": str(tmp_path / "data")},
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(lambda: "Ctrl-C ends it" in (tmp_path / "log").read_text(), 60, "make run says where it is")
        yield tmp_path
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(15)


# A person types slower than an order takes; the test waits for that.
PENDING = "curl -s http://127.0.0.1:8080/orders?status=pending -H 'Authorization: Bearer demo-key'"
ENDED = f"for _ in {{1..200}}; do {PENDING} | grep -q '\"orders\": \\[\\]' && break; sleep 0.1; done"


def test_every_command_answers_as_shown(running):
    script = ["shopt -s expand_aliases"]
    for command, _ in examples():
        script += [command, "echo; echo ---next---", ENDED]
    ran = subprocess.run(["bash", "-c", "\n".join(script)], cwd=running, capture_output=True, text=True, timeout=120)
    outputs = ran.stdout.split("---next---\n")[:-1]
    assert len(outputs) == len(examples()), ran.stderr
    for (command, expected), output in zip(examples(), outputs, strict=True):
        assert same_form(output) == same_form(expected), command


def test_what_make_run_prints_works_when_pasted(running):
    printed = (running / "log").read_text()
    command = printed[printed.index("curl ") :].split("\n\n")[0]
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert '"status": "pending"' in ran.stdout
    wait_for(lambda: list((running / "data/labels").glob("*.svg")) and list((running / "data/mail/new").glob("*")))


def test_the_catalogue_is_what_the_folder_and_the_schemas_say():
    handlers = discover(ROOT / "handlers")
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([\w, ]+) \| ([\w, ]+) \| (.*)\|$", README, re.MULTILINE)
    assert {row[0] for row in rows} == set(event_schemas())
    for type, status, _, subscribers, data in rows:
        required = event_schemas()[type].schema["properties"]["data"]["required"]
        assert status == (TRANSITIONS[type].leaves if type in TRANSITIONS else "pending")
        assert subscribers.split(", ") == [name for name in handlers if type in handlers[name]]
        assert set(re.findall(r"`(\w+)`", data)) == set(required) - {"order"}


def test_the_settings_page_has_every_variable_with_its_default():
    table = (ROOT / "docs/settings.md").read_text()
    assert set(VARIABLES) <= set(re.findall(r"`([A-Z_]+)`", table))
    for variable in ("DATA_DIR", "WEB_THREADS", "CONCURRENCY", "RETRY_DELAYS", "METRICS_PORT"):
        assert f"| `{variable}` | `{VARIABLES[variable]['default']}` |" in table


def test_every_test_and_place_in_the_failure_table_exists():
    table = README[README.index("| it goes wrong |") : README.index("The one thing that may happen twice")]
    files = list((ROOT / "tests").rglob("test_*.py"))
    tests = {path.name for path in files}.union(*(re.findall(r"def (test_\w+)", path.read_text()) for path in files))
    known = places()
    rows = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", table, re.MULTILINE)[2:]
    assert len(rows) >= 15
    for _, _, place, proof in rows:
        named, proofs = re.findall(r"`([\w.]+)`", place), re.findall(r"`([\w.]+)`", proof)
        assert named and set(named) <= known, place
        assert proofs and set(proofs) <= tests, proof


def places() -> set[str]:
    """What the program defines: classes and functions, also as `Class.method` and as `module.function`."""
    found = set()
    for path in program():
        module = ast.parse((ROOT / path).read_text())
        for node in module.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found |= {node.name, f"{Path(path).stem}.{node.name}"}
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return found


def test_the_glossary_has_every_outcome_and_only_errors_that_exist():
    text = (ROOT / "docs/glossary.md").read_text()
    outcomes, errors = text.split("## Outcomes")[1].split("## Errors")
    assert set(re.findall(r"^\| `(\w+)` \|", outcomes, re.MULTILINE)) == set(get_args(Outcome))
    first_cells = " ".join(re.findall(r"^\| (`.*?) \|", errors, re.MULTILINE))
    named = set(re.findall(r"`(\w+)`", first_cells))
    assert named and named <= places()


def test_every_link_leads_to_a_file():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 8 and [link for link in links if not (ROOT / link).exists()] == []


def test_every_make_target_it_names_is_one():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE)) <= targets


def test_the_handler_it_shows_runs_and_so_does_its_test(tmp_path):
    handler, test = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "points.py").write_text(handler)
    (tmp_path / "test_points.py").write_text(test.replace("from handlers.points", "from points"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_points.py")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "1 passed" in ran.stdout, ran.stdout + ran.stderr


def test_the_size_it_claims_is_its_size():
    total, must_read = re.search(r"about ([\d,]+) lines of Python, of which (\d+)", README).groups()
    assert abs(sum(map(size, program())) - int(total.replace(",", ""))) < 50
    assert abs(sum(map(size, MUST_READ)) - int(must_read)) < 15
    assert f"in this order: about {must_read} lines" in README


def test_what_to_read_are_the_files_counted_in_that_order():
    table = README[README.index("| file | what it is |") : README.index("| folder |")]
    assert tuple(re.findall(r"^\| \[(.*?)\]", table, re.MULTILINE)) == MUST_READ
    folders = README[README.index("| folder |") : README.index("## Follow one order")]
    named = re.findall(r"`([\w/.]+)`", folders)
    assert len(named) >= 10 and [name for name in named if not (ROOT / name).exists()] == []


def test_it_is_at_most_250_lines_long():
    assert len(README.splitlines()) <= 250


def test_the_state_diagram_is_the_table_of_the_code():
    arrows = [f"    {change.needs or '[*]'} --> {change.leaves}: {type}" for type, change in TRANSITIONS.items()]
    assert "\n".join(["```mermaid", "stateDiagram-v2", *arrows, "```"]) in README
