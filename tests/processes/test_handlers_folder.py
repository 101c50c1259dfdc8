"""Dropping a file into the handlers folder is all it takes, on either carrier."""

import shutil
import subprocess

import pytest

from tests.support.consumer import run_command
from tests.support.servers import delete_queues
from tools.chaos.system import ROOT, wait_for

POINTS = '''"""Thank loyal customers."""


def order_confirmed(event, services):
    services.log.info("points awarded", extra={"points": int(event.order["total"])})
'''


@pytest.fixture
def folder(tmp_path, broker_url):
    """A copy of the handlers folder, to drop files into."""
    shutil.copytree(ROOT / "handlers", tmp_path / "handlers")
    yield tmp_path / "handlers"
    delete_queues(broker_url, ["points"])


@pytest.mark.parametrize("carrier", ["system", "embedded"])
def test_a_dropped_in_file_runs_and_shows_in_the_timeline(carrier, request, folder):
    (folder / "points.py").write_text(POINTS)
    running = request.getfixturevalue(carrier)(HANDLERS_DIR=str(folder))
    running.call("PUT", "/stock/A1", {"available": 5})
    _, order = running.call("POST", "/orders", running.order(quantity=2))
    wait_for(lambda: _done(running, order["id"], "points"))
    assert '"points": 39' in running.log("consumer" if carrier == "system" else "api")


def test_a_failing_step_is_parked_and_redriven_after_the_fix(system, folder):
    (folder / "shipping.py").write_text("def inventory_reserved(event, services):\n    raise OSError('no paper')\n")
    running = system(HANDLERS_DIR=str(folder), RETRY_DELAYS="0.2,0.5")
    running.call("PUT", "/stock/A1", {"available": 5})
    _, order = running.call("POST", "/orders", running.order())
    parked = wait_for(lambda: _order(running, order["id"]).get("parked"))
    assert parked == ["shipping"]
    lines = [line for line in _order(running, order["id"])["timeline"] if line["by"] == "shipping"]
    assert [(line.get("failed", line.get("parked")), line["try"], line["error"]) for line in lines] == [
        ("inventory_reserved", 1, "OSError"), ("inventory_reserved", 2, "OSError"), ("inventory_reserved", 3, "OSError")
    ]  # fmt: skip
    listed = wait_for(lambda: order["id"] in (out := _command(running, "dead", "shipping").stdout) and out)
    assert listed.split()[6:10] == ["shipping", order["id"], "inventory_reserved", "3"] and "OSError" in listed

    shutil.copy(ROOT / "handlers/shipping.py", folder)
    running.stop("consumer")
    running.start("consumer")
    running.wait_ready()
    assert _command(running, "redrive", "shipping").stdout == "sent 1 parked messages to orders.shipping again\n"
    running.wait_until_final()
    ended = _order(running, order["id"])
    assert ended["status"] == "processed" and "parked" not in ended


@pytest.mark.parametrize("carrier", ["system", "embedded"])
def test_a_parked_step_is_redriven_through_the_api(carrier, request):
    running = request.getfixturevalue(carrier)(RETRY_DELAYS="")
    running.call("PUT", "/stock/A1", {"available": 5})
    jam = {"name": "Ada", "line1": "1 Main St", "city": "Jam", "postalCode": "1", "country": "GB"}  # fails twice
    _, order = running.call("POST", "/orders", running.order() | {"shippingAddress": jam})
    for _ in range(2):
        _redrive(running, order["id"])
    ended = wait_for(lambda: (shown := _order(running, order["id"]))["status"] == "processed" and shown)
    sent = [line for line in ended["timeline"] if "sent" in line]
    assert [(line["sent"], line["by"], line["to"], line["times"]) for line in sent] == [
        ("inventory_reserved", "sweep", "shipping", 2)
    ]
    left = 0 if carrier == "embedded" else 2  # a broker keeps dead letters until somebody redrives or purges them
    wait_for(lambda: _dead(running) == left, 15)


def _redrive(running, order_id: str) -> None:
    """Wait until the order's label is parked, redrive it, and wait until it was tried again."""
    assert wait_for(lambda: _order(running, order_id).get("parked")) == ["shipping"]
    wait_for(lambda: _dead(running), 15)
    status, shown = running.call("POST", f"/orders/{order_id}/redrive")
    assert status == 200 and "parked" not in shown
    wait_for(lambda: _order(running, order_id)["updatedAt"] > shown["updatedAt"], 10)


def _dead(running) -> int | None:
    """The dead letters of `shipping`, once it was reported."""
    handlers = running.call("GET", "/handlers")[1]["handlers"]
    return next((each["dead"] for each in handlers if each["name"] == "shipping"), None)


def test_a_misspelt_event_name_stops_the_start_with_one_line(system, folder):
    (folder / "points.py").write_text(POINTS.replace("order_confirmed", "order_comfirmed"))
    ended = run_command("check", HANDLERS_DIR=str(folder))
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert "points.py: order_comfirmed is no event type: did you mean order_confirmed?" in ended.stderr


def _order(running, order_id: str) -> dict:
    return running.call("GET", f"/orders/{order_id}")[1]


def _done(running, order_id: str, handler: str) -> bool:
    return any(line["by"] == handler and "done" in line for line in _order(running, order_id)["timeline"])


def _command(running, *args: str) -> subprocess.CompletedProcess:
    return run_command(*args, **running.environment)
