"""What API and consumer may rely on, whatever carries the events: one suite for the bus in one process and RabbitMQ."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from core import localbus, publisher
from core.bus import Message, Rabbit, dead_queue, main_queue, retry_queue
from core.localbus import LocalBus
from tests.support.buses import Outcomes, Running, running
from tools.chaos.system import free_port, wait_for

TOPOLOGY = {
    "inventory": ["order_created", "order_failed"],
    "shipping": ["inventory_reserved", "order_failed"],
    "email": ["order_created"],
}
DELAYS = ("0.3",)


class Carrier:
    """Makes buses that share their queues, as processes of one system do."""

    def __init__(self, url: str | None) -> None:
        self.url, self._made = url, []
        self._local = LocalBus()

    @property
    def in_process(self) -> bool:
        return self.url is None

    def bus(self):
        if self.in_process:
            return self._local
        self._made.append(Rabbit(self.url, DELAYS))
        return self._made[-1]

    def close(self) -> None:
        for bus in self._made:
            bus.close()


@pytest.fixture(params=["in-process", "rabbit"])
def carrier(request):
    carrier = Carrier(request.getfixturevalue("rabbit") if request.param == "rabbit" else None)
    yield carrier
    carrier.close()


@pytest.fixture
def session(carrier):
    """One bus that consumes for every handler."""
    with running(carrier.bus(), TOPOLOGY) as session:
        yield session


@pytest.fixture
def outcomes(session):
    return Outcomes(session.bus)


def event(type: str, number: int = 0, **more) -> Message:
    return Message(f"{type}-{number}", type, f'{{"type": "{type}", "näme": {number}}}'.encode(), **more)


def got(session: Running) -> list[tuple[str, str]]:
    return sorted((delivery.handler, delivery.id) for delivery in session.arrived)


# --- publishing ------------------------------------------------------------------------------------------------------


def test_an_event_reaches_each_subscriber_once_and_no_other_handler(session, outcomes):
    assert outcomes.publish_and_wait(event("order_created")) == "confirmed"
    assert outcomes.publish_and_wait(event("order_failed")) == "confirmed"
    session.wait(4)
    assert outcomes.publish_and_wait(event("inventory_reserved")) == "confirmed"
    session.wait(5)
    created, failed, reserved = "order_created-0", "order_failed-0", "inventory_reserved-0"
    assert got(session) == [
        ("email", created), ("inventory", created), ("inventory", failed), ("shipping", reserved), ("shipping", failed),
    ]  # fmt: skip


def test_body_and_id_arrive_unchanged_and_tries_start_at_zero(session, outcomes):
    sent = event("inventory_reserved")
    outcomes.publish(sent)
    [delivery] = session.wait(1)
    assert (delivery.handler, delivery.id, delivery.body, delivery.tries) == ("shipping", sent.id, sent.body, 0)


def test_a_mandatory_event_that_no_queue_takes_is_unroutable(session, outcomes):
    assert outcomes.publish_and_wait(event("order_cancelled")) == "returned"
    assert outcomes.publish_and_wait(event("order_created")) == "confirmed", "the next one is not taken for it"


def test_an_event_that_may_go_nowhere_is_confirmed(session, outcomes):
    assert outcomes.publish_and_wait(event("order_cancelled", mandatory=False)) == "confirmed"


def test_a_message_to_one_queue_reaches_that_queue_only(session, outcomes):
    assert outcomes.publish_and_wait(event("order_created", queue=main_queue("email"))) == "confirmed"
    assert outcomes.publish_and_wait(event("inventory_reserved")) == "confirmed"
    session.wait(2)
    assert got(session) == [("email", "order_created-0"), ("shipping", "inventory_reserved-0")]


def test_a_message_to_a_missing_queue_is_unroutable(session, outcomes):
    assert outcomes.publish_and_wait(event("order_created", queue=main_queue("nobody"))) == "returned"


def test_a_retry_queue_redelivers_after_its_delay_and_keeps_tries(session, outcomes):
    again = event("order_created", queue=retry_queue("email", "0.3"), headers={"tries": 2})
    began = time.monotonic()
    assert outcomes.publish_and_wait(again) == "confirmed"
    [delivery] = session.wait(1)
    assert 0.3 <= time.monotonic() - began < 2
    assert (delivery.handler, delivery.id, delivery.body, delivery.tries) == ("email", again.id, again.body, 2)


def test_what_is_parked_is_not_delivered(session, outcomes):
    assert (
        outcomes.publish_and_wait(event("order_created", queue=dead_queue("email"), headers={"error": "x"}))
        == "confirmed"
    )
    assert outcomes.publish_and_wait(event("order_created", 1)) == "confirmed"
    session.wait(2)
    assert got(session) == [("email", "order_created-1"), ("inventory", "order_created-1")]


def test_concurrent_publishes_of_one_id_each_call_done_once(carrier):
    seen = set()

    def handle(delivery) -> None:
        seen.add(delivery.id)
        delivery.ack()

    with running(carrier.bus(), TOPOLOGY, deliver=handle) as session, ThreadPoolExecutor(8) as threads:
        outcomes = Outcomes(session.bus)
        for number in list(range(50)) * 4:
            threads.submit(outcomes.publish, event("inventory_reserved", number))
        wait_for(lambda: outcomes.count("confirmed") == 200, what="every publish has its outcome")
        wait_for(lambda: len(seen) == 50)
    assert all(each == ["confirmed"] * 4 for each in outcomes.by_id.values())


def test_an_id_in_hand_is_not_queued_twice(carrier):
    bus = carrier.bus()
    outcomes = Outcomes(bus)
    if carrier.in_process:  # in hand is what a handler has
        with running(bus, TOPOLOGY) as session:
            outcomes.publish(event("inventory_reserved"))
            session.wait(1)
            outcomes.publish(event("inventory_reserved"))
            assert bus.depths[main_queue("shipping")] == 0
    else:  # in hand is what the broker has not confirmed
        outcomes.publish(event("inventory_reserved"))
        outcomes.publish(event("inventory_reserved"))
        with running(bus, TOPOLOGY) as session:
            session.wait(1)
            outcomes.publish_and_wait(event("inventory_reserved", 1))
            assert [delivery.id for delivery in session.wait(2)] == ["inventory_reserved-0", "inventory_reserved-1"]
    assert outcomes.by_id["inventory_reserved-0"] == ["confirmed", "confirmed"]


def test_an_acked_event_published_again_is_delivered_again(session, outcomes):
    outcomes.publish_and_wait(event("inventory_reserved"))
    session.ack(*session.wait(1))
    outcomes.publish_and_wait(event("inventory_reserved"))
    assert [delivery.id for delivery in session.wait(2)] == ["inventory_reserved-0"] * 2


def test_publishing_never_blocks_and_what_is_too_much_is_dropped(carrier, monkeypatch):
    monkeypatch.setattr(localbus, "BOUND", 20)
    monkeypatch.setattr(publisher, "BOUND", 20)
    if carrier.in_process:
        bus = carrier.bus()
        running(bus, {"shipping": ["inventory_reserved"]}).__enter__().end()  # the queue is there, nobody consumes
    else:
        bus = Rabbit(f"amqp://guest:guest@127.0.0.1:{free_port()}", DELAYS)  # nothing listens there
        bus.start_publishing()
    outcomes, began = Outcomes(bus), time.monotonic()
    for number in range(25):
        outcomes.publish(event("inventory_reserved", number))
    assert time.monotonic() - began < 1
    assert [id for id, each in outcomes.by_id.items() if "dropped" in each] == [
        f"inventory_reserved-{number}" for number in range(20, 25)
    ]
    bus.close()


# --- consuming -------------------------------------------------------------------------------------------------------


def test_a_full_prefetch_stops_its_own_handler_and_no_other(carrier):
    with running(carrier.bus(), TOPOLOGY, prefetch=3) as session:
        outcomes = Outcomes(session.bus)
        for number in range(10):
            outcomes.publish_and_wait(event("order_created", number, queue=main_queue("email")))
        session.wait(3)
        outcomes.publish_and_wait(event("inventory_reserved"))
        session.wait(4)
        assert [delivery.handler for delivery in session.arrived] == ["email"] * 3 + ["shipping"]
        session.ack(session.arrived[1])
        session.wait(5)
        outcomes.publish_and_wait(event("inventory_reserved", 1))
        session.wait(6)
        assert [delivery.handler for delivery in session.arrived].count("email") == 4


def test_acks_from_any_thread_in_any_order_are_final(carrier):
    seen, pool = [], ThreadPoolExecutor(8)

    def handle(delivery) -> None:
        time.sleep(0.01 if delivery.id.endswith("7") else 0)  # so that they end out of order
        delivery.ack()
        seen.append(delivery.id)

    with pool, running(carrier.bus(), TOPOLOGY, deliver=lambda delivery: pool.submit(handle, delivery)) as session:
        outcomes = Outcomes(session.bus)
        for number in range(300):
            outcomes.publish(event("inventory_reserved", number))
        wait_for(lambda: len(seen) == 300)
    assert len(set(seen)) == 300
    assert left_over(carrier) == []


def left_over(carrier: Carrier) -> list[str]:
    """What a new session is given before a message that was published after everything else."""
    with running(carrier.bus(), TOPOLOGY, prefetch=100) as session:
        Outcomes(session.bus).publish_and_wait(event("inventory_reserved", queue=main_queue("shipping"), headers={}))
        wait_for(lambda: any(each.id == "inventory_reserved-0" and each.tries == 0 for each in session.arrived))
        return [delivery.id for delivery in session.arrived if delivery.id != "inventory_reserved-0"]


def test_what_was_not_acked_is_not_lost(carrier):
    first = Running(carrier.bus(), TOPOLOGY)
    outcomes = Outcomes(first.bus)
    for number in range(1, 6):
        outcomes.publish_and_wait(event("inventory_reserved", number))
    for delivery in first.wait(5):
        delivery.release() if delivery.id.endswith("3") else delivery.ack()
    first.end()
    if carrier.in_process:  # forgotten, so that the sweep may send it again
        outcomes.publish_and_wait(event("inventory_reserved", 3))
    assert left_over(carrier) == ["inventory_reserved-3"]


def test_a_stop_awaits_deliveries_in_hand_and_takes_no_more(carrier):
    session = Running(carrier.bus(), TOPOLOGY, prefetch=1)
    outcomes = Outcomes(session.bus)
    outcomes.publish_and_wait(event("inventory_reserved", 1))
    outcomes.publish_and_wait(event("inventory_reserved", 2))
    [delivery] = session.wait(1)
    session.stop.set()
    wait_for(lambda: not session.bus.consuming or not carrier.in_process)
    threading.Event().wait(0.7)  # longer than one turn of its loop
    assert session.running
    delivery.ack()
    session.end(5)
    assert [delivery.id for delivery in session.arrived] == ["inventory_reserved-1"]
    assert left_over(carrier) == ["inventory_reserved-2"]


def test_events_of_handlers_that_run_elsewhere_wait_in_their_queues(carrier):
    with running(carrier.bus(), TOPOLOGY, ["email"]) as session:
        Outcomes(session.bus).publish_and_wait(event("order_created"))
        session.wait(1)
        assert got(session) == [("email", "order_created-0")]
    with running(carrier.bus(), TOPOLOGY, ["inventory"]) as session:
        session.wait(1)
        assert got(session) == [("inventory", "order_created-0")]


def test_the_bus_tells_whether_it_consumes_and_its_queue_lengths(carrier, monkeypatch):
    monkeypatch.setattr("core.bus.LOOK_EVERY", 0.1)
    session = Running(carrier.bus(), TOPOLOGY, prefetch=1)
    assert session.bus.up and session.bus.consuming
    outcomes = Outcomes(session.bus)
    for number in range(4):
        outcomes.publish_and_wait(event("inventory_reserved", number))
    wait_for(lambda: session.bus.depths.get(main_queue("shipping")) == 3)
    session.wait(1)[0].release()
    session.end()
    assert not session.bus.consuming
