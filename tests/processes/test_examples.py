"""Each example once for real: a process with HANDLERS_DIR, and an order that goes through."""

import os
import subprocess
import sys

import pytest

from tests.support.servers import channel_to, consumers
from tools.chaos.system import ROOT, wait_for

LAST = {  # what the example's handler leaves in the timeline of a good order
    "points": {"done": "order_confirmed", "by": "points"},
    "payment": {"event": "payment_taken", "by": "payment", "of": "inventory_reserved"},
    "flaky": {"done": "order_confirmed", "by": "flaky"},
    "slow": {"done": "order_confirmed", "by": "slow"},
    "returns": {"event": "return_label_made", "by": "returns", "of": "order_confirmed"},
}


@pytest.fixture
def example(embedded):
    """A function that starts an example, with everything built in."""

    def start(name: str, **environment: str):
        return embedded("memory", HANDLERS_DIR=str(ROOT / "examples" / name), **environment)

    return start


def place(running, **fields: object) -> str:
    status, order = running.call("POST", "/orders", running.order() | fields)
    assert status == 201
    return order["id"]


def lines(running, id: str) -> list[dict]:
    return running.call("GET", f"/orders/{id}")[1]["timeline"]


def wait_for_line(running, id: str, line: dict) -> list[dict]:
    """The timeline, once that line is in it."""
    wait_for(lambda: any(line.items() <= each.items() for each in lines(running, id)))
    return lines(running, id)


@pytest.mark.parametrize("name", LAST)
def test_an_order_goes_through(example, name):
    running = example(name, SLOW_SECONDS="0.3")
    id = place(running)
    timeline = wait_for_line(running, id, LAST[name])
    assert sum("failed" in line for line in timeline) == (2 if name == "flaky" else 0)
    wait_for_line(running, id, {"done": "order_confirmed", "by": "email"})
    assert running.call("GET", f"/orders/{id}")[1]["status"] == "processed"


def test_a_payment_that_a_cancel_meets_is_refunded(example):
    running = example("payment", PAYMENT_SECONDS="1")
    id = place(running)
    wait_for_line(running, id, {"event": "inventory_reserved"})
    assert running.call("POST", f"/orders/{id}/cancel")[0] == 200
    wait_for_line(running, id, {"done": "order_cancelled", "by": "payment"})
    notes = running.folder / "data/payments"
    wait_for(lambda: sorted(path.name for path in notes.iterdir()) == [f"{id}.charge", f"{id}.refund"], 5)
    assert not any(line.get("event") == "payment_taken" for line in lines(running, id))


def test_a_payment_above_the_limit_fails_the_order(example):
    running = example("payment")
    id = place(running, items=[{"sku": "A1", "quantity": 1, "price": 1000.01}])
    wait_for_line(running, id, {"done": "order_failed", "by": "payment"})
    order = running.call("GET", f"/orders/{id}")[1]
    assert (order["status"], order["failureReason"]) == ("failed", "payment_refused")
    wait_for(lambda: running.call("GET", "/stock/A1")[1]["available"] == 1000)


def test_a_webhook_without_a_receiver_is_parked(example):
    running = example("webhook", RETRY_DELAYS="0.1", WEBHOOK_URL="http://127.0.0.1:9/", WEBHOOK_SECRET="whsec_c2VjcmV0")
    id = place(running)
    wait_for_line(running, id, {"parked": "order_confirmed", "by": "webhook", "try": 2, "error": "URLError"})


def test_outside_hears_what_this_system_announces(system, rabbit):
    running = system()
    running.call("PUT", "/stock/A1", {"available": 5})
    with (running.folder / "outside").open("w") as output:
        outside = subprocess.Popen(
            [sys.executable, "examples/outside.py"], cwd=ROOT, env={**os.environ, "AMQP_URL": rabbit}, stdout=output
        )
    try:
        wait_for(lambda: consumers(rabbit, "accounting"))
        id = place(running)
        wait_for(lambda: (running.folder / "outside").read_text() == f"order_confirmed {id} 19.99\n")
    finally:
        outside.kill()
        outside.wait()
        with channel_to(rabbit) as channel:
            channel.queue_delete("accounting")
