"""What stays true whatever happens between two writes; tests/support/simulator.py explains how it is tried."""

import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from core.base.settings import ROOT
from core.bus.bus import Delivery
from core.bus.memory import MemoryBus
from core.order.state_machine import holdings
from core.running.discovery import discover
from tests.support.buses import Running
from tests.support.consumer import Desk, HandDelivery
from tests.support.samples import place
from tests.support.simulator import Killed, Simulation
from tools.chaos.system import wait_for

ROUNDS, SEEDS = 10, 10


@pytest.fixture(scope="module")
def simulation():
    return Simulation()


@pytest.fixture(autouse=True)
def surprises():
    """Nothing may go wrong in a way nobody thought of: a stack in the consumer's log fails the test."""
    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record):
            if record.exc_info and not isinstance(record.exc_info[1], Killed):
                found.append(self.format(record))

    handler, log = Collect(logging.ERROR), logging.getLogger("consumer")
    log.addHandler(handler)
    log.propagate = False
    yield found
    log.propagate = True
    log.removeHandler(handler)
    assert not found, found[0]


@pytest.mark.parametrize("part", range(ROUNDS))
def test_no_unit_is_lost_or_sold_twice_in_any_interleaving(simulation, part):
    logging.disable(logging.WARNING)
    try:
        for seed in range(part * SEEDS, (part + 1) * SEEDS):
            simulation.check(seed)
    finally:
        logging.disable(logging.NOTSET)


# --- the same with real threads, on the bus inside the process


def sell(desk: Desk, count: int, deliveries: int) -> Counter:
    """Have that many orders placed at once, make every delivery so often, and wait for the end of all; gives how they
    ended."""

    def deliver(delivery: Delivery) -> None:
        desk.worker.deliver(delivery)
        for _ in range(1, deliveries):
            desk.worker.deliver(HandDelivery(delivery.handler, delivery.id, delivery.body, delivery.tries))

    session = Running(desk.bus, desk.subscriptions, deliver=deliver)
    with ThreadPoolExecutor(32) as crowd:
        for _ in range(count):
            crowd.submit(lambda: desk.outbox.publish_pending(place(desk.store, quantity=1)))
    wait_for(lambda: desk.database["orders"].count_documents({"status": {"$ne": "pending"}}) == count, 60)
    wait_for(lambda: not desk.pending_moves(), 10)
    session.end()
    return Counter(document["status"] for document in desk.database["orders"].find())


def a_desk(units: int) -> Desk:
    """With the handlers that `make run` has."""
    delays = "0.05,0.1,0.2,0.4,0.8,1.6,3.2"
    return Desk(MemoryBus(), delays=delays, stock={"A1": units}, **discover(ROOT / "handlers"))


@pytest.mark.parametrize("deliveries", [1, 2])
def test_two_hundred_orders_at_once_sell_exactly_the_fifty_units(deliveries):
    desk = a_desk(units=50)
    assert sell(desk, 200, deliveries) == {"processed": 50, "failed": 150}
    assert desk.available() == 0
    assert sum(sum(holdings(document).values()) for document in desk.database["orders"].find()) == 50


def test_with_enough_stock_and_every_delivery_made_twice_none_fails():
    desk = a_desk(units=200)
    assert sell(desk, 200, deliveries=2) == {"processed": 200}
    assert desk.available() == 0
