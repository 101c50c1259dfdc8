"""One delivery after another, driven by hand: what a worker makes of each, and when it lets go of the message."""

import asyncio
import contextlib
import threading
import uuid
from datetime import date
from decimal import Decimal
from typing import get_args

import pytest
from prometheus_client import REGISTRY

from core.base.settings import ROOT
from core.bus.memory import MemoryBus
from core.order.events import Event, parse
from core.order.state_machine import Outcome, unfinished_steps
from core.order.view import view
from core.running.discovery import discover
from core.store.connection import DocumentRefused, StoreUnavailable
from tests.support.buses import FakeBus, running
from tests.support.consumer import Desk, HandDelivery
from tests.support.samples import LABEL, an_order, api_event, place
from tools.chaos.system import wait_for


@pytest.fixture
def outcomes():
    """How many deliveries of the handler `email` ended how, since the test began."""

    def read() -> dict[str, float]:
        named = get_args(Outcome)
        labels = [{"handler": "email", "outcome": outcome} for outcome in named]
        found = [REGISTRY.get_sample_value("orderproc_deliveries_total", each) or 0 for each in labels]
        return dict(zip(named, found, strict=True))

    before = read()
    return lambda: {name: count - before[name] for name, count in read().items() if count > before[name]}


def fails(event, services):
    raise LookupError("no such thing")


def reserve(event, services):
    return Event("inventory_reserved")


def created(does=lambda event, services: None):
    return {"order_created": does}


def end_of(delivery: HandDelivery) -> tuple:
    """Its one end, waited for: the verb and its arguments."""
    wait_for(lambda: delivery.ends, 10, "the delivery ended")
    [end] = delivery.ends
    return end


# --- how a delivery ends ---------------------------------------------------------------------------------------------


def test_done_the_step_is_recorded_before_the_ack(outcomes):
    desk = Desk(email=created())
    id, body = desk.place()
    recorded = []
    delivery = HandDelivery("email", "m", body)
    delivery.ack = lambda: recorded.append(len(desk.orders.get(id)["steps"]))
    desk.worker.deliver(delivery)
    wait_for(lambda: outcomes() == {"done": 1})
    assert recorded == [1] and delivery.ends == []
    assert desk.lines(id) == [{"done": "order_created"}]
    assert desk.bus.sent == []


def test_done_the_answer_is_recorded_and_published(outcomes):
    desk = Desk(inventory=created(lambda event, services: Event("inventory_reserved")), email=created())
    id, body = desk.place()
    assert desk.handle("inventory", body) == "ack"
    [message] = desk.bus.sent
    answer = parse(message.body)
    assert (answer.type, answer.source, answer.subject) == ("inventory_reserved", "/orderproc/handlers/inventory", id)
    assert desk.lines(id, "inventory") == [{"event": "inventory_reserved"}]
    assert desk.orders.get(id)["events"][1]["id"] == message.id
    assert answer.trace == parse(body).trace


def test_already_a_second_delivery_does_not_run_the_handler_again(outcomes):
    ran = []
    desk = Desk(email=created(lambda event, services: ran.append(event.id)))
    id, body = desk.place()
    assert [desk.handle("email", body), desk.handle("email", body)] == ["ack", "ack"]
    wait_for(lambda: outcomes() == {"done": 1, "already": 1})
    assert len(ran) == 1 and desk.lines(id) == [{"done": "order_created"}]


def test_already_of_two_simultaneous_deliveries_one_counts_and_takes_stock():
    both = threading.Barrier(2)

    def take(event, services):
        short = services.stock.take(event.order["items"])
        both.wait(10)
        return Event("order_failed", reason="out_of_stock") if short else Event("inventory_reserved")

    desk = Desk(inventory=created(take))
    id, body = desk.place()
    first, second = desk.give("inventory", body), desk.give("inventory", body)
    wait_for(lambda: first.ends and second.ends)
    assert first.ends == second.ends == [("ack",)]
    wait_for(lambda: desk.available() == 8 and not desk.pending_moves(), what="one take committed, one rolled back")
    assert len(desk.orders.get(id)["steps"]) == 1 and len(desk.orders.get(id)["events"]) == 2
    assert len({message.id for message in desk.bus.sent}) == 1


def test_a_handler_that_hangs_takes_no_other_handlers_threads():
    hang, ran = threading.Event(), []
    desk = Desk(
        stuck=created(lambda event, services: hang.wait(20) and None),
        email=created(lambda event, services: ran.append(1)),
    )
    orders = [desk.place()[1] for _ in range(20)]  # more than CONCURRENCY
    held = [desk.give("stuck", body) for body in [*orders, *orders]]  # as after a reconnect
    assert [desk.handle("email", body) for body in orders] == ["ack"] * 20 and len(ran) == 20
    assert not any(delivery.ends for delivery in held)
    hang.set()
    wait_for(lambda: all(delivery.ends for delivery in held), 20)


def test_skipped_an_order_that_was_cancelled_before_runs_no_handler(outcomes):
    ran = []
    desk = Desk(email=created(lambda event, services: ran.append(event)))
    id, body = desk.place()
    desk.cancel(id)
    assert desk.handle("email", body) == "ack"
    wait_for(lambda: outcomes() == {"skipped": 1})
    assert ran == [] and desk.lines(id) == []


def test_lost_takes_for_an_order_cancelled_meanwhile_are_rolled_back(outcomes):
    def take(event, services):
        assert services.stock.take(event.order["items"]) == {}
        desk.cancel(event.subject)
        return Event("inventory_reserved")

    desk = Desk(email=created(take))
    id, body = desk.place()
    assert desk.handle("email", body) == "ack"
    wait_for(lambda: outcomes() == {"lost": 1})
    assert desk.available() == 10 and desk.pending_moves() == []
    assert desk.orders.get(id)["status"] == "cancelled" and desk.orders.get(id)["steps"] == []
    assert desk.bus.sent == [], "only recorded events are published"


def test_retried_both_delivery_and_order_show_the_try(outcomes):
    desk = Desk(email=created(fails))
    id, body = desk.place()
    delivery = desk.give("email", body)
    wait_for(lambda: delivery.ends == [("retry", 1.0, 1)])
    assert desk.bus.sent == []
    wait_for(lambda: outcomes() == {"retried": 1})
    assert desk.lines(id) == [{"failed": "order_created", "try": 1, "error": "LookupError"}]
    document = desk.orders.get(id)
    assert document["due"] > document["updatedAt"], "the sweep leaves it alone until the next try"


def test_retried_each_try_waits_its_own_delay():
    desk = Desk(email=created(fails), delays="1,5,20")
    _, body = desk.place()
    ends = [end_of(desk.give("email", body, tries)) for tries in range(4)]
    assert ends == [
        ("retry", 1.0, 1),
        ("retry", 5.0, 2),
        ("retry", 20.0, 3),
        ("park", "LookupError('no such thing')", 4),
    ]


def test_parked_after_the_last_try_message_and_order_say_why(outcomes):
    desk = Desk(email=created(fails))
    id, body = desk.place()
    assert end_of(desk.give("email", body, tries=2)) == ("park", "LookupError('no such thing')", 3)
    assert desk.bus.sent == []
    wait_for(lambda: outcomes() == {"parked": 1})
    assert desk.lines(id) == [{"parked": "order_created", "try": 3, "error": "LookupError"}]
    assert view(desk.orders.get(id))["parked"] == ["email"]
    assert unfinished_steps(desk.orders.get(id), {"order_created": ["email"]}) == [], "the sweep does not send it again"


def test_a_parked_step_done_later_is_no_longer_parked():
    working = []
    desk = Desk(email=created(lambda event, services: None if working else fails(event, services)))
    id, body = desk.place()
    desk.handle("email", body, tries=2)
    working.append("fixed")
    desk.handle("email", body)
    assert "parked" not in view(desk.orders.get(id))
    assert desk.lines(id)[-1] == {"done": "order_created"}


@pytest.mark.parametrize("body", [b"", b"\xff", b"{", b"[]", b'{"type": "order_created"}', b"[" * 100_000])
def test_parked_at_once_is_what_is_no_event(body, outcomes):
    desk = Desk(email=created(lambda event, services: pytest.fail("it ran")))
    delivery = HandDelivery("email", "", body)
    desk.worker.deliver(delivery)
    wait_for(lambda: outcomes() == {"parked": 1})
    [(end, reason, tries)] = delivery.ends
    assert (end, tries) == ("park", 1)
    assert reason and len(reason) < 1000


def test_a_missing_order_is_parked_after_the_last_try(outcomes):
    """A store that has just failed over may not know it yet."""
    desk = Desk(email=created())
    id, body = desk.place()
    desk.database["orders"].delete_one({"_id": id})
    assert [end_of(desk.give("email", body, tries)) for tries in (0, 1)] == [("retry", 1.0, 1), ("retry", 5.0, 2)]
    [end, reason, tries] = end_of(desk.give("email", body, 2))
    assert (end, tries) == ("park", 3) and f"there is no order {id}" in reason
    wait_for(lambda: outcomes() == {"retried": 2, "parked": 1})


@pytest.mark.parametrize(("there", "end"), [(199, "ack"), (200, "retry")])
def test_an_order_takes_events_up_to_two_hundred(there, end):
    desk = Desk(email=created(lambda event, services: Event("inventory_reserved")))
    id, body = desk.place()
    others = [{"id": str(n), "type": "inventory_reserved", "orderstatus": "pending"} for n in range(1, there)]
    desk.database["orders"].update_one({"_id": id}, {"$push": {"events": {"$each": others}}})
    assert desk.handle("email", body) == end and len(desk.orders.get(id)["events"]) == 200
    if end == "retry":
        assert desk.lines(id) == [{"failed": "order_created", "try": 1, "error": "EventInvalid"}]


def test_skipped_an_event_for_another_release_stays_an_unfinished_step(outcomes):
    desk = Desk(email={"order_failed": fails})
    id, body = desk.place()
    assert desk.handle("email", body) == "ack"
    wait_for(lambda: outcomes() == {"skipped": 1})
    assert desk.lines(id) == []
    assert [handler for handler, _ in unfinished_steps(desk.orders.get(id), {"order_created": ["email"]})] == ["email"]


# --- the store is away -----------------------------------------------------------------------------------------------


def away(times: int, then):
    """Raises StoreUnavailable that many times; counts down in `.left`."""

    def call(*given, **named):
        if call.left:
            call.left -= 1
            raise StoreUnavailable("away")
        return then(*given, **named)

    call.left = times
    return call


@pytest.mark.parametrize("method", ["get", "record"])
def test_without_the_store_messages_wait_and_no_try_is_spent(method, monkeypatch):
    desk = Desk(email=created())
    id, body = desk.place()
    call = away(2, getattr(desk.orders, method))
    monkeypatch.setattr(desk.orders, method, call)
    delivery = desk.give("email", body)
    wait_for(lambda: call.left == 1)
    assert delivery.ends == []
    assert end_of(delivery) == ("ack",) and desk.bus.sent == []
    assert desk.lines(id) == [{"done": "order_created"}]


def test_a_handler_runs_again_only_when_a_write_works(monkeypatch, outcomes):
    ran, pings, works = [], [], []
    desk = Desk(email=created(lambda event, services: ran.append(1)))
    id, body = desk.place()
    monkeypatch.setattr(desk.orders, "record", away(1, desk.orders.record))
    monkeypatch.setattr(desk.store, "ping", lambda: (pings.append(1), bool(works))[1])
    monkeypatch.setattr(desk.stop, "wait", lambda seconds: threading.Event().wait(0.01))
    delivery = desk.give("email", body)
    wait_for(lambda: len(pings) > 5, 5)
    assert len(ran) == 1 and delivery.ends == [] and outcomes() == {} and desk.lines(id) == []
    works.append("again")
    assert end_of(delivery) == ("ack",) and len(ran) == 2
    wait_for(lambda: outcomes() == {"done": 1})


def test_what_the_store_refuses_for_certain_is_a_failed_try(monkeypatch):
    def refuse(*_):
        raise DocumentRefused("121 it does not validate")

    def take(event, services):
        assert services.stock.take(event.order["items"]) == {}

    desk = Desk(inventory=created(take))
    id, body = desk.place()
    monkeypatch.setattr(desk.orders, "record", refuse)
    assert end_of(desk.give("inventory", body)) == ("retry", 1.0, 1)
    assert desk.available() == 10 and desk.pending_moves() == []
    assert desk.lines(id, "inventory") == [{"failed": "order_created", "try": 1, "error": "DocumentRefused"}]
    monkeypatch.setattr(desk.orders, "record_failure", refuse)
    assert end_of(desk.give("inventory", body, tries=2))[0] == "park", "the message alone tells of it"


def test_a_failure_that_cannot_be_recorded_does_not_count_yet(monkeypatch):
    desk = Desk(email=created(fails))
    id, body = desk.place()
    monkeypatch.setattr(desk.orders, "record_failure", away(1, desk.orders.record_failure))
    assert end_of(desk.give("email", body)) == ("retry", 1.0, 1)
    assert desk.lines(id) == [{"failed": "order_created", "try": 1, "error": "LookupError"}]


def test_a_store_going_away_inside_a_handler_costs_no_try(monkeypatch):
    desk = Desk(inventory=created(lambda event, services: services.stock.take(event.order["items"]) and None))
    id, body = desk.place()
    monkeypatch.setattr(desk.store.moves, "take", away(1, desk.store.moves.take))
    assert desk.handle("inventory", body) == "ack"
    assert desk.bus.sent == [] and desk.lines(id, "inventory") == [{"done": "order_created"}]
    wait_for(lambda: desk.available() == 8)


def test_a_take_of_unknown_outcome_is_never_recorded(monkeypatch):
    def take_and_ignore_errors(event, services):
        with contextlib.suppress(StoreUnavailable):
            services.stock.take(event.order["items"])

    def done_without_an_answer(*given):
        take(*given)
        if len(desk.pending_moves()) == 1:
            raise StoreUnavailable("done, and nobody learns it")
        return {}

    desk = Desk(inventory=created(take_and_ignore_errors))
    id, body = desk.place()
    take = desk.store.moves.take
    monkeypatch.setattr(desk.store.moves, "take", done_without_an_answer)
    assert desk.handle("inventory", body) == "ack"
    wait_for(lambda: len(desk.pending_moves()) == 1, what="the recorded take is committed, the other still pending")
    [step], [move] = desk.orders.get(id)["steps"], desk.pending_moves()
    assert not move["id"].startswith(step["attempt"]) and desk.lines(id, "inventory") == [{"done": "order_created"}]
    desk.pass_time(61)
    desk.sweep.round()
    assert desk.available() == 8 and desk.pending_moves() == []


def test_on_stop_a_message_waiting_for_the_store_is_released(monkeypatch):
    desk = Desk(email=created())
    _, body = desk.place()
    call = away(1000, None)
    monkeypatch.setattr(desk.orders, "get", call)
    delivery = desk.give("email", body)
    desk.stop.set()
    wait_for(lambda: delivery.ends, 5)
    assert delivery.ends == [("release",)] and desk.bus.sent == [] and call.left > 990


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda: [Event("order_failed", reason="a"), Event("order_confirmed", shipment=LABEL)], "EventInvalid"),
        (lambda: Event("order_created"), "EventInvalid"),
        (lambda: Event("order_cancelled"), "EventInvalid"),
        (lambda: Event("order_exploded"), "EventInvalid"),
        (lambda: Event("order_failed"), "EventInvalid"),
        (lambda: Event("order_failed", reason=7), "EventInvalid"),
        (lambda: Event("order_failed", reason={1, 2}), "EventInvalid"),
        (lambda: Event("order_failed", reason=float("nan")), "EventInvalid"),
        (lambda: Event("inventory_reserved", blob="x" * 100_000), "EventInvalid"),
        (lambda: "order_confirmed", "EventInvalid"),
        (lambda: 7, "TypeError"),
        (lambda: [Event("inventory_reserved"), None], "EventInvalid"),
        (lambda: Event("inventory_reserved", nested=[{"at": date(2026, 1, 31)}]), "EventInvalid"),
    ],
    ids=[
        "two with a status", "order_created", "order_cancelled", "no event type", "a field missing", "a wrong field",
        "no JSON", "NaN", "too large", "a text", "a number", "a list with a hole", "a date",
    ],
)  # fmt: skip
def test_a_bad_answer_counts_as_raising_and_rolls_back_moves(answer, error):
    def take(event, services):
        services.stock.take(event.order["items"])
        return answer()

    desk = Desk(inventory=created(take))
    id, body = desk.place()
    assert end_of(desk.give("inventory", body)) == ("retry", 1.0, 1)
    assert desk.bus.sent == []
    assert desk.lines(id, "inventory") == [{"failed": "order_created", "try": 1, "error": error}]
    document = desk.orders.get(id)
    assert (document["status"], len(document["events"]), document["steps"]) == ("pending", 1, [])
    assert desk.available() == 10 and desk.pending_moves() == []


def test_no_answer_changes_the_status_of_a_final_order():
    again = {"order_failed": lambda event, services: Event("order_confirmed", shipment=LABEL)}
    desk = Desk(inventory=created(lambda event, services: Event("order_failed", reason="out_of_stock")), email=again)
    id, body = desk.place()
    desk.handle("inventory", body)
    desk.bus.drain()
    assert end_of(desk.give("email", desk.body(id, 1))) == ("retry", 1.0, 1)
    assert desk.bus.sent == []
    assert desk.orders.get(id)["status"] == "failed"


def test_what_a_handler_does_to_its_event_leaks_nowhere(monkeypatch):
    seen = []

    def spoil(event, services):
        seen.append(event.order["total"])
        event.order["total"], event.data["note"] = Decimal("3.50"), {1, 2}
        event.order["items"].clear()
        event.type, event.subject = "order_exploded", "another order"
        return Event("inventory_reserved")

    desk = Desk(inventory=created(spoil))
    id, body = desk.place()
    record = desk.orders.record
    monkeypatch.setattr(desk.orders, "record", away(1, record))  # so the handler runs again, on the same delivery
    assert desk.handle("inventory", body) == "ack"
    assert seen == [39.98, 39.98] and desk.lines(id, "inventory") == [{"event": "inventory_reserved"}]
    assert parse(desk.bus.sent[-1].body).order["items"] == [{"sku": "A1", "quantity": 2, "price": 19.99}]


def test_an_event_that_answers_itself_goes_on_no_further():
    desk = Desk(shipping={"inventory_reserved": lambda event, services: event}, inventory=created(reserve))
    id, body = desk.place()
    desk.handle("inventory", body)
    assert end_of(desk.give("shipping", desk.body(id, 1))) == ("retry", 1.0, 1)
    assert len(desk.orders.get(id)["events"]) == 2


class Panic(BaseException):
    """As a library in Rust has it, or gevent.Timeout."""


WAYS_OUT = [SystemExit(1), RecursionError(), AssertionError(), MemoryError(), asyncio.CancelledError(), Panic()]


@pytest.mark.parametrize("way_out", [*WAYS_OUT, GeneratorExit(), KeyboardInterrupt()], ids=repr)
def test_whatever_a_handler_raises_is_a_failed_try(way_out):
    def leave(event, services):
        raise way_out

    desk = Desk(email=created(leave))
    id, body = desk.place()
    assert end_of(desk.give("email", body)) == ("retry", 1.0, 1)
    assert desk.lines(id) == [{"failed": "order_created", "try": 1, "error": type(way_out).__name__}]


class Mute(Exception):
    """It raises when it is asked what it says."""

    def __repr__(self):
        raise KeyError("code")


class Talkative(Exception):
    """It says a lot."""

    def __repr__(self):
        return "x" * 1_000_000


@pytest.mark.parametrize(("error", "said"), [(Mute(), "Mute"), (Talkative(), "x" * 200)])
def test_what_an_error_says_of_itself_cannot_keep_a_message_from_being_parked(error, said):
    def leave(event, services):
        raise error

    desk = Desk(delays="", email=created(leave))
    id, body = desk.place()
    assert end_of(desk.give("email", body)) == ("park", said, 1)
    assert [line["error"] for line in desk.lines(id)] == [type(error).__name__]


def test_what_nobody_thought_of_parks_this_one_message(monkeypatch, outcomes, caplog):
    desk = Desk(email=created())
    (_, odd), (_, body) = desk.place(), desk.place()
    get = desk.orders.get
    monkeypatch.setattr(desk.orders, "get", lambda id: get(id) if id in body.decode() else 1 / 0)
    assert end_of(desk.give("email", odd)) == ("park", "ZeroDivisionError('division by zero')", 1)
    assert desk.handle("email", body) == "ack"
    wait_for(lambda: outcomes() == {"parked": 1, "done": 1})
    assert desk.bus.rebuilt == 0 and "nobody thought of" in caplog.text


def test_a_handler_may_yield_its_answers():
    def answers(event, services):
        yield Event("order_confirmed", shipment=LABEL)

    desk = Desk(email=created(answers))
    id, body = desk.place()
    assert desk.handle("email", body) == "ack"
    assert [message.type for message in desk.bus.sent] == ["order_confirmed"]
    assert desk.orders.get(id)["status"] == "processed" and view(desk.orders.get(id))["shipment"] == LABEL


def test_derived_ids_of_answers_are_the_same_in_a_repeat():
    def answers(event, services):
        return [Event("inventory_reserved"), Event("inventory_reserved")]

    ids = []
    for _ in range(2):
        desk = Desk(email=created(answers), inventory=created(answers))
        parent = api_event("order_created", "0" * 8 + "-0000-0000-0000-" + "0" * 12, id=PARENT)
        desk.orders.create(an_order(_id=parent.subject), parent, None, "f")
        desk.handle("email", desk.body(parent.subject))
        ids.append([event["id"] for event in desk.orders.get(parent.subject)["events"][1:]])
    assert ids[0] == ids[1]
    parts = ["email/inventory_reserved/0", "email/inventory_reserved/1"]
    assert ids[0] == [str(uuid.uuid5(uuid.UUID(PARENT), part)) for part in parts]


PARENT = "2f1c8a54-7d53-4f57-9a3e-111111111111"


def test_one_event_object_may_be_returned_for_every_order():
    shared = Event("inventory_reserved")
    returns = {"order_created": lambda event, services: shared}, {"order_created": lambda event, services: [shared] * 2}
    desk = Desk(inventory=returns[0], email=returns[1])
    placed = [desk.place() for _ in range(200)]
    given = [desk.give(name, body) for _, body in placed for name in ("inventory", "email")]  # 400, 32 at a time
    wait_for(lambda: all(delivery.ends for delivery in given), 60, "all 400 steps are done")
    for id, _ in placed:
        events = desk.orders.get(id)["events"]
        assert [event["subject"] for event in events] == [id] * 4
        assert len({event["id"] for event in events}) == 4
    published = [message.id for message in desk.bus.sent]
    assert len(published) == len(set(published)) == 600
    assert (shared.id, shared.subject, shared.data) == ("", "", {})


def test_answers_without_subscribers_are_not_mandatory_and_leave_the_outbox():
    desk = Desk(inventory=created(lambda event, services: Event("inventory_reserved")))
    id, body = desk.place()
    desk.handle("inventory", body)
    [message] = desk.bus.sent
    assert (message.type, message.mandatory) == ("inventory_reserved", False)
    wait_for(lambda: message.id not in desk.orders.get(id)["outbox"])


def test_an_event_that_another_process_publishes_is_not_published_twice():
    desk = Desk(inventory=created(lambda event, services: Event("inventory_reserved")), email=created())
    id = place(desk.store)["_id"]  # and its event is in the outbox until the API's publisher has its confirm
    for name in ("inventory", "email"):
        assert desk.handle(name, desk.body(id)) == "ack"
    assert [message.type for message in desk.bus.sent] == ["inventory_reserved"]


def test_an_answer_with_subscribers_is_mandatory_and_kept_if_unroutable():
    reserve = created(lambda event, services: Event("inventory_reserved"))
    desk = Desk(FakeBus("unroutable"), inventory=reserve, shipping={"inventory_reserved": fails})
    id, body = desk.place()
    assert desk.handle("inventory", body) == "ack", "the order has it; the sweep sends it"
    [message] = desk.bus.sent
    assert message.mandatory and message.id in desk.orders.get(id)["outbox"]


def test_a_fenced_attempt_is_rolled_back_and_tried_again(outcomes):
    def slow(event, services):
        assert services.stock.take(event.order["items"]) == {}
        if not fenced:  # the sweep thought this process dead
            fenced.append(desk.pending_moves()[0]["id"].split(".")[0])
            desk.store.open_orders.fence([(event.subject, fenced[0])])
        return Event("inventory_reserved")

    fenced = []
    desk = Desk(email=created(slow))
    id, body = desk.place()
    assert end_of(desk.give("email", body)) == ("retry", 1.0, 1)
    assert desk.available() == 10 and desk.orders.get(id)["steps"] == []
    wait_for(lambda: outcomes() == {"fenced": 1})
    assert desk.lines(id) == [{"failed": "order_created", "try": 1, "error": "AttemptRefused"}]
    assert desk.handle("email", body, tries=1) == "ack"
    wait_for(lambda: desk.available() == 8 and not desk.pending_moves())


def test_an_orders_holdings_are_given_back_once_however_often_asked():
    give_back = {"order_cancelled": lambda event, services: services.stock.give_back()}
    take = created(lambda event, services: services.stock.take(event.order["items"]) and None)
    desk = Desk(inventory=take | give_back, email=give_back)
    id, body = desk.place()
    desk.handle("inventory", body)
    wait_for(lambda: desk.available() == 8 and not desk.pending_moves())
    desk.cancel(id)
    cancelled = desk.body(id, 1)
    for name in ("inventory", "email", "inventory", "email"):
        assert desk.handle(name, cancelled) == "ack"
    wait_for(lambda: desk.available() == 10 and not desk.pending_moves())


def test_a_slow_delivery_holds_up_no_other():
    go_on = threading.Event()
    desk = Desk(email=created(lambda event, services: go_on.wait(10) and None), inventory=created())
    slow, quick = desk.place()[1], desk.place()[1]
    waiting = desk.give("email", slow)
    assert desk.handle("inventory", quick) == "ack" and waiting.ends == []
    go_on.set()
    assert end_of(waiting) == ("ack",)


# --- all of it, on the bus in one process ----------------------------------------------------------------------------


@pytest.fixture
def shop():
    """The three handlers of this project on the local bus."""
    desk = Desk(MemoryBus(), delays="0.05,0.05", **discover(ROOT / "handlers"))
    with running(desk.bus, desk.subscriptions, deliver=desk.worker.deliver):
        yield desk


def test_an_order_goes_from_created_to_processed_and_is_mailed(shop):
    id = place(shop.store, shop.bus)["_id"]
    wait_for(lambda: shop.lines(id) == [{"done": "order_confirmed"}])
    document = shop.orders.get(id)
    assert (document["status"], view(document)["shipment"]) == ("processed", LABEL)
    assert [function for function, _ in shop.functions.calls] == ["make_label", "send_email"]
    assert shop.available() == 8
    wait_for(lambda: shop.orders.get(id)["outbox"] == [])


def test_a_function_failing_twice_is_called_again_without_inventory_noticing(shop):
    shop.functions.failures = 2
    id = place(shop.store, shop.bus)["_id"]
    wait_for(lambda: shop.lines(id) == [{"done": "order_confirmed"}])
    failed = {"failed": "inventory_reserved", "error": "FunctionFailed"}
    assert shop.lines(id, "shipping") == [{**failed, "try": 1}, {**failed, "try": 2}, {"event": "order_confirmed"}]
    assert shop.lines(id, "inventory") == [{"event": "inventory_reserved"}] and shop.available() == 8


def test_an_order_without_stock_fails_and_the_customer_is_informed(shop):
    id = place(shop.store, shop.bus, quantity=11)["_id"]
    wait_for(lambda: shop.lines(id) == [{"done": "order_failed"}])
    assert [call["template"] for function, call in shop.functions.calls if function == "send_email"] == ["order_failed"]
    assert view(shop.orders.get(id))["failureReason"] == "out_of_stock" and shop.available() == 10
    wait_for(lambda: shop.lines(id, "shipping") == [{"done": "order_failed"}])
