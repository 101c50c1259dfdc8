"""The lessons are the script: every command of every lesson runs as it stands there, and every answer is compared.

A lesson's console blocks are a session in numbered terminals: `1$ command`, what it prints, `1$ ^C`. A block of Python
with a path behind it is written into that file. All of it happens in a fresh clone, on ports of the test's own.
"""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from core.order.schemas import event_schemas
from core.running.discovery import discover
from tests.fakes import event, services
from tests.support.servers import installed
from tools.chaos.system import ROOT, free_port, wait_for
from tools.client import Client
from tools.lessons import KEY
from tools.lessons.without import LESSONS, all_diffs, notice

SOLUTIONS = ROOT / "docs/lessons/solutions"
API = re.compile("orderproc is at|listening")
READY = re.compile(f"Ctrl-C ends|orders.shipping|{API.pattern}")
VARYING = [(r"order [0-9a-f]{6}\b", "order X"), (r" *[\d.]+ ?m?s\b", " N ms"), (r" +", " ")]
CHANGES = re.compile(r"^(order|buyers|cancel|redrive|sleep|rm|mv|touch|sed|stock \w+ \d|for )")


class Terminal:
    """A shell that is given one command after the other, as a person would, with Ctrl-C."""

    def __init__(self, folder: Path, number: str, environment: dict[str, str]) -> None:
        self._folder, self._output = folder, folder.parent / f"terminal-{number}"
        self._count, self._from = 0, 0
        with self._output.open("wb") as output:
            self._shell = subprocess.Popen(
                ["bash"], cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=output,
                start_new_session=True, text=True,
            )  # fmt: skip
        self._type("trap : INT")  # Ctrl-C ends what runs in the shell, and not the shell

    def _type(self, text: str) -> None:
        self._shell.stdin.write(text + "\n")
        self._shell.stdin.flush()

    def enter(self, command: str) -> None:
        """Type a command, without waiting for it."""
        self._count += 1
        self._from = len(self._output.read_bytes())
        script = self._folder.parent / f"{self._output.name}-command-{self._count}"
        script.write_text(command + "\n")
        self._type(f". {script} </dev/null; echo; echo ended-{self._count}")

    def printed(self) -> str:
        """What the last command has printed so far."""
        return self._output.read_bytes()[self._from :].decode().split(f"\nended-{self._count}\n")[0]

    def is_free(self) -> bool:
        return not self._count or f"\nended-{self._count}\n" in self._output.read_bytes()[self._from :].decode()

    def interrupt(self) -> None:
        os.killpg(self._shell.pid, signal.SIGINT)

    def close(self) -> None:
        """End what runs in it, and it."""
        try:
            if not self.is_free():
                self.interrupt()
                wait_for(self.is_free, 30, "what ran in a terminal ends")
        finally:
            self._shell.stdin.close()
            with suppress(ProcessLookupError):
                os.killpg(self._shell.pid, signal.SIGKILL)
            self._shell.wait(10)


class Room:
    """A fresh clone of this folder, as it is now, and the terminals a learner opens in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "orderproc"
        self.cloned = time.monotonic()
        ignored = shutil.ignore_patterns(".git", ".venv*", "data", "__pycache__", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, self.folder, ignore=ignored, symlinks=True)
        if not os.environ.get("FRESH_VENV"):  # to install takes a minute; nobody waits for it in every run
            (self.folder / ".venv").symlink_to(ROOT / ".venv")
        told = {
            name: value for name, value in os.environ.items() if not re.match("AWS_|AMQP|MONGO|API_|DATA|RETRY", name)
        }
        ports = {
            name: str(free_port()) for name in ("PORT", "METRICS_PORT", "STORE_PORT", "FUNCTIONS_PORT", "BROKER_PORT")
        }
        self.environment = told | ports | {"PYTHONDONTWRITEBYTECODE": "1"}
        self.api = Client(f"http://127.0.0.1:{ports['PORT']}", KEY)
        self.terminals: dict[str, Terminal] = {}

    def terminal(self, number: str) -> Terminal:
        if number not in self.terminals:
            self.terminals[number] = Terminal(self.folder, number, self.environment)
        return self.terminals[number]

    def do(self, number: str, command: str, expected: str) -> None:
        """One command of a lesson, until it prints what is expected; it is repeated if it only looks."""
        terminal = self.terminal(number)
        if command == "^C":
            terminal.interrupt()
            return wait_for(terminal.is_free, 30, "Ctrl-C ends it")
        wait_for(terminal.is_free, 20, f"terminal {number} is free for {command}")
        deadline = time.monotonic() + 60
        while True:
            terminal.enter(command)
            wait_for(lambda: terminal.is_free() or READY.search(terminal.printed()), 300, command)
            if not missing(expected, terminal.printed()):
                break
            repeat = time.monotonic() < deadline and not CHANGES.match(command)
            assert repeat, (
                f"{command}\n--- printed\n{terminal.printed()}\n--- and not\n{missing(expected, terminal.printed())}"
            )
            time.sleep(0.3)
        if not terminal.is_free():
            wait_for(self.is_ready, 60, f"{command} is ready")

    def is_ready(self) -> bool:
        """Whether the API answers, if one was started."""
        try:
            return self.api.call("GET", "/readyz").status == 200
        except OSError:
            return not any(API.search(each.printed()) for each in self.terminals.values() if not each.is_free())
        finally:
            self.api.close()

    def close(self) -> None:
        """Close every terminal, and what runs in it."""
        while self.terminals:
            self.terminals.pop(min(self.terminals)).close()


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    room = Room(tmp_path_factory.mktemp("room"))
    yield room
    room.close()


def same_form(line: str) -> str:
    for pattern, word in VARYING:
        line = re.sub(pattern, word, line)
    return line.strip()


def missing(expected: str, printed: str) -> str:
    """The lines that are not there. Handlers that work at the same time leave theirs in any order."""
    wanted, found = (Counter(map(same_form, text.splitlines())) for text in (expected, printed))
    return "\n".join((wanted - found).elements())


def script(text: str) -> Iterator[tuple[str, str, str]]:
    """(terminal, command, what it prints), or ("", path, text) of a file to write, in order."""
    for kind, path, body in re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if kind == "python" and path:
            yield "", path, body
        elif kind == "console":
            for part in re.split(r"^(?=\d\$ )", body, flags=re.MULTILINE)[1:]:
                first, _, rest = part.partition("\n")
                yield first[0], first[3:], rest


def parts(path: Path) -> list[tuple[str, str]]:
    """(stop, text) of a lesson; what comes before the first stop is `0`, and its check `9`."""
    found = re.split(r"^## ", path.read_text(), flags=re.MULTILINE)
    return [(re.match(r"\d\.\d|", part)[0] or ("9" if part.startswith("Done?") else "0"), part) for part in found]


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_every_command_does_what_the_lesson_says(lesson, room):
    number = lesson.name[0]
    if number == "4" and not installed("rabbitmq-server"):
        pytest.skip("no rabbitmq-server here")
    asked = subprocess.run(
        ["make", f"lesson-{number}", "HINT=1"], cwd=room.folder, env=room.environment, capture_output=True, text=True
    )
    assert asked.returncode != 0 and "missing" in asked.stdout and "Not yet." in asked.stdout
    try:
        for stop, text in parts(lesson):
            for terminal, command, expected in script(text) if stop != "3.2" or installed("rabbitmq-server") else ():
                if terminal:
                    room.do(terminal, command, expected)
                    tell_seconds(room, command)
                else:
                    (room.folder / command).write_text(expected)
    finally:
        room.close()  # the next lesson begins with new terminals


def tell_seconds(room: Room, command: str) -> None:
    marks = {"show": "the first processed order", "order pia A1 2": "an order with one's own handler"}
    if command in marks and command not in room.environment:
        room.environment[command] = ""
        print(f"{time.monotonic() - room.cloned:.1f} s from a fresh clone to {marks[command]}")


# --- what the pages say


@pytest.fixture(scope="module")
def noticed():
    """Stop -> the test that fails without what the stop explains; four at a time, as most of them wait."""
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(all_diffs(), pool.map(notice, all_diffs().values()), strict=True))


@pytest.mark.parametrize("stop", all_diffs())
def test_without_it_the_named_test_fails(stop, noticed):
    assert noticed[stop].startswith(all_diffs()[stop].test)


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_every_lesson_is_made_in_the_same_way(lesson):
    number, text = lesson.name[0], lesson.read_text()
    assert "> **The question.**" in text and f"\n2$ guess {number} " in text and f"\n2$ make lesson-{number}\n" in text
    assert "**Go on by yourself.**" in text and f"solutions/README.md#lesson-{number}" in text
    stops = [part for stop, part in parts(lesson) if "." in stop]
    assert len(stops) >= 2
    for stop in stops:
        headings = re.findall(r"^\*\*(\w+(?: it)?)\.\*\*", stop, re.MULTILINE)
        assert headings == ["Guess", "Do", "See", "Why", "Without it"], stop[:40]


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_what_one_is_told_to_see_the_page_can_say(lesson):
    """Words in italics, up to what is different each time: a number, a reason."""
    source = (ROOT / "web/page.js").read_text() + (ROOT / "web/index.html").read_text()
    page = re.sub(r'\$\{[^}"]*"|"\}', "", source)  # what stands only sometimes, as in `${again || "First, "}then`
    seen = re.findall(r"^\*\*See\.\*\*(.*?)^\n", lesson.read_text(), re.DOTALL | re.MULTILINE)
    quoted = re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", " ".join(seen))
    told = [re.split(r"[:\d]", " ".join(each.split()))[0].strip() for each in quoted]
    assert [words for words in told if words not in page] == [] and len(seen) >= 2


def names(path: Path) -> set[str]:
    """What a Python file defines: functions, classes, `Class.method`, second names."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        inside = node.body if isinstance(node, ast.ClassDef) else []
        defined = [each.name for each in inside if isinstance(each, ast.FunctionDef)]
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found |= {node.name, *(f"{node.name}.{method}" for method in defined)}
    return found


@pytest.mark.parametrize("page", [*LESSONS, SOLUTIONS / "README.md"], ids=lambda path: path.stem)
def test_every_function_that_is_named_is_in_the_file_it_links_to(page):
    links = re.findall(r"\[`([\w.]+)`\]\((\S+?\.py)\)", page.read_text())
    assert [f"{name} in {file}" for name, file in links if name not in names(page.parent / file)] == []
    assert links


# --- the solutions


@pytest.fixture
def solutions(tmp_path, monkeypatch):
    """The handlers in docs/lessons/solutions, with the event types of lesson 7."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    known = dict(event_schemas())
    payment_taken = json.loads((ROOT / "examples/payment/events/payment_taken.json").read_text())
    monkeypatch.setitem(event_schemas(), "payment_taken", payment_taken)
    yield discover(SOLUTIONS)
    event_schemas().clear()
    event_schemas().update(known)


def test_points_are_taken_back_and_both_ways_may_be_gone_twice(solutions, tmp_path):
    notes = tmp_path / "points"
    for type, left in (("order_confirmed", ["39"]), ("order_cancelled", [])):
        for _ in range(2):
            solutions["points"][type](event(type), services())
        assert [path.read_text() for path in notes.iterdir()] == left


def test_a_receipt_of_a_cancelled_order_has_its_void_mark(solutions, tmp_path):
    answer = solutions["receipts"]["payment_taken"](event("payment_taken", amount=39.98), services())
    solutions["receipts"]["order_cancelled"](event("order_cancelled"), services())
    assert (answer.type, answer.data) == ("receipt_written", {"amount": 39.98})
    assert sorted(path.suffix for path in (tmp_path / "receipts").iterdir()) == [".receipt", ".void"]


def test_the_label_of_lesson_3_is_asked_for_with_one_token(solutions):
    given = services(answers={"make_label": {"carrier": "ACME", "trackingNumber": "1"}})
    for _ in range(2):
        assert solutions["shipping"]["inventory_reserved"](event("inventory_reserved"), given).type == "order_confirmed"
    assert len({payload["token"] for _, payload in given.calls}) == 1
