"""The sweep: what it sends again, when, to whom; what it closes; how it ends old notes. Time passes in the database."""

import threading
from datetime import timedelta
from types import SimpleNamespace

import pytest

from core import store, telemetry
from core.events import now
from core.outbox import Outbox
from core.stock import Stock
from core.store import Orders, step_name
from core.sweep import FULL_QUEUE, Sweep, patience
from tests.support.carriers import FakeBus
from tests.support.samples import an_attempt, answer, api_event, event_of, place
from tools.chaos.system import wait_for

TAKERS = {
    "order_created": ["inventory"],
    "inventory_reserved": ["shipping"],
    "order_confirmed": ["email"],
    "order_failed": ["inventory", "shipping", "email"],
    "order_cancelled": ["inventory", "shipping", "email"],
}
LABEL = {"carrier": "post", "trackingNumber": "T-1"}


class Bus(FakeBus):
    """Confirms what is published unless told otherwise."""

    def taken(self):
        """(type, queue) of what was published since the last time."""
        sent, self.sent = self.sent, []
        return [(message.type, message.queue) for message in sent]


@pytest.fixture
def shop():
    """Orders, stock, a bus and a sweep on them."""
    database, bus = store.connect("memory"), Bus()
    orders, stock = Orders(database), Stock(database)

    def sweep(forgetful: bool = False) -> Sweep:
        return Sweep(orders, stock, bus, Outbox(orders, bus, set(TAKERS)), TAKERS, threading.Event(), forgetful)

    stock.fill({"A1": 10})
    return SimpleNamespace(
        database=database,
        bus=bus,
        orders=orders,
        stock=stock,
        new_sweep=sweep,
        sweep=sweep(),
        available=lambda: stock.get("A1")["available"],
    )


def pass_time(shop, seconds: float, *order_ids: str) -> None:
    """Make everything older, or only these orders."""
    past = timedelta(seconds=seconds)
    for document in shop.database["orders"].find({"_id": {"$in": list(order_ids)}} if order_ids else {}):
        older = {name: document[name] - past for name in ("touched", "due") if name in document}
        shop.database["orders"].update_one({"_id": document["_id"]}, {"$set": older})
    for document in [] if order_ids else shop.database["stock"].find():
        notes = [note | {"at": note["at"] - past} for note in document.get("notes", [])]
        shop.database["stock"].update_one({"_id": document["_id"]}, {"$set": {"notes": notes}})


def after(shop, seconds: float) -> list[tuple[str, str]]:
    """What a round sends when so much time has passed."""
    pass_time(shop, seconds)
    shop.sweep.round()
    return shop.bus.taken()


def published(shop, document):
    """The order as it is when its events are with the broker."""
    for event_id in document["outbox"]:
        shop.orders.clear(document["_id"], event_id)
    wait_for(lambda: not shop.orders.get(document["_id"])["outbox"], 5)
    return shop.orders.get(document["_id"])


def record(shop, event, handler, *answers, moves=(), attempt=None):
    document = shop.orders.record(event, step_name(handler, event.id), attempt or an_attempt(), answers, list(moves))
    return published(shop, document)


def shipped(shop):
    """A processed order that owes a mail."""
    created = event_of(published(shop, place(shop.orders)))
    held = event_of(record(shop, created, "inventory", answer(created, "inventory", "inventory_reserved")))
    return record(shop, held, "shipping", answer(held, "shipping", "order_confirmed", shipment=LABEL))


def is_open(shop, document) -> bool:
    return "due" in shop.orders.get(document["_id"])


# --- the outbox


def test_what_waits_in_an_outbox_is_published_after_ten_seconds_untouched(shop):
    document = place(shop.orders)
    assert after(shop, 9) == []
    assert after(shop, 1) == [("order_created", "")]
    wait_for(lambda: shop.orders.get(document["_id"])["outbox"] == [], 5)


def test_what_comes_back_is_published_every_ten_seconds(shop):
    shop.bus.outcome = "returned"
    document = place(shop.orders)
    assert [after(shop, 10) for _ in range(3)] == [[("order_created", "")]] * 3
    assert shop.orders.get(document["_id"])["outbox"] == [document["events"][0]["id"]]


def test_what_is_published_is_not_sent_to_its_takers_as_well(shop):
    shop.bus.outcome = "returned"
    place(shop.orders)
    assert after(shop, 3600) == [("order_created", "")]


# --- what is owed


def test_what_is_owed_goes_to_the_queue_that_misses_it_after_sixty_seconds_and_then_ever_later(shop):
    published(shop, place(shop.orders))
    sent_after = [
        seconds for seconds in range(10, 7210, 10) if after(shop, 10) == [("order_created", "orders.inventory")]
    ]
    assert sent_after == [60, 120, 240, 480, 960, 1920, 3720, 5520]


@pytest.mark.parametrize(("sweeps", "seconds"), [(0, 60), (1, 120), (4, 960), (5, 1920), (6, 3720), (100, 172920)])
def test_patience_doubles_up_to_half_an_hour(sweeps, seconds):
    assert patience(sweeps) == timedelta(seconds=seconds)


def test_whatever_happens_to_an_order_starts_its_patience_anew(shop):
    created = event_of(published(shop, place(shop.orders)))
    assert after(shop, 60) and after(shop, 60)
    record(shop, created, "inventory", answer(created, "inventory", "inventory_reserved"))
    assert after(shop, 59) == []
    assert after(shop, 1) == [("inventory_reserved", "orders.shipping")]


def test_only_the_handlers_that_miss_an_event_get_it_again(shop):
    document = published(shop, place(shop.orders))
    ended = published(shop, shop.orders.cancel(document["_id"], api_event("order_cancelled", document["_id"]))[0])
    record(shop, event_of(ended), "inventory")
    assert after(shop, 60) == [("order_cancelled", "orders.shipping"), ("order_cancelled", "orders.email")]


def test_a_final_order_still_gets_its_mail(shop):
    document = shipped(shop)
    assert after(shop, 60) == [("order_confirmed", "orders.email")]
    assert is_open(shop, document)


def test_a_queue_that_is_long_gets_nothing_more(shop):
    published(shop, place(shop.orders))
    shop.bus.depths["orders.inventory"] = FULL_QUEUE + 1
    assert [after(shop, 60), after(shop, 60)] == [[], []]
    shop.bus.depths["orders.inventory"] = FULL_QUEUE
    assert after(shop, 10) == [("order_created", "orders.inventory")]


@pytest.mark.parametrize("full", ["inventory", "shipping", "email"])
def test_one_long_queue_keeps_nothing_from_the_others_and_has_them_get_nothing_twice(shop, full):
    document = published(shop, place(shop.orders))
    published(shop, shop.orders.cancel(document["_id"], api_event("order_cancelled", document["_id"]))[0])
    shop.bus.depths[f"orders.{full}"] = 5000
    others = [("order_cancelled", f"orders.{name}") for name in TAKERS["order_cancelled"] if name != full]
    assert [after(shop, 60), after(shop, 10), after(shop, 10)] == [others, [], []]


def test_a_failed_try_counts_as_touched_until_its_next_one_is_due(shop):
    created = event_of(published(shop, place(shop.orders)))
    shop.orders.record_failure(created, step_name("inventory", created.id), an_attempt(), 1, "TimeoutError", 90)
    assert after(shop, 149) == []
    assert after(shop, 1) == [("order_created", "orders.inventory")]


def test_a_parked_step_is_not_sent_again_and_keeps_its_order_open(shop):
    document = published(shop, place(shop.orders))
    created = event_of(document)
    shop.orders.record_failure(created, step_name("inventory", created.id), an_attempt(), 4, "TimeoutError", None)
    assert [after(shop, 60) for _ in range(5)] == [[]] * 5
    assert is_open(shop, document)


def test_what_was_sent_again_is_counted(shop):
    counter = telemetry.SWEEP_RESENT.labels("inventory")._value
    before = counter.get()
    published(shop, place(shop.orders))
    after(shop, 60)
    assert counter.get() == before + 1


# --- closing


def test_an_order_that_owes_nothing_is_closed(shop):
    document = shipped(shop)
    record(shop, event_of(document), "email")
    assert after(shop, 10) == [] and not is_open(shop, document)


def test_an_order_that_something_happened_to_meanwhile_is_not_closed(shop, monkeypatch):
    document = shipped(shop)
    document = record(shop, event_of(document), "email")
    close = shop.orders.close

    def close_late(read):
        shop.database["orders"].update_one({"_id": read["_id"]}, {"$inc": {"rev": 1}})
        return close(read)

    monkeypatch.setattr(shop.orders, "close", close_late)
    assert after(shop, 10) == [] and is_open(shop, document)


def test_an_event_that_waits_in_an_outbox_keeps_its_order_open(shop):
    document = shipped(shop)
    shop.database["orders"].update_one({"_id": document["_id"]}, {"$set": {"outbox": [document["events"][0]["id"]]}})
    record_mail = event_of(document)
    shop.orders.record(record_mail, step_name("email", record_mail.id), an_attempt(), [], [])
    shop.bus.outcome = "nacked"
    after(shop, 10)
    assert is_open(shop, document)


def test_a_pending_order_whose_event_nobody_missed_is_closed_and_opens_again(shop):
    created = event_of(published(shop, place(shop.orders)))
    document = record(shop, created, "inventory")
    after(shop, 10)
    assert not is_open(shop, document)
    shop.orders.cancel(document["_id"], api_event("order_cancelled", document["_id"]))
    assert after(shop, 10) == [("order_cancelled", "")]


# --- old notes


def take(shop, document, attempt, units=4):
    shop.stock.take(f"{attempt}.0", document["_id"], {"A1": units})
    return [{"note": f"{attempt}.0", "sku": "A1", "quantity": units}]


def notes(shop):
    return shop.database["stock"].find_one({"_id": "A1"})["notes"]


def test_a_note_is_left_alone_for_sixty_seconds(shop):
    take(shop, place(shop.orders), "a1")
    after(shop, 59)
    assert len(notes(shop)) == 1
    after(shop, 2)
    assert notes(shop) == []


def test_the_old_note_of_a_recorded_attempt_is_settled(shop):
    document = place(shop.orders)
    record(shop, event_of(document), "inventory", moves=take(shop, document, "a1"), attempt="a1")
    after(shop, 61)
    assert notes(shop) == [] and shop.available() == 6
    assert shop.orders.get(document["_id"])["void"] == []


def test_the_old_note_of_a_recorded_give_back_is_settled(shop):
    document = place(shop.orders)
    shop.stock.give("a1.0", document["_id"], {"A1": 4})
    moves = [{"note": "a1.0", "sku": "A1", "quantity": -4}]
    record(shop, event_of(document), "inventory", moves=moves, attempt="a1")
    after(shop, 61)
    assert notes(shop) == [] and shop.available() == 14


def test_the_old_note_of_an_attempt_that_is_not_recorded_is_reverted_and_the_attempt_can_never_win(shop):
    document = place(shop.orders)
    moves = take(shop, document, "a1")
    after(shop, 61)
    assert notes(shop) == [] and shop.available() == 10
    record(shop, event_of(document), "inventory", moves=moves, attempt="a1")
    assert shop.orders.get(document["_id"])["steps"] == []


def test_the_attempt_is_ruled_out_before_its_note_is_reverted(shop, monkeypatch):
    """The other way round, an attempt could be recorded between the two, with nothing held."""
    document = place(shop.orders)
    take(shop, document, "a1")
    seen = []
    end = shop.stock.end_note
    monkeypatch.setattr(
        shop.stock, "end_note", lambda *note: (seen.append(shop.orders.get(document["_id"])["void"]), end(*note))
    )
    after(shop, 61)
    assert seen == [["a1"]]


def test_a_note_of_a_recorded_attempt_that_the_order_did_not_record_is_reverted(shop):
    """It was short on another line, and the revert was lost."""
    document = place(shop.orders)
    take(shop, document, "a1")
    record(shop, event_of(document), "inventory", attempt="a1")
    after(shop, 61)
    assert notes(shop) == [] and shop.available() == 10


def test_the_note_of_an_order_that_is_not_there_is_reverted(shop):
    take(shop, {"_id": "0193"}, "a1")
    after(shop, 61)
    assert notes(shop) == [] and shop.available() == 10


# --- the lease


def test_of_two_sweeps_one_looks(shop):
    place(shop.orders)
    shop.sweep.round()
    other = shop.new_sweep()
    pass_time(shop, 10)
    assert other.round() == 0 and shop.bus.taken() == []
    assert shop.sweep.round() == 1


def test_a_sweep_whose_holder_died_goes_to_another(shop):
    shop.sweep.round()
    shop.database["leases"].update_one({"_id": "sweep"}, {"$set": {"until": now() - timedelta(seconds=1)}})
    place(shop.orders)
    pass_time(shop, 10)
    assert shop.new_sweep().round() == 1


# --- a bus that forgets


def test_at_the_start_on_a_bus_that_forgets_all_that_is_owed_is_sent_at_once_parked_steps_included(shop):
    published(shop, place(shop.orders))
    parked = event_of(published(shop, place(shop.orders)))
    shop.orders.record_failure(parked, step_name("inventory", parked.id), an_attempt(), 4, "TimeoutError", None)
    place(shop.orders)
    done = shipped(shop)
    record(shop, event_of(done), "email")
    sweep = shop.new_sweep(forgetful=True)
    assert sweep.round() == 4
    assert sorted(shop.bus.taken()) == [("order_created", "")] + [("order_created", "orders.inventory")] * 2
    assert "parked" not in store.view(shop.orders.get(parked.subject))
    sweep.round()
    assert shop.bus.taken() == []


def test_at_the_start_on_a_bus_that_forgets_notes_of_the_process_before_are_ended_at_once(shop):
    take(shop, place(shop.orders), "a1")
    wait_for(lambda: now() > notes(shop)[0]["at"], 1)
    shop.new_sweep(forgetful=True).round()
    assert notes(shop) == [] and shop.available() == 10


def test_a_broker_that_keeps_its_queues_needs_no_such_start(shop):
    published(shop, place(shop.orders))
    assert shop.new_sweep(forgetful=False).round() == 0 and shop.bus.taken() == []


# --- measuring, and going on


def test_the_outboxes_are_measured(shop):
    place(shop.orders)
    place(shop.orders)
    pass_time(shop, 5)
    shop.sweep.round()
    assert telemetry.OUTBOX_EVENTS._value.get() == 2 and 4 < telemetry.OUTBOX_OLDEST._value.get() < 60


def test_who_does_not_sweep_shows_nothing_of_the_outboxes(shop):
    place(shop.orders)
    pass_time(shop, 5)
    shop.sweep.round()
    shop.new_sweep(forgetful=False).round()  # the lease is another's
    assert telemetry.OUTBOX_EVENTS._value.get() == telemetry.OUTBOX_OLDEST._value.get() == 0


def test_a_round_that_stumbles_does_not_end_the_sweep(shop, caplog):
    sweep, rounds = shop.sweep, []

    def stumble() -> int:
        rounds.append(1)
        if len(rounds) == 3:
            sweep._stopped.set()
        raise store.StoreAway("away") if len(rounds) == 1 else ValueError("a bug")

    sweep.round = stumble
    sweep._stopped.wait = lambda seconds: None
    sweep.run()
    assert len(rounds) == 3 and [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]


def test_while_nothing_is_consumed_nothing_is_swept(shop):
    shop.bus.consuming = False
    shop.sweep.round = lambda: pytest.fail("a round without a broker")
    shop.sweep._stopped.wait = lambda seconds: shop.sweep._stopped.set()
    shop.sweep.run()
