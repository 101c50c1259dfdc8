"""Each example once for real: a process with HANDLERS_DIR, and an order that goes through."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.support.servers import Receiver, channel_to, consumers
from tools.chaos.system import ROOT, wait_for

LAST = {  # what the example's handler leaves in the timeline of a good order
    "points": {"done": "order_confirmed", "by": "points"},
    "payment": {"event": "payment_taken", "by": "payment", "of": "inventory_reserved"},
    "flaky": {"done": "order_confirmed", "by": "flaky"},
    "slow": {"done": "order_confirmed", "by": "slow"},
    "returns": {"done": "order_confirmed", "by": "returns"},
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


def address(city: str) -> dict:
    return {"name": "Ada", "line1": "1 Main St", "city": city, "postalCode": "1", "country": "DE"}


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


def test_a_payment_is_refunded_once_when_its_order_is_cancelled(example):
    running = example("payment", RETRY_DELAYS="60")
    id = place(running, shippingAddress=address("Jam!"))  # its label fails, so the order waits, and is paid
    wait_for_line(running, id, {"failed": "payment_taken", "by": "shipping"})
    assert running.call("POST", f"/orders/{id}/cancel")[0] == 200
    for handler in ("payment", "shipping", "inventory", "email"):
        wait_for_line(running, id, {"done": "order_cancelled", "by": handler})
    notes = running.folder / "data/payments"
    assert {path.name: path.read_text() for path in notes.iterdir()} == {
        f"{id}.charge": "19.99 USD\n", f"{id}.refund": "19.99 USD\n"
    }  # fmt: skip
    wait_for(lambda: running.call("GET", "/stock/A1")[1]["available"] == 1000)


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


def test_a_webhook_is_tried_again_under_its_id(example):
    with Receiver(503, 204) as receiver:
        running = example("webhook", WEBHOOK_URL=receiver.url, WEBHOOK_SECRET="whsec_c2VjcmV0")
        id = place(running)
        timeline = wait_for_line(running, id, {"done": "order_confirmed", "by": "webhook"})
    [confirmed] = [line["id"] for line in timeline if line.get("event") == "order_confirmed"]
    assert [headers["webhook-id"] for headers, _ in receiver.got] == [confirmed, confirmed]


def test_no_order_waits_for_a_slow_handler(example):
    running = example("slow", SLOW_SECONDS="2", CONCURRENCY="1")
    ids = [place(running) for _ in range(5)]
    for id in ids:
        wait_for_line(running, id, {"done": "order_confirmed", "by": "email"})
    assert not any(line["by"] == "slow" for id in ids for line in lines(running, id))


def test_what_comes_back_is_for_sale_again(example):
    running = example("returns")
    id, other = place(running, shippingAddress=address("Nowhere")), place(running)
    wait_for_line(running, other, {"done": "order_confirmed", "by": "returns"})
    timeline = wait_for_line(running, id, {"done": "parcel_returned", "by": "returns"})
    assert any(line.get("event") == "parcel_returned" for line in timeline)
    wait_for(lambda: running.call("GET", "/stock/A1")[1]["available"] == 999)
    assert running.call("GET", f"/orders/{id}")[1]["status"] == "processed"


def test_outside_hears_what_this_system_announces_also_after_it_was_away(embedded, rabbit):
    running = embedded("memory", rabbit)
    try:
        with outside(running, rabbit) as printed:
            id = place(running)
            wait_for(lambda: printed() == f"order_confirmed {id} 19.99\n")
        id = place(running)
        wait_for(lambda: running.call("GET", f"/orders/{id}")[1]["status"] == "processed")
        with outside(running, rabbit) as printed:
            wait_for(lambda: printed() == f"order_confirmed {id} 19.99\n")
    finally:
        with channel_to(rabbit) as channel:
            channel.queue_delete("accounting")


@contextmanager
def outside(running, url: str) -> Iterator[Callable[[], str]]:
    """`examples/outside.py` while the block runs; gives a function that says what it printed."""
    file = running.folder / "outside"
    with file.open("w") as output:
        command, environment = [sys.executable, "examples/outside.py"], os.environ | {"AMQP_URL": url}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output)
    try:
        wait_for(lambda: consumers(url, "accounting"))
        yield file.read_text
    finally:
        process.kill()
        process.wait()
