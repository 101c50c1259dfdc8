"""What API and consumer may rely on, whatever carries the events: one suite for every carrier.

The third, over files in a folder, is there to show that another one is one file, and one line here.
"""

import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from core.bus import memory, publisher, rabbit
from core.bus.bus import Bus, Message
from core.bus.memory import MemoryBus
from core.bus.rabbit import Rabbit
from tests.support import spool_bus
from tests.support.buses import Outcomes, Running, running
from tests.support.spool_bus import SpoolBus
from tools.chaos.system import free_port, wait_for

TOPOLOGY = {
    "inventory": ["order_created", "order_failed"],
    "shipping": ["inventory_reserved", "order_failed"],
    "email": ["order_created"],
}
DELAYS = (0.3, 1.0)

# What makes one more bus of a carrier, for one more process of the same system; `get` gives a fixture.
CARRIERS: dict[str, Callable[[Callable], Callable[[], Bus]]] = {
    "memory": lambda get: functools.cache(MemoryBus),  # inside one process there is but one
    "rabbit": lambda get: functools.partial(Rabbit, get("rabbit"), DELAYS),
    "spool": lambda get: functools.partial(SpoolBus, get("tmp_path")),
}


class Carrier:
    """Makes buses that share their queues, as processes of one system do."""

    def __init__(self, name: str, make: Callable[[], Bus]) -> None:
        self.name, self._make, self._made = name, make, list[Bus]()

    @property
    def forgetful(self) -> bool:
        """What is not acked is forgotten, and the sweep sends it again."""
        return self.name == "memory"

    def bus(self) -> Bus:
        self._made.append(self._make())
        return self._made[-1]

    def close(self) -> None:
        for bus in self._made:
            bus.close()


@pytest.fixture(params=CARRIERS)
def carrier(request):
    carrier = Carrier(request.param, CARRIERS[request.param](request.getfixturevalue))
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
    assert outcomes.publish_and_wait(event("order_cancelled")) == "unroutable"
    assert outcomes.publish_and_wait(event("order_created")) == "confirmed", "the next one is not taken for it"


def test_an_event_that_may_go_nowhere_is_confirmed(session, outcomes):
    assert outcomes.publish_and_wait(event("order_cancelled", mandatory=False)) == "confirmed"


def test_a_message_to_one_handler_reaches_that_handler_only(session, outcomes):
    assert outcomes.publish_and_wait(event("order_created", handler="email")) == "confirmed"
    assert outcomes.publish_and_wait(event("inventory_reserved")) == "confirmed"
    session.wait(2)
    assert got(session) == [("email", "order_created-0"), ("shipping", "inventory_reserved-0")]


def test_a_message_to_a_missing_handler_is_unroutable(session, outcomes):
    assert outcomes.publish_and_wait(event("order_created", handler="nobody")) == "unroutable"


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
    if carrier.name == "rabbit":  # in hand is what the broker has not confirmed
        outcomes.publish(event("inventory_reserved"))
        outcomes.publish(event("inventory_reserved"))
        with running(bus, TOPOLOGY) as session:
            session.wait(1)
            outcomes.publish_and_wait(event("inventory_reserved", 1))
            assert [delivery.id for delivery in session.wait(2)] == ["inventory_reserved-0", "inventory_reserved-1"]
    else:  # in hand is what a handler has
        with running(bus, TOPOLOGY) as session:
            outcomes.publish(event("inventory_reserved"))
            session.wait(1)
            outcomes.publish(event("inventory_reserved"))
            assert bus.depths["shipping"] == 0
    assert outcomes.by_id["inventory_reserved-0"] == ["confirmed", "confirmed"]


def test_an_acked_event_published_again_is_delivered_again(session, outcomes):
    outcomes.publish_and_wait(event("inventory_reserved"))
    session.ack(*session.wait(1))
    outcomes.publish_and_wait(event("inventory_reserved"))
    assert [delivery.id for delivery in session.wait(2)] == ["inventory_reserved-0"] * 2


def test_publishing_never_blocks_and_what_is_too_much_is_unsent(carrier, monkeypatch):
    for module in (memory, publisher, spool_bus):
        monkeypatch.setattr(module, "BOUND", 20)
    if carrier.name == "rabbit":
        bus = unreachable()
        bus.start_publishing()
    else:
        bus = carrier.bus()
        Running(bus, {"shipping": ["inventory_reserved"]}).end()  # the queue is there, nobody consumes
    outcomes, began = Outcomes(bus), time.monotonic()
    for number in range(25):
        outcomes.publish(event("inventory_reserved", number))
    assert time.monotonic() - began < 1
    assert [id for id, each in outcomes.by_id.items() if "unsent" in each] == [
        f"inventory_reserved-{number}" for number in range(20, 25)
    ]
    bus.close()


def unreachable() -> Rabbit:
    """Nothing listens there."""
    return Rabbit(f"amqp://guest:guest@127.0.0.1:{free_port()}", DELAYS)


def test_what_is_in_hand_is_bounded_in_bytes_and_has_room_again(monkeypatch):
    monkeypatch.setattr(publisher, "LARGEST", 100)
    bus = unreachable()
    outcomes = Outcomes(bus)
    for number in range(4):
        outcomes.publish(replace(event("inventory_reserved", number), body=b"x" * 40))
    assert dict(outcomes.by_id) == {"inventory_reserved-2": ["unsent"], "inventory_reserved-3": ["unsent"]}
    bus.publisher._finish(next(iter(bus.publisher.in_hand.values())), "confirmed")
    outcomes.publish(replace(event("inventory_reserved", 5), body=b"x" * 40))
    assert "inventory_reserved-5" not in outcomes.by_id and len(bus.publisher.in_hand) == 2


def test_who_asks_again_and_again_for_one_message_does_not_make_it_grow():
    bus = unreachable()
    outcomes = Outcomes(bus)
    for _ in range(100):
        outcomes.publish(event("inventory_reserved"))
    [letter] = bus.publisher.in_hand.values()
    assert len(letter.done) == publisher.MOST_TOLD
    assert outcomes.by_id["inventory_reserved-0"] == ["unsent"] * (100 - publisher.MOST_TOLD)


# --- consuming -------------------------------------------------------------------------------------------------------


def test_a_full_prefetch_stops_its_own_handler_and_no_other(carrier):
    with running(carrier.bus(), TOPOLOGY, prefetch=3) as session:
        outcomes = Outcomes(session.bus)
        for number in range(10):
            outcomes.publish_and_wait(event("order_created", number, handler="email"))
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
        Outcomes(session.bus).publish_and_wait(event("inventory_reserved", handler="shipping"))
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
    if carrier.forgetful:
        outcomes.publish_and_wait(event("inventory_reserved", 3))
    assert left_over(carrier) == ["inventory_reserved-3"]


def test_a_delivery_that_never_ended_comes_again_in_another_session(carrier, monkeypatch):
    for module in (memory, rabbit, spool_bus):
        monkeypatch.setattr(module, "DRAIN", 0.3)
    first = Running(carrier.bus(), TOPOLOGY)
    Outcomes(first.bus).publish_and_wait(event("inventory_reserved", 1))
    [hanging] = first.wait(1)
    first.end()
    if carrier.forgetful:
        hanging.release()
        Outcomes(first.bus).publish_and_wait(event("inventory_reserved", 1))
    assert left_over(carrier) == ["inventory_reserved-1"]


def test_a_stop_awaits_deliveries_in_hand_and_takes_no_more(carrier):
    session = Running(carrier.bus(), TOPOLOGY, prefetch=1)
    outcomes = Outcomes(session.bus)
    outcomes.publish_and_wait(event("inventory_reserved", 1))
    outcomes.publish_and_wait(event("inventory_reserved", 2))
    [delivery] = session.wait(1)
    session.stop.set()
    wait_for(lambda: not session.bus.consuming or carrier.name == "rabbit")
    threading.Event().wait(0.7)  # longer than one turn of its loop
    assert session.running
    delivery.ack()
    session.end(5)
    assert [delivery.id for delivery in session.arrived] == ["inventory_reserved-1"]
    assert left_over(carrier) == ["inventory_reserved-2"]


def test_a_stop_awaits_the_others_where_one_is_released(carrier):
    with running(carrier.bus(), TOPOLOGY) as session:
        outcomes = Outcomes(session.bus)
        outcomes.publish_and_wait(event("inventory_reserved", 1))
        outcomes.publish_and_wait(event("inventory_reserved", 2))
        released, worked_on = session.wait(2)
        session.stop.set()
        released.release()
        session.arrived.remove(released)  # it has ended
        threading.Event().wait(1)
        assert session.running
        session.ack(worked_on)
        session.end(5)
    if carrier.forgetful:
        outcomes.publish_and_wait(event("inventory_reserved", int(released.id.split("-")[1])))
    assert left_over(carrier) == [released.id]


def test_events_of_handlers_that_run_elsewhere_wait_in_their_queues(carrier):
    with running(carrier.bus(), TOPOLOGY, ["email"]) as session:
        Outcomes(session.bus).publish_and_wait(event("order_created"))
        session.wait(1)
        assert got(session) == [("email", "order_created-0")]
    with running(carrier.bus(), TOPOLOGY, ["inventory"]) as session:
        session.wait(1)
        assert got(session) == [("inventory", "order_created-0")]


def test_the_bus_tells_whether_it_consumes_and_its_queue_lengths(carrier, monkeypatch):
    monkeypatch.setattr(rabbit, "LOOK_EVERY", 0.1)
    session = Running(carrier.bus(), TOPOLOGY, prefetch=1)
    assert session.bus.up and session.bus.consuming
    outcomes = Outcomes(session.bus)
    for number in range(4):
        outcomes.publish_and_wait(event("inventory_reserved", number))
    wait_for(lambda: session.bus.depths.get("shipping") == 3)
    session.wait(1)[0].release()
    session.end()
    assert not session.bus.consuming


# --- the four ends ---------------------------------------------------------------------------------------------------


def test_a_retry_redelivers_after_its_delay_and_keeps_tries(session, outcomes):
    sent = event("order_created")
    assert outcomes.publish_and_wait(sent) == "confirmed"
    for delivery in session.wait(2):
        if delivery.handler == "email":
            began = time.monotonic()
            delivery.retry(0.3, 2)
    again = session.wait(3)[2]
    assert 0.3 <= time.monotonic() - began < 2
    assert (again.handler, again.id, again.body, again.tries) == ("email", sent.id, sent.body, 2)
    threading.Event().wait(0.5)
    assert len(session.arrived) == 3, "it comes once, and to its handler alone"


def test_a_retry_that_waits_outlives_its_session(carrier):
    first = Running(carrier.bus(), TOPOLOGY)
    Outcomes(first.bus).publish_and_wait(event("inventory_reserved", 1))
    first.wait(1)[0].retry(1.0, 3)
    first.end()
    assert len(first.arrived) == 1
    with running(carrier.bus(), TOPOLOGY) as second:
        [again] = second.wait(1)
        assert (again.id, again.tries) == ("inventory_reserved-1", 3)


def test_many_retries_at_once_lose_and_double_none(carrier):
    ended, lock = [], threading.Lock()

    def handle(delivery) -> None:
        if delivery.tries == 0:
            return delivery.retry(0.3, 1)
        delivery.ack()
        with lock:
            ended.append((delivery.id, delivery.tries))

    pool = ThreadPoolExecutor(8)
    with pool, running(carrier.bus(), TOPOLOGY, deliver=lambda delivery: pool.submit(handle, delivery)) as session:
        outcomes = Outcomes(session.bus)
        for number in range(1, 101):
            outcomes.publish(event("inventory_reserved", number))
        wait_for(lambda: len(ended) == 100)
    assert sorted(ended) == sorted((f"inventory_reserved-{number}", 1) for number in range(1, 101))
    assert left_over(carrier) == []


def test_what_is_parked_is_counted_and_not_delivered(carrier, monkeypatch):
    monkeypatch.setattr(rabbit, "LOOK_EVERY", 0.1)
    first = Running(carrier.bus(), TOPOLOGY)
    outcomes = Outcomes(first.bus)
    assert outcomes.publish_and_wait(event("inventory_reserved", 1)) == "confirmed"
    first.wait(1)[0].park("LookupError('x')", 4)
    wait_for(lambda: first.bus.dead.get("shipping") == 1)
    assert first.bus.dead.get("email", 0) == 0
    assert outcomes.publish_and_wait(event("inventory_reserved", 2)) == "confirmed"
    first.ack(first.wait(2)[1])
    assert got(first) == [("shipping", "inventory_reserved-1"), ("shipping", "inventory_reserved-2")]
    first.end()
    assert left_over(carrier) == []


def test_what_is_released_does_not_come_again_without_a_pause(carrier):
    arrived = []

    def release(delivery) -> None:
        arrived.append(delivery)
        delivery.release()

    with running(carrier.bus(), TOPOLOGY, deliver=release) as session:
        Outcomes(session.bus).publish_and_wait(event("inventory_reserved", 1))
        wait_for(lambda: arrived)
        threading.Event().wait(1.5)
    assert {delivery.id for delivery in arrived} == {"inventory_reserved-1"} and len(arrived) <= 5


def test_after_a_rebuild_events_flow_as_before(session, outcomes):
    outcomes.publish_and_wait(event("inventory_reserved", 1))
    session.ack(*session.wait(1))
    session.bus.rebuild()
    session.wait_until_up()
    wait_for(lambda: outcomes.publish_and_wait(event("inventory_reserved", 2)) == "confirmed")
    wait_for(lambda: "inventory_reserved-2" in [each.id for each in session.arrived])
    assert [each.id for each in session.arrived].count("inventory_reserved-1") == 1, "what was acked stays acked"
