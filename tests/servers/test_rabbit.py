"""What only a real RabbitMQ shows: queues as declared, and a broker that misbehaves, dies, freezes and comes back."""

import contextlib
import gc
import json
import random
import socket
import threading
import time
import urllib.error
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from urllib.parse import urlsplit

import pytest

from core.bus import link, publisher
from core.bus.bus import Message, TopologyMismatch
from core.bus.dead_letters import DeadLetters
from core.bus.publisher import Letter
from core.bus.rabbit import Rabbit
from core.bus.topology import dead_queue, main_queue, queues_of, retry_queue
from core.flow.outbox import Outbox
from core.store.connection import connect
from core.store.store import Store
from tests.support.buses import Outcomes, Running, running
from tests.support.consumer import Consumer, Process, run_command, write_handlers
from tests.support.samples import place
from tests.support.servers import BrokerNode, Router, channel_to, consumers, delete_queues, installed, length, put, used
from tools.chaos.system import free_port, wait_for

TOPOLOGY = {"inventory": ["order_created"], "email": ["order_created", "order_confirmed"]}
DELAYS = (0.2, 0.3)
NOTICED = 6.0  # seconds: 5 to notice, 1 to put it right


def exists(url: str, queue: str) -> bool:
    return length(url, queue) >= 0


def created(number: int) -> Message:
    return Message(f"event-{number}", "order_created", b'{"n": %d}' % number)


@pytest.fixture
def bus(rabbit):
    bus = Rabbit(rabbit, DELAYS)
    yield bus
    bus.close()


@pytest.fixture
def no_looks(monkeypatch):
    """Looking at queue lengths finds most losses as well, so leave it out."""
    monkeypatch.setattr("core.bus.rabbit.LOOK_EVERY", 3600)


@pytest.fixture
def session(bus):
    with running(bus, TOPOLOGY) as session:
        yield session


@pytest.fixture
def outcomes(bus):
    return Outcomes(bus)


# --- the topology ----------------------------------------------------------------------------------------------------


def test_every_queue_has_the_arguments_of_the_design(rabbit, session):
    again = {"x-dead-letter-exchange": "", "x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
    expected = {
        "orders.email": {"x-delivery-limit": 20, **again, "x-dead-letter-routing-key": "orders.email.dead"},
        "orders.email.retry.0.2": {
            "x-delivery-limit": 1_000_000, **again, "x-dead-letter-routing-key": "orders.email", "x-message-ttl": 200
        },
        "orders.email.retry.0.3": {
            "x-delivery-limit": 1_000_000, **again, "x-dead-letter-routing-key": "orders.email", "x-message-ttl": 300
        },
        "orders.email.dead": {"x-delivery-limit": 1_000_000},
    }  # fmt: skip
    expected = {queue: {"x-queue-type": "quorum", **arguments} for queue, arguments in expected.items()}
    assert queues_of("email", DELAYS) == expected  # RabbitMQ compares not every argument
    with channel_to(rabbit) as channel:
        for queue, arguments in expected.items():
            channel.queue_declare(queue, durable=True, arguments=arguments)
        channel.exchange_declare("orders", "topic", durable=True)


def test_a_published_message_is_persistent_with_id_and_number_alone(rabbit):
    bus = Rabbit(rabbit, DELAYS)
    Running(bus, TOPOLOGY, ["inventory"]).end()
    assert Outcomes(bus).publish_and_wait(created(1)) == "confirmed"
    bus.close()
    with channel_to(rabbit) as channel:
        _, properties, body = channel.basic_get(main_queue("email"), auto_ack=True)
    assert (properties.delivery_mode, properties.message_id, body) == (2, "event-1", b'{"n": 1}')
    assert properties.content_type == "application/cloudevents+json"
    assert [name for name in properties.headers if name not in ("x-delivery-count",)] == [publisher.NUMBER]


@pytest.mark.parametrize(
    ("queue", "arguments", "named"),
    [
        ("orders.email.retry.0.2", {"x-message-ttl": 900}, "x-message-ttl"),
        ("orders.email", {"x-dead-letter-routing-key": "elsewhere"}, "x-dead-letter-routing-key"),
        ("orders.inventory.dead", {"x-queue-type": "classic"}, "x-queue-type"),
    ],
)
def test_a_queue_with_another_argument_stops_the_start_with_advice(rabbit, bus, queue, arguments, named):
    given = {**queues_of(queue.split(".")[1], DELAYS)[queue], **arguments}
    if given["x-queue-type"] == "classic":
        given = {"x-queue-type": "classic"}
    with channel_to(rabbit) as channel:
        channel.queue_declare(queue, durable=True, arguments=given)
    with pytest.raises(TopologyMismatch) as refused:
        bus.consume(TOPOLOGY, list(TOPOLOGY), 16, print, threading.Event())
    text = str(refused.value)
    assert queue in text and named in text and "delete it" in text and "\n" not in text
    assert not bus.consuming


def test_an_exchange_of_another_type_stops_the_start_with_advice(rabbit, bus):
    with channel_to(rabbit) as channel:
        channel.exchange_delete("orders")
        channel.exchange_declare("orders", "direct", durable=True)
        try:
            with pytest.raises(
                TopologyMismatch, match=r"exchange orders is there with another argument type.*delete it"
            ):
                bus.consume(TOPOLOGY, list(TOPOLOGY), 16, print, threading.Event())
        finally:
            channel.exchange_delete("orders")


def test_a_mismatched_queue_makes_consumers_exit_2_with_one_line(rabbit):
    with channel_to(rabbit) as channel:
        channel.queue_declare("orders.email", durable=True, arguments={"x-queue-type": "quorum"})
    ran = run_command(
        AMQP_URL=rabbit, MONGODB_URL=f"mongodb://127.0.0.1:{free_port()}/x", METRICS_PORT="0", LOG_LEVEL="error"
    )
    assert ran.returncode == 2
    [line] = ran.stderr.splitlines()
    assert line.startswith("queue orders.email is there with another argument x-")
    assert "delete it (a queue: once it is empty)" in line


# --- losing parts of the broker --------------------------------------------------------------------------------------


def flows(session: Running, outcomes: Outcomes, count: int = 1) -> None:
    """Events go through: each of two handlers gets each. (A publisher that lost its broker may pause 15 s.)"""
    wait_for(lambda: session.bus.up, 40, "the publisher is up")
    numbers = [random.randrange(10**9) for _ in range(count)]
    for number in numbers:
        outcomes.publish(created(number))
    missing = {("email", f"event-{n}") for n in numbers} | {("inventory", f"event-{n}") for n in numbers}
    wait_for(lambda: not (missing - {(each.handler, each.id) for each in session.arrived}), NOTICED, "events flow")


def test_when_the_broker_closes_a_channel_unacked_deliveries_come_again(no_looks, session, outcomes):
    wait_for(lambda: session.bus.depths, what="the first look, which cannot be left out")
    outcomes.publish_and_wait(created(1))
    first, second = session.wait(2)[:2]
    first.ack()
    outcomes.publish_and_wait(created(2))
    session.wait(4)
    first.ack()  # twice is an error that costs the channel
    wait_for(lambda: len(session.arrived) > 6, NOTICED, "what was in hand comes again")
    again = sorted((each.handler, each.id) for each in session.arrived[4:7])
    assert again == sorted((each.handler, each.id) for each in [second, *session.arrived[2:4]])
    flows(session, outcomes)


def test_an_old_ack_is_not_used_on_a_new_channel(session, outcomes):
    for number in range(3):
        outcomes.publish_and_wait(created(number))
    before = session.wait(6)[:]
    session.bus.rebuild()
    session.wait(12)
    for delivery in before:
        delivery.ack()
    flows(session, outcomes)
    assert len(session.arrived) == 14, "nothing came a third time"
    assert sorted(each.id for each in session.arrived[6:12]) == sorted(each.id for each in before)


def test_an_old_release_touches_nothing_on_a_new_channel(rabbit):
    router = Router(rabbit)
    bus = Rabbit(router.url, DELAYS)
    with running(bus, TOPOLOGY) as session:
        Outcomes(bus).publish_and_wait(created(1))
        before = session.wait(2)[:]
        bus.rebuild()
        after = session.wait(4)[2:]
        before[0].release()
        time.sleep(1)
        assert (router.connections, len(session.arrived)) == (3, 4), "the connection is not made anew for it"
        session.stop.set()
        before[1].release()
        time.sleep(1)
        assert session.running, "what is in hand is still waited for"
        session.ack(*after)
        session.end(5)
    bus.close()
    router.close()
    assert [length(rabbit, main_queue(name)) for name in TOPOLOGY] == [0, 0]


def test_a_consumer_whose_queue_is_deleted_notices_and_redeclares_it(rabbit, no_looks, session, outcomes):
    wait_for(lambda: session.bus.depths, what="the first look, which cannot be left out")
    with channel_to(rabbit) as channel:
        channel.queue_delete(main_queue("email"))
    wait_for(lambda: exists(rabbit, main_queue("email")), NOTICED, "the queue is back")
    session.wait_until_up()
    flows(session, outcomes)


@pytest.mark.parametrize("queue", [dead_queue("email"), main_queue("inventory")])
def test_a_single_queue_that_vanishes_is_back_within_seconds(rabbit, session, outcomes, queue):
    with channel_to(rabbit) as channel:
        channel.queue_delete(queue)
    wait_for(lambda: exists(rabbit, queue), NOTICED + 1, f"{queue} is back")


def test_all_deleted_queues_are_declared_again_and_events_flow_again(rabbit, session, outcomes):
    delete_queues(rabbit, TOPOLOGY, DELAYS)
    queues = [queue for name in TOPOLOGY for queue in queues_of(name, DELAYS)]
    wait_for(lambda: all(exists(rabbit, queue) for queue in queues), NOTICED, "all queues are back")
    session.wait_until_up()
    flows(session, outcomes)


def test_a_vanished_exchange_leaves_events_unroutable_until_bindings_are_back(rabbit, session, outcomes):
    with channel_to(rabbit) as channel:
        channel.exchange_delete("orders")
    assert outcomes.publish_and_wait(created(1)) == "unroutable", (
        "its bindings are gone, so nobody claims that it arrived"
    )
    session.bus.rebuild()
    wait_for(lambda: outcomes.publish_and_wait(created(1)) == "confirmed", NOTICED, "the bindings are back")
    flows(session, outcomes)


def test_a_connection_that_is_cut_is_replaced(rabbit):
    router = Router(rabbit)
    bus = Rabbit(router.url, DELAYS)
    with running(bus, TOPOLOGY) as session:
        outcomes = Outcomes(bus)
        outcomes.publish_and_wait(created(1))
        router.cut(1)  # the publisher's
        wait_for(lambda: not bus.up)
        flows(session, outcomes)
        router.cut(0)  # the consumer's
        wait_for(lambda: router.connections == 4)
        flows(session, outcomes)
    bus.close()
    router.close()


def test_acks_while_the_connection_is_lost_stall_nothing_afterwards(rabbit):
    router = Router(rabbit)
    bus = Rabbit(router.url, DELAYS)
    with running(bus, TOPOLOGY, prefetch=2) as session:
        outcomes = Outcomes(bus)
        for number in (1, 2):
            outcomes.publish_and_wait(created(number))
        before = session.wait(4)[:]
        router.cut(0)  # the consumer's
        wait_for(lambda: router.connections == 3, what="the old one is gone, and the next is being made")
        session.ack(*before)
        for number in range(3, 13):
            outcomes.publish_and_wait(created(number))
        every = {f"event-{number}" for number in range(1, 13)}
        wait_for(lambda: session.ack(*session.arrived) or {each.id for each in session.arrived} == every)
    bus.close()
    router.close()
    assert [length(rabbit, main_queue(name)) for name in TOPOLOGY] == [0, 0]


def test_after_a_cut_only_what_was_not_acked_comes_again(rabbit):
    router, pool, lock, ended = Router(rabbit), ThreadPoolExecutor(8), threading.Lock(), []
    bus, kept = Rabbit(router.url, DELAYS), []

    def handle(delivery) -> None:
        if int(delivery.id.removeprefix("event-")) % 10 == 3:  # in the middle of the others
            return kept.append(delivery)
        time.sleep(random.uniform(0, 0.01))
        delivery.ack()
        with lock:
            ended.append((delivery.handler, delivery.id))

    with pool, running(bus, TOPOLOGY, prefetch=40, deliver=lambda delivery: pool.submit(handle, delivery)):
        outcomes = Outcomes(bus)
        for number in range(200):
            outcomes.publish(created(number))
        wait_for(lambda: len(ended) == 360 and len(kept) == 40)
        wait_for(lambda: consumers(rabbit, main_queue("email")) == 1)  # the broker has dealt with all of it
        time.sleep(0.5)
        router.cut(0)
        wait_for(lambda: len(kept) == 80)
        time.sleep(0.5)
        assert len(ended) == 360, "nothing acked comes again"
        names = sorted((each.handler, each.id) for each in kept)
        assert names[::2] == names[1::2], "each of the others once"
        for delivery in kept:
            delivery.ack()
    bus.close()
    router.close()
    assert [length(rabbit, main_queue(name)) for name in TOPOLOGY] == [0, 0]


def test_a_rebuild_while_it_connects_leaves_one_consumer(rabbit):
    router = Router(rabbit, delay=0.5)
    bus = Rabbit(router.url, DELAYS)
    with running(bus, TOPOLOGY) as session:
        bus.rebuild()
        wait_for(lambda: router.connections == 3)
        time.sleep(0.1)
        bus.rebuild()  # while the next connection is being made
        wait_for(lambda: bus.consuming)
        time.sleep(4)  # longer than a goodbye may take
        assert (router.connections, consumers(rabbit, main_queue("email"))) == (3, 1)
        flows(session, Outcomes(bus))
    bus.close()
    router.close()


def test_many_rebuilds_at_once_make_the_connection_anew_once(rabbit):
    router = Router(rabbit)
    bus = Rabbit(router.url, DELAYS)
    with running(bus, TOPOLOGY) as session:
        for _ in range(100):
            bus.rebuild()
        wait_for(lambda: router.connections == 3)
        session.wait_until_up()
        flows(session, Outcomes(bus))
        assert (router.connections, consumers(rabbit, main_queue("email"))) == (3, 1)
    bus.close()
    router.close()


@pytest.mark.parametrize("delay", [0, 0.3])
def test_a_stop_before_it_is_connected_leaves_no_consumer_behind(rabbit, delay):
    router, stop = Router(rabbit, delay), threading.Event()
    bus, began = Rabbit(router.url, DELAYS), time.monotonic()
    stop.set()
    bus.consume(TOPOLOGY, list(TOPOLOGY), 16, print, stop)
    bus.close()
    assert time.monotonic() - began < 4
    time.sleep(1)
    assert not bus.consuming and consumers(rabbit, main_queue("email")) == 0
    router.close()


@pytest.mark.parametrize("delay", [0, 0.3])
def test_a_publisher_closed_before_it_is_connected_ends_at_once(rabbit, delay):
    router = Router(rabbit, delay)
    bus, began = Rabbit(router.url, DELAYS), time.monotonic()
    bus.start_publishing()
    bus.close()
    assert time.monotonic() - began < 3
    time.sleep(1)
    assert not bus.up
    router.close()


def test_cutting_connections_at_random_loses_no_event_and_no_outcome(rabbit):
    router, pool, handled, lock = Router(rabbit), ThreadPoolExecutor(8), set(), threading.Lock()
    bus = Rabbit(router.url, DELAYS)

    def handle(delivery) -> None:
        time.sleep(random.uniform(0, 0.02))
        if delivery.tries == 0 and random.random() < 0.2:
            return delivery.retry(0.2, 1)
        with lock:
            handled.add((delivery.handler, delivery.id))
        delivery.ack()

    with pool, running(bus, TOPOLOGY, prefetch=20, deliver=lambda delivery: pool.submit(handle, delivery)):
        outcomes, count, until = Outcomes(bus), 0, time.monotonic() + 6
        while time.monotonic() < until:
            for number in range(count, count + 30):
                outcomes.publish(created(number))
            count += 30
            time.sleep(random.uniform(0.1, 0.3))
            if random.random() < 0.3:
                router.cut(random.randrange(router.connections))
            if random.random() < 0.1:
                router.cut_all()
        every = {(name, f"event-{n}") for name in TOPOLOGY for n in range(count)}
        outcomes.wait_until_confirmed(count, 60)
        wait_for(lambda: handled == every, 60, "every handler got every event")
        queues = [queue for name in TOPOLOGY for queue in queues_of(name, DELAYS)]
        wait_for(lambda: all(length(rabbit, queue) == 0 for queue in queues), 30, "nothing is left")
    assert all(each == ["confirmed"] for each in outcomes.by_id.values())
    bus.close()
    router.close()
    assert all(length(rabbit, queue) == 0 for queue in queues), "nor was anything in hand"


def test_a_queue_made_anew_with_another_argument_stops_the_consumer(rabbit, session):
    wait_for(lambda: session.bus.depths, what="the first look")
    with channel_to(rabbit) as channel:
        channel.queue_delete(main_queue("email"))
        channel.queue_declare(main_queue("email"), durable=True)
    wait_for(lambda: not session.running, NOTICED + 5)
    assert isinstance(session.error, TopologyMismatch) and "queue orders.email" in str(session.error)


def test_unroutable_messages_are_told_from_their_neighbours(session, outcomes):
    for number in range(300):
        type = "order_created" if number % 3 else "order_cancelled"  # which nobody here takes
        outcomes.publish(Message(f"{type}-{number}", type, b"{}"))
        outcomes.publish(Message(f"order_created-{number}", "order_created", b"{}", handler="nobody"))
    wait_for(lambda: sum(map(len, outcomes.by_id.values())) == 600)
    expected = {f"order_cancelled-{number}": ["unroutable"] for number in range(0, 300, 3)}
    for number in range(300):
        expected[f"order_created-{number}"] = ["confirmed", "unroutable"] if number % 3 else ["unroutable"]
    assert {id: sorted(each) for id, each in outcomes.by_id.items()} == expected


# --- a broker that dies, freezes, comes late -------------------------------------------------------------------------

own_node = pytest.mark.skipif(not installed("rabbitmq-server"), reason="rabbitmq-server is not installed here")


@pytest.fixture(scope="module")
def started_node(tmp_path_factory):
    node = BrokerNode(tmp_path_factory.mktemp("node"))
    used.add("a second broker, to be killed")
    node.start()
    yield node
    node.kill()


@pytest.fixture
def node(started_node):
    """A broker that tests may kill and freeze; when one ends it runs, without queues."""
    yield started_node
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # nobody says goodbye to a frozen broker
        gc.collect()
    delete_queues(started_node.url(), TOPOLOGY, DELAYS)


class Acking:
    """Acks what arrives, and remembers it."""

    def __init__(self) -> None:
        self.ids: list[tuple[str, str]] = []

    def __call__(self, delivery) -> None:
        self.ids.append((delivery.handler, delivery.id))
        delivery.ack()

    def of(self, handler: str) -> set[str]:
        return {id for name, id in self.ids if name == handler}


@own_node
def test_the_broker_itself_says_that_every_argument_is_as_designed(node):
    bus = Rabbit(node.url(), DELAYS)
    Running(bus, TOPOLOGY).end()
    bus.close()
    rows = json.loads(node.ctl("list_queues", "name", "durable", "arguments", "--formatter=json"))
    for name in TOPOLOGY:
        for queue, arguments in queues_of(name, DELAYS).items():
            [row] = [row for row in rows if row["name"] == queue]
            found = {argument: value for argument, _, value in row["arguments"]}
            assert row["durable"] and found == arguments
    bindings = json.loads(node.ctl("list_bindings", "--formatter=json"))
    bound = {(each["routing_key"], each["destination_name"]) for each in bindings if each["source_name"] == "orders"}
    assert bound == {(type, main_queue(name)) for name, types in TOPOLOGY.items() for type in types}


@own_node
def test_confirmed_events_survive_kill_9_and_the_others_are_resent(node):
    bus, handled, other = Rabbit(node.url(), DELAYS), Acking(), Rabbit(node.url(), DELAYS)
    Running(bus, TOPOLOGY).end()  # the queues are there, nobody consumes
    node.let_queues_settle()
    outcomes = Outcomes(bus)
    for number in range(3000):
        outcomes.publish(created(number))
    wait_for(lambda: outcomes.count("confirmed") > 500)
    node.kill()
    before = outcomes.count("confirmed")
    for number in range(3000, 3200):
        outcomes.publish(created(number))
    assert outcomes.count("confirmed") < 3200, "the kill came in the middle"
    node.start()
    outcomes.wait_until_confirmed(3200, 60)
    assert before > 500 and all(each == ["confirmed"] for each in outcomes.by_id.values())
    with running(other, TOPOLOGY, prefetch=300, deliver=handled):
        every = {f"event-{number}" for number in range(3200)}
        wait_for(lambda: handled.of("email") == handled.of("inventory") == every, 60, "every event arrived")
    bus.close()
    other.close()


@own_node
def test_after_kill_9_consumers_return_and_unacked_deliveries_come_again(node):
    bus = Rabbit(node.url(), DELAYS)
    with running(bus, TOPOLOGY, prefetch=50) as session:
        outcomes = Outcomes(bus)
        outcomes.publish_and_wait(created(1))
        session.wait(2)
        node.let_queues_settle()
        node.kill()
        wait_for(lambda: not bus.up and not bus.consuming)
        node.start()
        session.wait(4, 40)
        assert [each.id for each in session.arrived] == ["event-1"] * 4
        flows(session, outcomes, 20)
    bus.close()


@own_node
def test_kill_9_amid_acks_loses_none_and_repeats_few(node):
    bus, pool, lock, ended = Rabbit(node.url(), DELAYS), ThreadPoolExecutor(8), threading.Lock(), []

    def handle(delivery) -> None:
        time.sleep(random.uniform(0, 0.02))
        delivery.ack()
        with lock:
            ended.append((time.monotonic(), delivery.handler, delivery.id))

    with pool, running(bus, TOPOLOGY, prefetch=20, deliver=lambda delivery: pool.submit(handle, delivery)):
        outcomes = Outcomes(bus)
        node.let_queues_settle()
        for number in range(1500):
            outcomes.publish(created(number))
        wait_for(lambda: len(ended) > 1500)
        node.kill()
        killed = time.monotonic()
        wait_for(lambda: not bus.consuming)
        node.start()
        outcomes.wait_until_confirmed(1500, 60)
        every = {(name, f"event-{number}") for name in TOPOLOGY for number in range(1500)}
        wait_for(lambda: {(handler, id) for _, handler, id in ended} == every, 60, "every event was handled")
    bus.close()
    acked_long_before = {(handler, id) for at, handler, id in ended if at < killed - 1}
    assert len(acked_long_before) > 100
    assert not acked_long_before & {(handler, id) for at, handler, id in ended if at > killed}, "acked, and came again"


@own_node
def test_a_broker_frozen_for_20_seconds_blocks_and_loses_nothing(node):
    bus, handled, longest = Rabbit(node.url(), DELAYS), Acking(), 0.0
    with running(bus, TOPOLOGY, deliver=handled) as session:
        outcomes = Outcomes(bus)
        node.freeze()
        until, number = time.monotonic() + 20, 0
        while time.monotonic() < until:  # somebody takes orders all the while
            began = time.monotonic()
            outcomes.publish(created(number))
            longest = max(longest, time.monotonic() - began)
            number += 1
            session.stop.wait(0.05)
        node.thaw()
        outcomes.wait_until_confirmed(number, 45)
        every = {f"event-{n}" for n in range(number)}
        wait_for(lambda: handled.of("email") == handled.of("inventory") == every, 30, "everything arrived")
    assert longest < 0.5, "publish never blocks"
    assert all(len(each) == 1 for each in outcomes.by_id.values())
    bus.close()


@own_node
def test_a_missing_confirm_ends_the_connection_and_resends_the_event(node, monkeypatch):
    monkeypatch.setattr(publisher, "CONFIRM_WITHIN", 1.0)
    bus = Rabbit(node.url(), DELAYS)
    with running(bus, TOPOLOGY) as session:
        outcomes = Outcomes(bus)
        node.freeze()
        outcomes.publish(created(1))
        began = time.monotonic()
        wait_for(lambda: not bus.up, 8, "the deadline passed and the publisher hung up")
        assert time.monotonic() - began > 1
        assert outcomes.by_id == {}, "nobody knows yet"
        node.thaw()
        wait_for(lambda: outcomes.by_id["event-1"] == ["confirmed"], 30)
        session.wait(2, 30)
    bus.close()


@own_node
def test_a_broker_that_comes_late_is_found_and_gets_everything(tmp_path):
    node, handled = BrokerNode(tmp_path), Acking()
    bus = Rabbit(node.url(), DELAYS)
    session = Running(bus, TOPOLOGY, deliver=handled, wait=False)
    bus.start_publishing()
    outcomes = Outcomes(bus)
    for number in range(20):
        outcomes.publish(created(number))
    assert not bus.up and not bus.consuming
    try:
        node.start()
        session.wait_until_up(30)
        wait_for(lambda: len(outcomes.by_id) == 20)
        for id, each in list(outcomes.by_id.items()):  # sent before there were queues: they come back, and wait
            if each == ["unroutable"]:
                outcomes.publish(Message(id, "order_created", b"{}"))
        wait_for(lambda: len(handled.of("email")) == len(handled.of("inventory")) == 20)
        session.end()
        bus.close()
    finally:
        node.kill()


@own_node
def test_an_alarm_that_blocks_publishing_spares_acks_and_loses_nothing(node):
    bus = Rabbit(node.url(), DELAYS)
    with running(bus, TOPOLOGY, prefetch=5) as session:
        outcomes = Outcomes(bus)
        for number in range(20):
            outcomes.publish_and_wait(created(number))
        node.ctl("set_vm_memory_high_watermark", "0.0001")
        try:
            for number in range(20, 40):
                outcomes.publish(created(number))
            session.wait(10)
            wait_for(lambda: session.ack(*session.arrived) or len(session.arrived) >= 40, 10, "acks go through")
            assert outcomes.count("confirmed") < 40 and bus.consuming
        finally:
            node.ctl("set_vm_memory_high_watermark", "0.4")
        wait_for(lambda: outcomes.count("confirmed") == 40, 40)
        every = {(name, f"event-{number}") for name in TOPOLOGY for number in range(40)}
        wait_for(lambda: session.ack(*session.arrived) or {(e.handler, e.id) for e in session.arrived} == every, 30)
    assert all(each == ["confirmed"] for each in outcomes.by_id.values())
    bus.close()


@own_node
def test_what_a_full_queue_refuses_is_unsent_and_forwarded_later(node, monkeypatch):
    monkeypatch.setattr("core.bus.rabbit.FORWARD_AGAIN", 0.3)
    bus, url, seen = Rabbit(node.url(), DELAYS), node.url(), []
    with running(bus, TOPOLOGY) as session:
        Outcomes(bus).publish_and_wait(created(1))
        [delivery] = [each for each in session.wait(2) if each.handler == "email"]
        full = '{"max-length": 1, "overflow": "reject-publish"}'
        node.ctl("set_policy", "full", r"^orders\.email\.dead$", full, "--apply-to", "queues")
        letter = Letter("", dead_queue("email"), "x", "", b"{}", [seen.append])
        wait_for(lambda: "unsent" in seen or bus.publisher.publish(replace(letter, done=[seen.append])))
        there = length(url, dead_queue("email"))
        delivery.park("LookupError('x')", 4)
        time.sleep(1)
        assert there > 0 and length(url, dead_queue("email")) == there
        DeadLetters(url, "email").purge()
        wait_for(lambda: length(url, dead_queue("email")) == 1, what="it is sent again, now that there is room")
        session.ack(*[each for each in session.arrived if each is not delivery])
    bus.close()
    node.ctl("clear_policy", "full")  # before there is room RabbitMQ 3.10 would go on refusing
    assert length(url, main_queue("email")) == 0, "and only then was it acked"
    [(body, headers)] = parked(url)
    assert (body, headers["error"], headers["tries"]) == (b'{"n": 1}', "LookupError('x')", 4)


@pytest.mark.parametrize("kind", ["refuses", "closes", "is silent"])
def test_a_name_whose_first_address_is_dead_is_reached_at_the_next(rabbit, kind, monkeypatch):
    router, dead = Router(rabbit), "127.0.0.9"
    port = urlsplit(router.url).port
    find = socket.getaddrinfo

    def both(host, *args, **named):  # stands for a name with two addresses
        hosts = [dead, "127.0.0.1"] if host == "127.0.0.1" else [host]
        return [entry for each in hosts for entry in find(each, *args, **named)]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    monkeypatch.setattr(link, "HANDSHAKE_WITHIN", 1)
    with contextlib.ExitStack() as at_end:
        at_end.callback(router.close)
        if kind != "refuses":
            listener = at_end.enter_context(socket.create_server((dead, port)))
            threading.Thread(target=answer, args=(listener, kind == "closes"), daemon=True).start()
        session = Running(Rabbit(router.url, DELAYS), TOPOLOGY)
        assert session.bus.up and session.bus.consuming
        session.end()
        session.bus.close()


def answer(listener, hang_up: bool) -> None:
    """Take connections, and say nothing."""
    held = []
    with contextlib.suppress(OSError):
        while True:
            held.append(listener.accept()[0])
            if hang_up:
                held.pop().close()


@own_node
def test_a_message_held_too_long_costs_only_the_connection(node):
    node.ctl("eval", "application:set_env(rabbit, consumer_timeout, 1000).")
    node.ctl("eval", "application:set_env(rabbit, channel_tick_interval, 1000).")
    bus = Rabbit(node.url(), DELAYS)
    try:
        with running(bus, TOPOLOGY) as session:
            outcomes = Outcomes(bus)
            outcomes.publish_and_wait(created(1))
            session.wait(4, 30)
            assert session.running and session.error is None
            session.wait_until_up(40)
            node.ctl("eval", "application:unset_env(rabbit, consumer_timeout).")
            flows(session, outcomes)
    finally:
        node.ctl("eval", "application:unset_env(rabbit, consumer_timeout).")
        node.ctl("eval", "application:set_env(rabbit, channel_tick_interval, 60000).")
    bus.close()


@own_node
def test_a_retry_is_acked_once_the_broker_has_it(node):
    bus = Rabbit(node.url(), DELAYS)
    with running(bus, TOPOLOGY) as session:
        outcomes = Outcomes(bus)
        outcomes.publish_and_wait(created(1))
        session.wait(2)
        [delivery] = [each for each in session.arrived if each.handler == "email"]
        node.let_queues_settle()
        node.freeze()
        delivery.retry(0.2, 1)
        time.sleep(0.5)
        node.kill()  # it never saw the copy
        node.start()
        wait_for(lambda: len([each for each in session.arrived if each.handler == "email"]) > 1, 60, "it comes again")
        session.wait_until_up(40)
        flows(session, outcomes)
    bus.close()


# --- messages that are hard to send or to take -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "unsendable",
    [
        Letter("orders", "x" * 300, "unsendable", "order_created", b"{}"),
        Letter("orders", "order_created", "x" * 300, "order_created", b"{}"),
        Letter("orders", "order_created", "unsendable", "order_created", b"{}", headers={"tries": {1, 2}}),
        Letter("orders", "order_created", "unsendable", "order_created", b"{}", headers={"error": "\ud800"}),
    ],
    ids=["routing key too long", "id too long", "header of no known type", "header that is no text"],
)
def test_an_unsendable_message_is_unsent_and_stops_no_other(session, outcomes, unsendable):
    seen = []
    unsendable.done = [seen.append]
    outcomes.publish(created(1))
    session.bus.publisher.publish(unsendable)
    wait_for(lambda: seen)
    assert outcomes.publish_and_wait(created(2)) == "confirmed"
    assert seen == ["unsent"]
    session.wait(4)


def test_ten_thousand_messages_go_through_the_window(bus, capsys):
    handled = Acking()
    with running(bus, TOPOLOGY, prefetch=200, deliver=handled):
        outcomes, began = Outcomes(bus), time.monotonic()
        for number in range(10_000):
            outcomes.publish(created(number))
        outcomes.wait_until_confirmed(10_000, 60)
        published = time.monotonic() - began
        wait_for(lambda: len(handled.of("email")) == len(handled.of("inventory")) == 10_000, 60)
        consumed = time.monotonic() - began
    assert all(each == ["confirmed"] for each in outcomes.by_id.values())
    with capsys.disabled():
        print(f" [{10_000 / published:,.0f} confirmed/s into 2 queues, {20_000 / consumed:,.0f} delivered/s] ", end="")


def test_the_broker_parks_a_message_crashing_its_consumer_21_times(rabbit, session, outcomes):
    session.ack_all_and_end()
    put(rabbit, main_queue("email"), b'{"crash": "me"}', message_id="crasher", delivery_mode=2)
    for _ in range(21):
        with channel_to(rabbit) as channel:
            wait_for(lambda channel=channel: channel.basic_get(main_queue("email"))[0])  # and dies
    wait_for(lambda: length(rabbit, dead_queue("email")) == 1)
    [(body, headers)] = DeadLetters(rabbit, "email").show()
    assert body == b'{"crash": "me"}'
    assert headers["error"] == "delivery_limit" and headers["time"]


def test_it_knows_how_long_the_queues_are_that_others_consume(bus, monkeypatch):
    monkeypatch.setattr("core.bus.rabbit.LOOK_EVERY", 0.1)
    with running(bus, TOPOLOGY, ["inventory"]):
        Outcomes(bus).publish_and_wait(created(1))
        wait_for(lambda: bus.depths.get("email") == 1)


# --- a whole consumer ------------------------------------------------------------------------------------------------

GOOD = "def order_created(event, services): pass"
BROKEN = """
from pathlib import Path
def order_created(event, services):
    if not Path({flag!r}).exists():
        raise LookupError("no such thing")
"""


@pytest.fixture
def consume(rabbit, tmp_path):
    """Starts a consumer with these handlers."""
    started = []

    def start(database=None, delays="0.2,0.3", query="", **handlers) -> Consumer:
        folder = write_handlers(tmp_path / "handlers", **handlers)
        url = rabbit + ("&" if "?" in rabbit else "?") + query
        bus = Rabbit(url, [float(delay) for delay in delays.split(",") if delay])
        started.append(Consumer(bus, folder, delays, database, url))
        return started[-1]

    yield start
    for each in started:
        each.end()


def parked(url: str, handler: str = "email") -> list[tuple[bytes, dict]]:
    return DeadLetters(url, handler).show()


def test_poison_is_parked_at_once_with_its_error_hindering_nobody(rabbit, consume):
    consumer = consume(email=GOOD)
    consumer.end()
    order = place(consumer.store)
    valid = {**order["events"][0], "data": {"order": consumer.order(order["_id"])}}
    valid["data"]["order"].pop("timeline")
    nobodys = "01939e5a-0000-7000-8000-0000000000ff"
    poison = [
        b"\xff\xfenot even text", b"{", b"[]", b"null", b"",
        json.dumps({**valid, "type": "order_exploded"}).encode(),
        json.dumps({**valid, "type": ["order_created"]}).encode(),
        json.dumps({**valid, "data": {}}).encode(),
        json.dumps({**valid, "id": "not-a-uuid"}).encode(),
        json.dumps({**valid, "subject": nobodys}).encode(),
        b'{"type": "\\ud800"}', b"[" * 100_000, b"x" * 1_000_000,
    ]  # fmt: skip
    put(rabbit, main_queue("email"), *poison)  # all are in hand at once, and none has an id
    consumer = consume(consumer.database, email=GOOD)
    id = consumer.place()
    wait_for(lambda: {"done": "order_created", "by": "email"} in consumer.timeline(id))
    wait_for(lambda: length(rabbit, dead_queue("email")) == len(poison), 10, "all poison is parked")
    found = parked(rabbit)
    assert sorted(body for body, _ in found) == sorted(poison), "as it came"
    assert all(headers["error"] and headers["time"].endswith("Z") for _, headers in found)
    # An order that is not there may be one that a store does not know yet, so that one was tried again.
    assert {body: headers["tries"] for body, headers in found} == {body: 1 for body in poison} | {poison[9]: 3}
    errors = {body: headers["error"] for body, headers in found}
    assert "no order" in errors[poison[9]] and nobodys in errors[poison[9]]
    assert "order_exploded" in errors[poison[5]]


def test_a_raising_handler_alone_is_retried_after_delays_then_parked(
    rabbit, consume, tmp_path
):  # fmt: skip
    flag = tmp_path / "fixed"
    consumer = consume(email=BROKEN.format(flag=str(flag)), inventory=GOOD)
    id = consumer.place()
    wait_for(lambda: consumer.order(id).get("parked") == ["email"])
    wait_for(lambda: length(rabbit, dead_queue("email")) == 1)

    def steps() -> list[dict]:
        return [line for line in consumer.timeline(id) if line.get("by") == "email"]

    failed = {"failed": "order_created", "by": "email", "error": "LookupError"}
    last = {"parked": "order_created", "by": "email", "error": "LookupError", "try": 3}
    assert steps() == [{**failed, "try": 1}, {**failed, "try": 2}, last]
    assert_waited(consumer, id, [0.2, 0.3])
    [(_, headers)] = parked(rabbit)
    assert headers["error"] == "LookupError('no such thing')" and headers["tries"] == 3
    other = [line for line in consumer.timeline(id) if line.get("by") == "inventory"]
    assert other == [{"done": "order_created", "by": "inventory"}], "once, and with no error"

    listed = run_command("dead", AMQP_URL=rabbit, HANDLERS_DIR=str(tmp_path / "handlers"), RETRY_DELAYS="0.2,0.3")
    assert id in listed.stdout and "LookupError" in listed.stdout

    flag.touch()
    assert [*DeadLetters(rabbit, "email").redrive(10)] == [1]
    wait_for(lambda: "parked" not in consumer.order(id))
    assert steps() == [{**failed, "try": 1}, {**failed, "try": 2}, last, {"done": "order_created", "by": "email"}]
    assert parked(rabbit) == []


def assert_waited(consumer: Consumer, id: str, delays: list[float]) -> None:
    document = consumer.orders.get(id)
    tries = [line["at"] for line in document["timeline"] if "failed" in line or "parked" in line]
    for (before, after), delay in zip(pairwise(tries), delays, strict=True):
        assert delay <= (after - before).total_seconds() < delay + 1.5


def test_a_handler_outlasting_the_heartbeat_runs_once_and_stays_connected(consume, tmp_path, caplog):
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    slow = f"""
import time
def order_created(event, services):
    with open({str(begun)!r}, "a") as begun, open({str(ended)!r}, "a") as ended:
        print("once", file=begun, flush=True)
        time.sleep(10)
        print("once", file=ended, flush=True)
"""
    consumer = consume(query="heartbeat=4", email=slow)
    id = consumer.place()
    wait_for(lambda: consumer.timeline(id)[-1] == {"done": "order_created", "by": "email"})
    consumer.end()
    assert begun.read_text() == ended.read_text() == "once\n"
    assert "lost the broker" not in caplog.text


def test_without_retry_delays_it_is_parked_at_the_first_try(rabbit, consume, tmp_path):
    consumer = consume(delays="", email=BROKEN.format(flag=str(tmp_path / "never")))
    id = consumer.place()
    wait_for(lambda: length(rabbit, dead_queue("email")) == 1)
    assert [line.get("try") for line in consumer.timeline(id)] == [None, 1]


def test_a_vanished_retry_queue_costs_a_redelivery_not_the_event(rabbit, consume, tmp_path):
    flag = tmp_path / "fixed"
    consumer = consume(delays="0.2", email=BROKEN.format(flag=str(flag)))
    with channel_to(rabbit) as channel:
        channel.queue_delete(retry_queue("email", 0.2))
    id = consumer.place()
    wait_for(lambda: consumer.order(id).get("parked"), 20, "tried twice and parked")
    wait_for(lambda: exists(rabbit, retry_queue("email", 0.2)))


def test_a_redriven_message_starts_without_tries_or_broker_headers(rabbit, consume):
    consumer = consume(email=GOOD)
    consumer.end()
    put(rabbit, dead_queue("email"), b"{}", message_id="m", headers={"tries": 4, "x-death": [], "error": "e"})
    assert [*DeadLetters(rabbit, "email").redrive(10)] == [1]
    with channel_to(rabbit) as channel:
        _, properties, body = channel.basic_get(main_queue("email"))
    assert (properties.message_id, properties.delivery_mode, body) == ("m", 2, b"{}")
    assert set(properties.headers or {}) <= {"x-delivery-count"}


def test_a_redrive_whose_queue_is_gone_takes_nothing_away(rabbit, consume):
    consume(email=GOOD).end()
    put(rabbit, dead_queue("email"), b"{}", message_id="m")
    with channel_to(rabbit) as channel:
        channel.queue_delete(main_queue("email"))
    with pytest.raises(Exception, match=r"email|RabbitMQ"):
        list(DeadLetters(rabbit, "email").redrive(10))
    wait_for(lambda: length(rabbit, dead_queue("email")) == 1)


def test_messages_wait_for_an_absent_store_without_spending_a_try(
    consume, own_store_server
):  # fmt: skip
    consumer = consume(connect(own_store_server.url("orderproc")), email=GOOD)
    document = place(consumer.store)
    id = document["_id"]
    own_store_server.stop()
    wait_for(lambda: not consumer.store.ping())
    Outbox(consumer.store, consumer.bus).publish_pending(document)
    threading.Event().wait(2)
    own_store_server.start()
    done = {"done": "order_created", "by": "email"}
    wait_for(lambda: done in consumer.timeline(id), 20, "it goes on by itself")
    assert consumer.timeline(id) == [{"event": "order_created", "by": "api"}, done]


# --- a consumer as a process -----------------------------------------------------------------------------------------

READY = 200, '{"ready": true, "store": "up", "broker": "up"}'
SLOW = """
import time
from pathlib import Path
def order_created(event, services):
    Path({folder!r}, event.subject + ".begun").touch()
    time.sleep({seconds})
    Path({folder!r}, event.subject + ".ended").touch()
"""


@pytest.fixture
def process(rabbit, tmp_path, store_server):
    """Starts `python consumer.py` on the broker and a store of its own; `.store` is that store."""
    started, bus, name = [], Rabbit(rabbit, DELAYS), f"p{free_port()}"
    url = store_server.url(name)

    def start(**handlers) -> Process:
        folder = write_handlers(tmp_path / "handlers", **handlers)
        environment = {"MONGODB_URL": url, "AMQP_URL": rabbit, "RETRY_DELAYS": "0.2,0.3"}
        environment |= {"HANDLERS_DIR": str(folder), "CONCURRENCY": "2", "METRICS_PORT": str(start.health)}
        started.append(Process(tmp_path, **environment))
        wait_for(lambda: get(start.health, "readyz") == READY, what="the consumer is ready")
        bus.start_publishing()
        return started[-1]

    start.bus, start.store, start.folder, start.health = bus, Store(connect(url)), tmp_path, free_port()
    yield start
    for each in started:
        each.kill()
    bus.close()


def test_sigterm_finishes_only_the_work_in_hand_and_exits_0(rabbit, process):
    consumer = process(email=SLOW.format(folder=str(process.folder), seconds=2))
    ids = [place(process.store, process.bus)["_id"] for _ in range(5)]
    begun = wait_for(lambda: len(found := list(process.folder.glob("*.begun"))) == 2 and found)
    assert consumer.terminate() == 0, consumer.log()
    assert len(list(process.folder.glob("*.begun"))) == len(list(process.folder.glob("*.ended"))) == 2
    finished = {path.stem for path in begun}
    for id in ids:
        assert (len(process.store.orders.get(id)["steps"]) == 1) == (id in finished), (
            "in hand: done; the others: untouched"
        )
    wait_for(lambda: length(rabbit, main_queue("email")) == 3, what="the others wait in the queue")
    assert "Traceback" not in consumer.log()


def test_a_consumer_tells_its_readiness_and_how_much_is_parked(rabbit, process):
    consumer = process(email=GOOD)
    put(rabbit, main_queue("email"), b"poison")
    gauge = 'orderproc_dead_messages{handler="email"} 1.0'
    wait_for(lambda: get(process.health, "readyz") == READY and gauge in get(process.health, "metrics")[1], 15)
    assert consumer.terminate() == 0


def get(port: int, path: str) -> tuple[int, str] | None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError:
        return None


def test_sigterm_does_not_wait_forever_for_a_hanging_handler(rabbit, process):
    consumer = process(email=SLOW.format(folder=str(process.folder), seconds=60))
    place(process.store, process.bus)
    wait_for(lambda: list(process.folder.glob("*.begun")))
    assert consumer.terminate() == 0, consumer.log()
    wait_for(lambda: length(rabbit, main_queue("email")) == 1, what="its message is back")


@own_node
def test_sigterm_ends_a_consumer_even_while_the_broker_is_frozen(node, tmp_path):
    folder = write_handlers(tmp_path / "handlers", email=GOOD)
    store = f"mongodb://127.0.0.1:{free_port()}/x"
    consumer = Process(tmp_path, MONGODB_URL=store, AMQP_URL=node.url(), HANDLERS_DIR=str(folder), RETRY_DELAYS="0.2")
    try:
        wait_for(lambda: exists(node.url(), main_queue("email")))
        node.freeze()
        assert consumer.terminate() == 0, consumer.log()
    finally:
        node.thaw()
        consumer.kill()


def test_kill_9_in_the_middle_of_a_handler_loses_nothing(process):
    consumer = process(email=SLOW.format(folder=str(process.folder), seconds=1))
    id = place(process.store, process.bus)["_id"]
    wait_for(lambda: list(process.folder.glob("*.begun")))
    consumer.kill()
    process(email=SLOW.format(folder=str(process.folder), seconds=0))
    wait_for(lambda: process.store.orders.get(id)["steps"], what="the next process does it")
    assert len(process.store.orders.get(id)["steps"]) == 1


def test_a_consumer_waits_for_absent_servers_and_ends_on_sigterm(tmp_path):
    urls = {"MONGODB_URL": f"mongodb://127.0.0.1:{free_port()}/x", "AMQP_URL": f"amqp://127.0.0.1:{free_port()}"}
    consumer = Process(tmp_path, **urls)
    try:
        wait_for(lambda: "lost the broker" in consumer.log())
        assert consumer.terminate() == 0
        assert "Traceback" not in consumer.log()
    finally:
        consumer.kill()
