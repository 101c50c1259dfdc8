"""A delivery of RabbitMQ, without a broker: the copy first, and the ack only once the broker has confirmed it."""

import re
from types import SimpleNamespace

import pytest

from core.bus.publisher import Letter
from core.bus.rabbit import Rabbit, RabbitDelivery
from tools.chaos.system import wait_for

VERBS = {
    "retry": (lambda delivery: delivery.retry(1.0, 1), "orders.email.retry.1"),
    "park": (lambda delivery: delivery.park("LookupError()", 3), "orders.email.dead"),
}


class Broker:
    """In place of a `Rabbit` and its publisher: remembers letters, and reports the `outcome` of each; None: not yet."""

    def __init__(self, outcome: str | None = "confirmed") -> None:
        self.publisher, self.outcome, self.rebuilt = self, outcome, 0
        self.letters: list[Letter] = []

    def publish(self, letter: Letter) -> None:
        self.letters.append(letter)
        if self.outcome:
            self.report(self.outcome)

    def report(self, outcome: str) -> None:
        for done in self.letters[-1].done:
            done(outcome)

    def rebuild(self) -> None:
        self.rebuilt += 1


def a_delivery(broker: Broker) -> tuple[RabbitDelivery, list[str]]:
    """A delivery, and a list that shows its ack."""
    acks: list[str] = []
    return RabbitDelivery(broker, "email", "m-1", b"body", 0, lambda: acks.append("acked"), broker.rebuild), acks


@pytest.mark.parametrize(("seconds", "queue"), [(1.0, "1"), (0.5, "0.5"), (15.0, "15"), (900.0, "900")])
def test_a_retry_waits_in_the_queue_of_its_delay(seconds, queue):
    broker = Broker()
    delivery, acks = a_delivery(broker)
    delivery.retry(seconds, 2)
    [letter] = broker.letters
    assert (letter.exchange, letter.routing_key, letter.headers) == ("", f"orders.email.retry.{queue}", {"tries": 2})
    assert (letter.id, letter.body, letter.mandatory, acks) == ("m-1", b"body", True, ["acked"])


def test_a_parked_message_has_its_error_tries_and_time():
    broker = Broker()
    delivery, acks = a_delivery(broker)
    delivery.park("LookupError()", 3)
    [letter] = broker.letters
    assert (letter.exchange, letter.routing_key) == ("", "orders.email.dead")
    assert set(letter.headers) == {"error", "tries", "time"}
    assert (letter.headers["error"], letter.headers["tries"]) == ("LookupError()", 3)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", letter.headers["time"])
    assert (letter.id, letter.body, letter.mandatory, acks) == ("m-1", b"body", True, ["acked"])


@pytest.mark.parametrize("verb", VERBS)
def test_a_message_is_acked_only_once_its_copy_is_confirmed(verb):
    broker = Broker(outcome=None)
    delivery, acks = a_delivery(broker)
    forward, queue = VERBS[verb]
    forward(delivery)
    assert [letter.routing_key for letter in broker.letters] == [queue] and acks == []
    broker.report("confirmed")
    assert acks == ["acked"] and broker.rebuilt == 0


@pytest.mark.parametrize("verb", VERBS)
def test_an_unroutable_copy_releases_its_message_and_declares_queues_anew(verb):
    broker = Broker("unroutable")
    delivery, acks = a_delivery(broker)
    VERBS[verb][0](delivery)
    assert (broker.rebuilt, acks, len(broker.letters)) == (1, [], 1), "the message comes again when the connection ends"


@pytest.mark.parametrize("verb", VERBS)
def test_a_message_whose_copy_failed_is_kept_and_copied_again(verb, monkeypatch):
    monkeypatch.setattr("core.bus.rabbit.FORWARD_AGAIN", 0.01)
    broker = Broker("unsent")
    delivery, acks = a_delivery(broker)
    VERBS[verb][0](delivery)
    wait_for(lambda: len(broker.letters) > 2)
    assert acks == []
    assert len({(letter.routing_key, letter.id, letter.body, str(letter.headers)) for letter in broker.letters}) == 1
    broker.outcome = "confirmed"
    wait_for(lambda: acks == ["acked"])
    assert broker.rebuilt == 0


def test_a_released_message_is_not_acked_and_queues_are_redeclared():
    broker = Broker()
    delivery, acks = a_delivery(broker)
    delivery.release()
    assert (broker.rebuilt, broker.letters, acks) == (1, [], [])


# --- acks on their way to the broker


class Channel:
    """As of pika: remembers the acks, and takes whatever else it is asked for."""

    is_open = True

    def __init__(self) -> None:
        self.acks: list[tuple[int, bool]] = []

    def __getattr__(self, name: str):
        return lambda *args, **more: None

    def basic_ack(self, tag: int, multiple: bool) -> None:
        self.acks.append((tag, multiple))


class Session:
    """A `Rabbit` whose connections are made and lost by hand. Acks go out with `run`, as on its loop."""

    def __init__(self, monkeypatch) -> None:
        self.rabbit, self.calls, self.arrived = Rabbit("amqp://unused", [1.0]), [], []
        self.rabbit._stop = SimpleNamespace(is_set=lambda: False)
        self.rabbit._prefetch, self.rabbit._subscriptions = 16, {}
        self.rabbit._deliver = self.arrived.append
        self.connected = False
        monkeypatch.setattr(self.rabbit, "call", self.call)
        self.connect()

    def call(self, function, *args) -> None:
        """As a closed loop, which takes a call and never makes it."""
        if self.connected:
            self.calls.append(lambda: function(*args))

    def connect(self) -> None:
        self.channel, self.connected = Channel(), True
        self.rabbit.channel = self.channel
        self.rabbit.on_channel()

    def lose(self) -> None:
        """The connection is gone, and all it had to do."""
        self.connected, self.calls = False, []
        self.rabbit.channel = None

    def deliver(self, *tags: int) -> list[RabbitDelivery]:
        for tag in tags:
            props = SimpleNamespace(headers=None, message_id=f"m-{tag}")
            self.rabbit._on_message("email", self.channel, SimpleNamespace(delivery_tag=tag), props, b"body")
        return self.arrived[-len(tags) :]

    def run(self) -> list[tuple[int, bool]]:
        """Make what calls there are; gives all acks of this connection: (tag, multiple)."""
        calls, self.calls = self.calls, []
        for call in calls:
            call()
        return self.channel.acks


@pytest.fixture
def session(monkeypatch):
    return Session(monkeypatch)


def test_acks_below_the_oldest_message_in_hand_go_together(session):
    deliveries = session.deliver(1, 2, 3, 4, 5)
    for position in (0, 1, 2, 4):
        deliveries[position].ack()
    assert session.run() == [(5, False), (3, True)]
    deliveries[3].ack()
    assert session.run()[2:] == [(4, True)]


def test_an_ack_is_not_sent_on_the_next_connection(session):
    [old] = session.deliver(1)
    session.lose()
    session.connect()
    [new] = session.deliver(1)
    old.ack()
    assert session.run() == [], "the tag is another message's now"
    new.ack()
    assert session.run() == [(1, True)]


def test_an_ack_between_two_connections_holds_up_no_later_ack(session):
    [old] = session.deliver(7)
    session.lose()
    old.ack()
    session.connect()
    one, _ = session.deliver(1, 2)
    one.ack()
    assert session.run() == [(1, True)]
