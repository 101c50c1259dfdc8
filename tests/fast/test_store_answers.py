"""Whatever a store answers: what the client gets, and what becomes of the message, the try and the stock.

Each row of the table is an answer that real servers give, on each kind of write, alone and to the repeat of a write
that was done and whose answer was lost. Afterwards the store is well, and every order ends with not a unit missing.
`python -m tests.fast.test_store_answers` prints the table.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from core.order.state_machine import holdings
from core.store.connection import connect
from handlers import inventory
from tests.support.api import ORDER, Shop
from tests.support.consumer import Desk
from tests.support.wire_store import (
    WireStore,
    acknowledge_badly,
    always,
    lose,
    lose_answer,
    on,
    refuse,
    refuse_writes,
    when,
)
from tools.chaos.system import wait_for

OPEN = {  # after these nobody knows what was done, or will be
    **{f"write error {code}": refuse_writes(code) for code in (6, 91, 112, 133, 189, 365, 8000, 14031, 16500)},
    **{
        f"command {code}": refuse(code)
        for code in (6, 13, 20, 50, 91, 133, 262, 301, 462, 8000, 10107, 11600, 11601, 11602)
    },
    **{f"write concern {code}": acknowledge_badly(code) for code in (64, 79, 91, 100, 189, 11602)},
    "connection lost before": lose,
    "connection lost after": lose_answer,
}
NEVER = {f"write error {code}": refuse_writes(code) for code in (2, 9, 121, 10334, 17420)}
HANDLERS = {"inventory": {"order_created": inventory.order_created, "order_cancelled": inventory.order_cancelled}}


class Stop(threading.Event):
    """A stop signal on which nobody waits for long."""

    def wait(self, timeout: float | None = None) -> bool:
        return super().wait(0.01)


class Stage:
    """An API and a worker on one store, and what they are asked to do while it misbehaves."""

    def __init__(self, server: WireStore) -> None:
        self.server = server
        database = connect(server.url)
        self.shop, self.desk = Shop(database), Desk(database=database, stock={"A1": 100}, stop=Stop(), **HANDLERS)

    def create(self, *faults, lasting: bool = False) -> int:
        with self.misbehaving("orders", "insert", *faults, lasting=lasting):
            status = self.post()
        assert self.post() == 201, "the same key again"
        assert self.server.database["orders"].count_documents({"requestKey": "shop:k"}) == 1
        return status

    def post(self) -> int:
        return self.shop.client("POST", "/orders", ORDER, idempotency_key="k").status

    def cancel(self, *faults, lasting: bool = False) -> int:
        path = f"/orders/{self.shop.client.create()['id']}"
        with self.misbehaving("orders", "update", *faults, lasting=lasting):
            status = self.shop.client("POST", f"{path}/cancel").status
        assert self.shop.client("POST", f"{path}/cancel").json["status"] == "cancelled"
        return status

    def put(self, *faults) -> int:
        with self.misbehaving("stock", "update", *faults):
            status = self.shop.admin("PUT", "/stock/A1", {"available": 50}, idempotency_key="p").status
        assert self.shop.admin("PUT", "/stock/A1", {"available": 50}, idempotency_key="p").json["available"] == 50
        return status

    def deliver(self, collection: str, *faults) -> str:
        """An order to inventory, whose writes to a collection fail; gives how its message ended."""
        _, body = self.desk.place()
        with self.misbehaving(collection, "update", *faults):
            delivery = self.desk.give("inventory", body)
            wait_for(lambda: delivery.ends, 10, "the message ended")
        return delivery.end

    @contextmanager
    def misbehaving(self, collection: str, name: str, *faults, lasting: bool = False) -> Iterator[None]:
        """The faults one after the other, or the first of them at every such command."""
        wait_for(lambda: not self.desk.pending_moves() or collection == "orders", 10, "nothing is under way")
        matches = on(collection, name)
        self.server.fault = always(matches, faults[0]) if lasting else when(matches, *faults)
        yield
        self.server.fault = None

    def check(self) -> None:
        """After a while of a well store: nothing is pending, parked or recorded twice, and no unit is missing."""
        for _ in range(3):
            self.desk.pass_time(61)
            self.desk.sweep.round()
            self.desk.pump()
        orders = list(self.desk.database["orders"].find())
        held = sum(holdings(order).get("A1", 0) for order in orders)
        assert self.desk.available() + held == 50
        for order in orders:
            steps = [step["step"] for step in order["steps"]]
            assert len(steps) == len(set(steps)) and order["parked"] == []
            assert not any("failed" in line or "parked" in line for line in order["timeline"]), "no try was spent"


@pytest.fixture
def stage(monkeypatch):
    shorten_waits(monkeypatch)
    with WireStore() as server:
        yield Stage(server)


def shorten_waits(monkeypatch):
    monkeypatch.setattr("core.store.group_commit.PAUSE", 0.01)
    monkeypatch.setattr("core.store.group_commit.GRACE", 5.0)  # what is cleared beside may meet the fault, too
    monkeypatch.setattr("core.store.store.PING_EVERY", 0.0)
    monkeypatch.setattr("core.store.store.PING_WITHIN", 0.2)
    monkeypatch.setattr("pymongo.common.MIN_HEARTBEAT_INTERVAL", 0.01)  # until it connects again


def row(stage: Stage, *faults) -> list[int | str]:
    """What became of a PUT, a new order, a cancel, and messages whose take or record met the faults."""
    return [
        stage.put(*faults), stage.create(*faults), stage.cancel(*faults),
        stage.deliver("stock", *faults), stage.deliver("orders", *faults),
    ]  # fmt: skip


@pytest.mark.parametrize("answer", OPEN)
def test_after_an_open_answer_the_write_is_repeated(stage, answer):
    assert row(stage, OPEN[answer]) == [503, 201, 200, "ack", "ack"]
    stage.check()


@pytest.mark.parametrize("answer", OPEN)
def test_an_open_answer_to_a_repeat_is_not_believed(stage, answer):
    assert row(stage, lose_answer, OPEN[answer]) == [503, 201, 200, "ack", "ack"]
    stage.check()


@pytest.mark.parametrize("answer", [*[name for name in OPEN if "write error" in name], "command 13", "command 301"])
def test_a_store_that_refuses_for_long_loses_nothing(stage, answer, monkeypatch):
    monkeypatch.setattr("core.http.app.ANSWER_WITHIN", 0.1)
    stage.put()
    assert stage.create(OPEN[answer], lasting=True) == 503
    assert stage.cancel(OPEN[answer], lasting=True) == 503
    _, body = stage.desk.place()
    with stage.misbehaving("*", "update", OPEN[answer], lasting=True):
        delivery = stage.desk.give("inventory", body)
        time.sleep(0.1)
        assert not stage.shop.store.ping() and delivery.ends == [] and stage.desk.bus.rebuilt == 0
    wait_for(lambda: delivery.ends, 5, "it goes on by itself")
    assert delivery.end == "ack"
    stage.check()


@pytest.mark.parametrize("answer", NEVER)
def test_a_certain_refusal_is_a_fault_of_that_write(stage, answer, caplog):
    stage.put()
    with stage.misbehaving("orders", "insert", NEVER[answer]):
        assert stage.post() == 500
    assert stage.deliver("orders", NEVER[answer]) == "retry"
    assert stage.desk.available() == 50


@pytest.mark.parametrize("answer", NEVER)
def test_a_certain_refusal_of_a_repeat_is_not_believed(stage, answer):
    stage.put()
    with stage.misbehaving("orders", "insert", lose_answer, NEVER[answer]):
        assert stage.post() == 503
    assert stage.post() == 201
    assert stage.deliver("orders", lose_answer, NEVER[answer]) == "ack"
    stage.check()


def print_table() -> None:
    """A line for each answer, alone and to a repeat."""
    print(f"{'answer':<24} {'PUT':<5} {'POST':<5} {'cancel':<7} {'take':<6} record")
    for name, fault in OPEN.items():
        for label, faults in ((name, [fault]), ("  to a repeat", [lose_answer, fault])):
            with pytest.MonkeyPatch.context() as patch, WireStore() as server:
                shorten_waits(patch)
                put, post, cancel, take, record = row(stage := Stage(server), *faults)
                stage.check()
            print(f"{label:<24} {put:<5} {post:<5} {cancel:<7} {take:<6} {record}")


if __name__ == "__main__":
    print_table()
