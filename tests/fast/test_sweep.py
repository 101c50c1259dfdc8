"""The sweep: what it sends again, when, to whom; what it closes; how it ends old pending moves."""

from datetime import timedelta

import pytest
from prometheus_client import REGISTRY

from core.base.ids import now
from core.flow.sweep import CROWDED, patience
from core.order.state_machine import step_name
from core.order.view import view
from core.store.connection import StoreUnavailable
from tests.support.consumer import Desk
from tests.support.samples import LABEL, an_attempt, answer, event_of, place
from tools.chaos.system import wait_for

ENDED = dict.fromkeys(["order_failed", "order_cancelled"])
HANDLERS = {  # nothing is delivered here, so there are no functions behind the types
    "inventory": {"order_created": None, **ENDED},
    "shipping": {"inventory_reserved": None, **ENDED},
    "email": {"order_confirmed": None, **ENDED},
}


@pytest.fixture
def shop():
    """Orders, stock, a bus and a sweep on them."""
    return Desk(stock={"A1": 10}, **HANDLERS)


def sent(shop) -> list[tuple[str, str]]:
    """(type, handler) of what was published since the last time; no handler: to all subscribers."""
    return [(message.type, message.handler) for message in shop.bus.drain()]


def after(shop, seconds: float) -> list[tuple[str, str]]:
    """What a round sends when so much time has passed."""
    shop.pass_time(seconds)
    shop.sweep.round()
    return sent(shop)


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
    """A processed order whose mail is unfinished."""
    created = event_of(published(shop, place(shop.orders)))
    held = event_of(record(shop, created, "inventory", answer(created, "inventory", "inventory_reserved")))
    return record(shop, held, "shipping", answer(held, "shipping", "order_confirmed", shipment=LABEL))


def measured(metric: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(metric, labels) or 0


def is_open(shop, document) -> bool:
    return "due" in shop.orders.get(document["_id"])


# --- the outbox


def test_a_waiting_outbox_event_is_published_after_ten_untouched_seconds(shop):
    document = place(shop.orders)
    assert after(shop, 9) == []
    assert after(shop, 1) == [("order_created", "")]
    wait_for(lambda: shop.orders.get(document["_id"])["outbox"] == [], 5)


def test_an_unroutable_event_is_published_every_ten_seconds(shop):
    shop.bus.outcome = "unroutable"
    document = place(shop.orders)
    assert [after(shop, 10) for _ in range(3)] == [[("order_created", "")]] * 3
    assert shop.orders.get(document["_id"])["outbox"] == [document["events"][0]["id"]]


def test_a_published_event_is_not_also_sent_to_its_subscribers(shop):
    shop.bus.outcome = "unroutable"
    place(shop.orders)
    assert after(shop, 3600) == [("order_created", "")]


# --- unfinished steps


def test_unfinished_steps_are_resent_after_sixty_seconds_and_ever_later(shop):
    published(shop, place(shop.orders))
    sent_after = [seconds for seconds in range(10, 7210, 10) if after(shop, 10) == [("order_created", "inventory")]]
    assert sent_after == [60, 120, 240, 480, 960, 1920, 3720, 5520]


@pytest.mark.parametrize(("sweeps", "seconds"), [(0, 60), (1, 120), (4, 960), (5, 1920), (6, 3720), (100, 172920)])
def test_patience_doubles_up_to_half_an_hour(sweeps, seconds):
    assert patience(sweeps) == timedelta(seconds=seconds)


def test_whatever_happens_to_an_order_starts_its_patience_anew(shop):
    created = event_of(published(shop, place(shop.orders)))
    assert after(shop, 60) and after(shop, 60)
    record(shop, created, "inventory", answer(created, "inventory", "inventory_reserved"))
    assert after(shop, 59) == []
    assert after(shop, 1) == [("inventory_reserved", "shipping")]


def test_only_the_handlers_that_miss_an_event_get_it_again(shop):
    document = published(shop, place(shop.orders))
    ended = published(shop, shop.cancel(document["_id"]))
    record(shop, event_of(ended), "inventory")
    assert after(shop, 60) == [("order_cancelled", "shipping"), ("order_cancelled", "email")]


def test_a_final_order_still_gets_its_mail(shop):
    document = shipped(shop)
    assert after(shop, 60) == [("order_confirmed", "email")]
    assert is_open(shop, document)


def test_a_queue_that_is_long_gets_nothing_more(shop):
    published(shop, place(shop.orders))
    shop.bus.depths["inventory"] = CROWDED + 1
    assert [after(shop, 60), after(shop, 60)] == [[], []]
    shop.bus.depths["inventory"] = CROWDED
    assert after(shop, 10) == [("order_created", "inventory")]


@pytest.mark.parametrize("full", ["inventory", "shipping", "email"])
def test_one_long_queue_holds_up_no_other_and_doubles_nothing(shop, full):
    document = published(shop, place(shop.orders))
    published(shop, shop.cancel(document["_id"]))
    shop.bus.depths[full] = 5000
    others = [("order_cancelled", name) for name in HANDLERS if name != full]
    assert [after(shop, 60), after(shop, 10), after(shop, 10)] == [others, [], []]


def test_a_failed_try_counts_as_touched_until_the_next_try(shop):
    created = event_of(published(shop, place(shop.orders)))
    shop.orders.record_failure(created, step_name("inventory", created.id), an_attempt(), 1, "TimeoutError", 90)
    assert after(shop, 149) == []
    assert after(shop, 1) == [("order_created", "inventory")]


def test_a_parked_step_keeps_its_order_open_without_being_resent(shop):
    document = published(shop, place(shop.orders))
    created = event_of(document)
    shop.orders.record_failure(created, step_name("inventory", created.id), an_attempt(), 4, "TimeoutError", None)
    assert [after(shop, 60) for _ in range(5)] == [[]] * 5
    assert is_open(shop, document)


def test_what_was_sent_again_is_counted(shop):
    before = measured("orderproc_sweep_resent_total", handler="inventory")
    published(shop, place(shop.orders))
    after(shop, 60)
    assert measured("orderproc_sweep_resent_total", handler="inventory") == before + 1


# --- closing


def test_an_order_without_unfinished_steps_is_closed(shop):
    document = shipped(shop)
    record(shop, event_of(document), "email")
    assert after(shop, 10) == [] and not is_open(shop, document)


def test_an_order_that_something_happened_to_meanwhile_is_not_closed(shop, monkeypatch):
    document = shipped(shop)
    document = record(shop, event_of(document), "email")
    look_again = shop.orders.look_again

    def look_again_late(read, due, *more):
        assert due is None, "it is to be closed"
        shop.database["orders"].update_one({"_id": read["_id"]}, {"$inc": {"rev": 1}})
        return look_again(read, due, *more)

    monkeypatch.setattr(shop.orders, "look_again", look_again_late)
    assert after(shop, 10) == [] and is_open(shop, document)


def test_an_event_waiting_in_an_outbox_keeps_its_order_open(shop):
    document = shipped(shop)
    shop.database["orders"].update_one({"_id": document["_id"]}, {"$set": {"outbox": [document["events"][0]["id"]]}})
    record_mail = event_of(document)
    shop.orders.record(record_mail, step_name("email", record_mail.id), an_attempt(), [], [])
    shop.bus.outcome = "unsent"
    after(shop, 10)
    assert is_open(shop, document)


def test_pending_orders_without_unfinished_steps_are_closed_and_can_reopen(shop):
    created = event_of(published(shop, place(shop.orders)))
    document = record(shop, created, "inventory")
    after(shop, 10)
    assert not is_open(shop, document)
    shop.cancel(document["_id"])
    assert after(shop, 10) == [("order_cancelled", "")]


# --- old pending moves


def take(shop, document, attempt, units=4) -> list[dict]:
    """Have an attempt take units; gives the moves that its order is to record."""
    shop.stock.take(f"{attempt}.0", document["_id"], {"A1": units})
    return [{"move": f"{attempt}.0", "sku": "A1", "quantity": units}]


def test_a_pending_move_is_left_alone_for_sixty_seconds(shop):
    take(shop, place(shop.orders), "a1")
    after(shop, 59)
    assert len(shop.pending_moves()) == 1
    after(shop, 2)
    assert shop.pending_moves() == []


def test_the_old_pending_move_of_a_recorded_attempt_is_committed(shop):
    document = place(shop.orders)
    record(shop, event_of(document), "inventory", moves=take(shop, document, "a1"), attempt="a1")
    after(shop, 61)
    wait_for(lambda: shop.pending_moves() == [] and shop.available() == 6)
    assert shop.orders.get(document["_id"])["fenced"] == []


def test_an_old_pending_give_back_that_was_recorded_is_committed(shop):
    document = place(shop.orders)
    shop.stock.give_back("a1.0", document["_id"], {"A1": -4})
    moves = [{"move": "a1.0", "sku": "A1", "quantity": -4}]
    record(shop, event_of(document), "inventory", moves=moves, attempt="a1")
    after(shop, 61)
    wait_for(lambda: shop.pending_moves() == [] and shop.available() == 14)


def test_old_unrecorded_attempts_are_fenced_and_their_moves_rolled_back(shop):
    document = place(shop.orders)
    moves = take(shop, document, "a1")
    after(shop, 61)
    assert shop.pending_moves() == [] and shop.available() == 10
    record(shop, event_of(document), "inventory", moves=moves, attempt="a1")
    assert shop.orders.get(document["_id"])["steps"] == []


def test_an_attempt_is_fenced_before_its_pending_move_rolls_back(shop, monkeypatch):
    """The other way round, an attempt could be recorded between the two, with nothing held."""
    document = place(shop.orders)
    take(shop, document, "a1")
    seen, roll_back = [], shop.stock.roll_back

    def see(move, lines):
        seen.append((move, lines, shop.orders.get(document["_id"])["fenced"]))
        roll_back(move, lines)

    monkeypatch.setattr(shop.stock, "roll_back", see)
    after(shop, 61)
    assert seen == [("a1.0", {"A1": 4}, ["a1"])]


def test_a_recorded_attempts_unrecorded_pending_move_is_rolled_back(shop):
    """It was short on another line, and the roll-back was lost."""
    document = place(shop.orders)
    take(shop, document, "a1")
    record(shop, event_of(document), "inventory", attempt="a1")
    after(shop, 61)
    assert shop.pending_moves() == [] and shop.available() == 10


def test_a_pending_move_of_a_missing_order_is_rolled_back(shop):
    take(shop, {"_id": "0193"}, "a1")
    after(shop, 61)
    assert shop.pending_moves() == [] and shop.available() == 10


# --- the lease


def test_of_two_sweeps_one_looks(shop):
    place(shop.orders)
    shop.sweep.round()
    other = shop.new_sweep()
    shop.pass_time(10)
    assert other.round() == 0 and sent(shop) == []
    assert shop.sweep.round() == 1


def test_a_sweep_whose_holder_died_goes_to_another(shop):
    shop.sweep.round()
    shop.database["leases"].update_one({"_id": "sweep"}, {"$set": {"until": now() - timedelta(seconds=1)}})
    place(shop.orders)
    shop.pass_time(10)
    assert shop.new_sweep().round() == 1


# --- a bus that forgets


def test_a_forgetful_bus_gets_unfinished_and_parked_steps_at_start(shop):
    published(shop, place(shop.orders))
    parked = event_of(published(shop, place(shop.orders)))
    shop.orders.record_failure(parked, step_name("inventory", parked.id), an_attempt(), 4, "TimeoutError", None)
    place(shop.orders)
    done = shipped(shop)
    record(shop, event_of(done), "email")
    sweep = shop.new_sweep(forgetful=True)
    assert sweep.round() == 4
    assert sorted(sent(shop)) == [("order_created", "")] + [("order_created", "inventory")] * 2
    assert "parked" not in view(shop.orders.get(parked.subject))
    sweep.round()
    assert sent(shop) == []


def test_starting_on_a_forgetful_bus_ends_earlier_pending_moves(shop):
    take(shop, place(shop.orders), "a1")
    wait_for(lambda: now() > shop.pending_moves()[0]["at"], 1)
    shop.new_sweep(forgetful=True).round()
    assert shop.pending_moves() == [] and shop.available() == 10


def test_starting_on_a_forgetful_bus_fences_no_attempt_it_caused(shop, monkeypatch):
    """A memory bus delivers at once, and the worker's moves are as new as the round."""
    document, publish = published(shop, place(shop.orders)), shop.bus.publish

    def publish_and_handle(message, done):
        take(shop, document, "a2")
        wait_for(lambda: now() > shop.pending_moves()[0]["at"], 1)
        publish(message, done)

    monkeypatch.setattr(shop.bus, "publish", publish_and_handle)
    shop.new_sweep(forgetful=True).round()
    assert sent(shop) == [("order_created", "inventory")]
    assert len(shop.pending_moves()) == 1 and shop.orders.get(document["_id"])["fenced"] == []


def test_a_broker_that_keeps_its_queues_needs_no_such_start(shop):
    published(shop, place(shop.orders))
    assert shop.new_sweep(forgetful=False).round() == 0 and sent(shop) == []


# --- measuring, and going on


def test_the_outboxes_are_measured(shop):
    place(shop.orders)
    place(shop.orders)
    shop.pass_time(5)
    shop.sweep.round()
    assert measured("orderproc_outbox_events") == 2 and 4 < measured("orderproc_outbox_oldest_seconds") < 60


def test_who_does_not_sweep_shows_nothing_of_the_outboxes(shop):
    place(shop.orders)
    shop.pass_time(5)
    shop.sweep.round()
    shop.new_sweep(forgetful=False).round()  # the lease is another's
    assert measured("orderproc_outbox_events") == measured("orderproc_outbox_oldest_seconds") == 0


def test_a_round_that_stumbles_does_not_end_the_sweep(shop, caplog):
    sweep, rounds = shop.sweep, []

    def stumble() -> int:
        rounds.append(1)
        if len(rounds) == 3:
            shop.stop.set()
        raise StoreUnavailable("away") if len(rounds) == 1 else ValueError("a bug")

    sweep.round = stumble
    shop.stop.wait = lambda seconds: None
    sweep.run()
    assert len(rounds) == 3 and [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]


def test_while_nothing_is_consumed_nothing_is_swept(shop):
    shop.bus.consuming = False
    shop.sweep.round = lambda: pytest.fail("a round without a broker")
    shop.stop.wait = lambda seconds: shop.stop.set()
    shop.sweep.run()
