"""`make demo` and `make load` as a person starts them."""

import re
import signal
import subprocess
import sys
import time

import pytest

from tools import demo
from tools.chaos.system import ROOT, SECRET, free_port, wait_for


def start(*args: str, folder=None) -> subprocess.Popen:
    environment = {"TMPDIR": str(folder)} if folder else {}
    return subprocess.Popen(
        [sys.executable, "-u", "-m", *args], cwd=ROOT, env=demo.os.environ | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(*args: str, **where) -> tuple[int, str, str]:
    """Exit code, what it said, and its complaints."""
    process = start(*args, **where)
    said, complaint = process.communicate(timeout=120)
    return process.returncode, said, complaint


def load(system, *args: str) -> tuple[str, ...]:
    return ("tools.load", "--url", f"http://127.0.0.1:{system.port}", "--key", SECRET, *args)


def left_behind(folder) -> str:
    listed = subprocess.run(["ps", "-A", "-ww", "-o", "args="], capture_output=True, text=True, check=True).stdout
    return "\n".join(line for line in listed.splitlines() if str(folder) in line)


def test_the_story_comes_true(tmp_path):
    code, said, complaint = run("tools.demo", "--pace", "0", folder=tmp_path)
    assert (code, complaint) == (0, "")
    assert re.findall(r"^\d\. .*$", said, re.MULTILINE) == [
        "1. A good order", "2. One that is out of stock", "3. A handler that fails, and recovers",
        "4. One that is cancelled on its way", "5. kill -9",
    ]  # fmt: skip
    joan = said[said.index("3. A handler") : said.index("4. One")]
    assert re.findall(r"FAILED, FunctionFailed, try (\d)", joan) == ["1", "2"]
    mia = said[said.index("5. kill") :]
    assert mia.count("inventory: inventory_reserved") == 1 and mia.count("api: order_created") == 1
    assert list(tmp_path.iterdir()) == [] and left_behind(tmp_path) == ""


def test_what_is_not_as_told_ends_the_story_with_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(demo, "SCENES", (lambda story: demo.expect(story.available() == 999, "a unit is gone"),))
    assert demo.tell(pace=0) == 1
    assert "That was not as told: a unit is gone" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [] and left_behind(tmp_path) == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_interrupted_leaves_nothing_behind(tmp_path, number):
    process = start("tools.demo", folder=tmp_path)
    wait_for(
        lambda: "orderproc.py" in left_behind("orderproc.py") and left_behind(tmp_path)
    )  # the store has its folder
    process.send_signal(number)
    _, complaint = process.communicate(timeout=30)
    assert process.returncode == 128 + number and "Traceback" not in complaint
    wait_for(lambda: not left_behind(tmp_path), 10, "the store has ended")
    assert list(tmp_path.iterdir()) == []


def test_load_places_orders_at_its_rate_and_counts_their_ends(embedded):
    running = embedded()
    began = time.monotonic()
    code, said, complaint = run(*load(running, "--rate", "20", "--seconds", "2"))
    assert (code, complaint) == (0, "") and time.monotonic() - began >= 2
    *progress, _, last = said.splitlines()
    assert last == "40 placed: 36 processed, 4 failed, 0 still under way"
    assert len(progress) >= 2 and all(re.match(r" +\d+ s  \d+ placed, 0 refused", line) for line in progress)
    orders = running.orders()
    assert len(orders) == 40 and len({order["customerId"] for order in orders}) == 1
    assert running.call("GET", "/stock/A1")[1]["available"] > 1000 - 10, "what it takes it has put there"


def test_load_goes_on_while_the_program_is_down(embedded):
    running = embedded()
    process = start(*load(running, "--rate", "20", "--seconds", "6"))
    wait_for(lambda: len(running.orders()) > 20)
    running.kill("api")
    time.sleep(1.5)
    running.start("api")
    said, complaint = process.communicate(timeout=120)
    assert process.returncode == 1 and complaint == "", "some were never answered"
    assert "the program gives no answer" in said
    placed, processed, failed, pending = map(int, re.findall(r"\d+", said.splitlines()[-1]))
    assert placed == processed + failed and pending == 0 and 20 < placed < 120


def test_load_says_in_one_line_what_is_missing(embedded):
    code, _, complaint = run("tools.load", "--url", f"http://127.0.0.1:{free_port()}")
    assert code == 2 and "start it with `make run`" in complaint and len(complaint.splitlines()) == 1
    code, _, complaint = run(*load(embedded(mongodb_url="memory"), "--key", "wrong"))
    assert code == 2 and "KEY=" in complaint and len(complaint.splitlines()) == 1
