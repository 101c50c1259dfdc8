"""README and docs/ are true: commands run, answers are as shown, tables and links name what is there."""

import ast
import os
import re
import shlex
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
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")])
}
RELIABILITY, EVENTS, HOW = (PAGES[f"docs/{name}.md"] for name in ("reliability", "events", "how-it-works"))
VARYING = [
    (r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "<id>"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", "<time>"),
    (r'"trackingNumber": "\w+"', '"trackingNumber": "<number>"'),
    (r'"ms": \d+', '"ms": <number>'),
    (r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", "<trace>"),
]


def examples(page: str) -> list[tuple[str, str]]:
    """(command, expected output) of every console block but the ones that start or stop the program.

    A command goes on over lines that end with a backslash or inside quotes, as in a shell.
    """
    found = []
    for block in re.findall(r"```console\n(.*?)```", PAGES[page], re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            lines, count = part.splitlines(keepends=True), 1
            while lines[count - 1].endswith("\\\n") or not whole("".join(lines[:count])):
                count += 1
            found.append(("".join(lines[:count]).rstrip(), "".join(lines[count:])))
    return [(command, output) for command, output in found if not command.startswith("make ")]


def whole(command: str) -> bool:
    try:
        shlex.split(command)
        return True
    except ValueError:
        return False


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
SETTLED = """settled() {
  all=$(curl -s http://127.0.0.1:8080/orders -H 'Authorization: Bearer demo-key')
  ! grep -qE '"status": "pending"|"outbox"' <<< "$all" && test $(count '"status": "processed"') = $(count '"done": ')
}
count() { grep -o "$1" <<< "$all" | wc -l; }
wait_until_settled() { for _ in {1..200}; do settled && break; sleep 0.1; done; }"""


@pytest.mark.parametrize("page", ["README.md", "docs/api.md"])
def test_every_command_answers_as_shown(running, page):
    script = ["shopt -s expand_aliases", SETTLED]
    for command, _ in examples(page):
        script += [command, "echo; echo ---next---", "wait_until_settled"]
    ran = subprocess.run(["bash", "-c", "\n".join(script)], cwd=running, capture_output=True, text=True, timeout=120)
    outputs = ran.stdout.split("---next---\n")[:-1]
    assert len(outputs) == len(examples(page)) > 3, ran.stderr
    for (command, expected), output in zip(examples(page), outputs, strict=True):
        assert same_form(output) == same_form(expected), command


def test_what_make_run_prints_works_when_pasted(running):
    printed = (running / "log").read_text()
    command = printed[printed.index("curl ") :].split("\n\n")[0]
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert '"status": "pending"' in ran.stdout
    wait_for(lambda: list((running / "data/labels").glob("*.svg")) and list((running / "data/mail/new").glob("*")))


def test_the_catalogue_is_what_the_folder_and_the_schemas_say():
    handlers = discover(ROOT / "handlers")
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([\w, ]+) \| ([\w, ]+) \| (.*)\|$", EVENTS, re.MULTILINE)
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
    table = RELIABILITY[RELIABILITY.index("| it goes wrong |") : RELIABILITY.index("The one thing that may happen")]
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


def links(page: str) -> set[str]:
    """What a page links to, here: Markdown links and pictures."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", PAGES[page], flags=re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    return {link for link in found if not link.startswith("http")}


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading_in_it(page):
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = ROOT / page if not name else (ROOT / page).parent / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_reached_from_readme():
    reached, new = set(), {"README.md"}
    while new:
        reached |= new
        there = {
            (ROOT / page).parent / link.partition("#")[0] for page in new for link in links(page) if link[0] != "#"
        }
        there |= {each for path in there if path.is_dir() for each in path.glob("*.md")}
        new = {name for path in there if (name := os.path.relpath(path, ROOT)) in PAGES} - reached
    assert set(PAGES) - reached == set()


def test_every_make_target_that_is_named_is_one():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, text in PAGES.items():
        named = re.findall(r"(?:`|^|\$ )(?:[A-Z_]+=\S+ )*make ([a-z0-9-]+)", text, re.MULTILINE)
        assert set(named) <= targets | {"lesson-", *(f"lesson-{n}" for n in range(1, 8))}, page


def test_the_handler_it_shows_runs_and_so_does_its_test(tmp_path):
    handler, test = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "points.py").write_text(handler)
    (tmp_path / "test_points.py").write_text(test.replace("from handlers.points", "from points"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_points.py")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "1 passed" in ran.stdout, ran.stdout + ran.stderr


def test_the_size_it_claims_is_its_size():
    total, must_read = re.search(r"about ([\d,]+) lines of Python, of which (\d+)", " ".join(README.split())).groups()
    assert abs(sum(map(size, program())) - int(total.replace(",", ""))) < 50
    assert abs(sum(map(size, MUST_READ)) - int(must_read)) < 15
    assert f"in this order: about {must_read} lines" in README


def test_what_to_read_are_the_files_counted_in_that_order():
    table = README[README.index("| file | what it is |") : README.index("| folder |")]
    assert tuple(re.findall(r"^\| \[(.*?)\]", table, re.MULTILINE)) == MUST_READ
    folders = README[README.index("| folder |") : README.index("## Add a handler")]
    named = re.findall(r"`([\w/.]+)`", folders)
    assert len(named) >= 10 and [name for name in named if not (ROOT / name).exists()] == []


def test_it_is_at_most_150_lines_long():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES)
def test_no_line_is_longer_than_120_columns(page):
    """But for rows of tables outside README, and URLs, which cannot be broken."""
    long = [line for line in PAGES[page].splitlines() if len(line) > 120]
    assert [line for line in long if page == "README.md" or not line.startswith(("| ", "MONGODB_URL="))] == []


def test_the_state_diagram_is_the_table_of_the_code():
    arrows = [f"    {change.needs or '[*]'} --> {change.leaves}: {type}" for type, change in TRANSITIONS.items()]
    assert "\n".join(["```mermaid", "stateDiagram-v2", *arrows, "```"]) in HOW
