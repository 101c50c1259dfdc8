"""The sweep: what it sends again, when, to whom; what it closes; how it ends old pending moves."""

import json
import math
from datetime import timedelta

import pytest
from prometheus_client import REGISTRY

from core.base.ids import now
from core.flow.sweep import BATCH, CROWDED, patience
from core.order.state_machine import step_name
from core.order.view import view
from core.store import group_commit
from core.store.connection import StoreUnavailable, connect
from core.store.group_commit import bulk_write
from tests.support.consumer import Desk
from tests.support.samples import LABEL, a_reason, a_step, an_attempt, answer, event_of, place
from tests.support.wire_store import WireStore, always, on, refuse_writes
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
    document = shop.orders.record(event, a_step(handler, event, attempt, moves), answers)
    return published(shop, document)


def shipped(shop):
    """A processed order whose mail is unfinished."""
    created = event_of(published(shop, place(shop.store)))
    held = event_of(record(shop, created, "inventory", answer(created, "inventory", "inventory_reserved")))
    return record(shop, held, "shipping", answer(held, "shipping", "order_confirmed", shipment=LABEL))


def measured(metric: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(metric, labels) or 0


def is_open(shop, document) -> bool:
    return "due" in shop.orders.get(document["_id"])


# --- the outbox


def test_a_waiting_outbox_event_is_published_after_ten_untouched_seconds(shop):
    document = place(shop.store)
    assert after(shop, 9) == []
    assert after(shop, 1) == [("order_created", "")]
    wait_for(lambda: shop.orders.get(document["_id"])["outbox"] == [], 5)


def test_an_unroutable_event_is_published_every_ten_seconds(shop):
    shop.bus.outcome = "unroutable"
    document = place(shop.store)
    assert [after(shop, 10) for _ in range(3)] == [[("order_created", "")]] * 3
    assert shop.orders.get(document["_id"])["outbox"] == [document["events"][0]["id"]]


def test_a_published_event_is_not_also_sent_to_its_subscribers(shop):
    shop.bus.outcome = "unroutable"
    place(shop.store)
    assert after(shop, 3600) == [("order_created", "")]


# --- unfinished steps


def test_unfinished_steps_are_resent_after_sixty_seconds_and_ever_later(shop):
    published(shop, place(shop.store))
    sent_after = [seconds for seconds in range(10, 7210, 10) if after(shop, 10) == [("order_created", "inventory")]]
    assert sent_after == [60, 120, 240, 480, 960, 1920, 3720, 5520]


@pytest.mark.parametrize(("sweeps", "seconds"), [(0, 60), (1, 120), (4, 960), (5, 1920), (6, 3720), (100, 172920)])
def test_patience_doubles_up_to_half_an_hour(sweeps, seconds):
    assert patience(sweeps) == timedelta(seconds=seconds)


def test_whatever_happens_to_an_order_starts_its_patience_anew(shop):
    created = event_of(published(shop, place(shop.store)))
    assert after(shop, 60) and after(shop, 60)
    record(shop, created, "inventory", answer(created, "inventory", "inventory_reserved"))
    assert after(shop, 59) == []
    assert after(shop, 1) == [("inventory_reserved", "shipping")]


def test_only_the_handlers_that_miss_an_event_get_it_again(shop):
    document = published(shop, place(shop.store))
    ended = published(shop, shop.cancel(document["_id"]))
    record(shop, event_of(ended), "inventory")
    assert after(shop, 60) == [("order_cancelled", "shipping"), ("order_cancelled", "email")]


def test_a_final_order_still_gets_its_mail(shop):
    document = shipped(shop)
    assert after(shop, 60) == [("order_confirmed", "email")]
    assert is_open(shop, document)


def test_a_queue_that_is_long_gets_nothing_more(shop):
    published(shop, place(shop.store))
    shop.bus.depths["inventory"] = CROWDED + 1
    assert [after(shop, 60), after(shop, 60)] == [[], []]
    shop.bus.depths["inventory"] = CROWDED
    assert after(shop, 10) == [("order_created", "inventory")]


@pytest.mark.parametrize("full", ["inventory", "shipping", "email"])
def test_one_long_queue_holds_up_no_other_and_doubles_nothing(shop, full):
    document = published(shop, place(shop.store))
    published(shop, shop.cancel(document["_id"]))
    shop.bus.depths[full] = 5000
    others = [("order_cancelled", name) for name in HANDLERS if name != full]
    assert [after(shop, 60), after(shop, 10), after(shop, 10)] == [others, [], []]


def test_a_failed_try_counts_as_touched_until_the_next_try(shop):
    created = event_of(published(shop, place(shop.store)))
    shop.orders.record_failure(created, step_name("inventory", created.id), an_attempt(), a_reason(), 90)
    assert after(shop, 149) == []
    assert after(shop, 1) == [("order_created", "inventory")]


def test_a_parked_step_keeps_its_order_open_without_being_resent(shop):
    document = published(shop, place(shop.store))
    created = event_of(document)
    park(shop, created, "inventory")
    assert [after(shop, 60) for _ in range(5)] == [[]] * 5
    assert is_open(shop, document)


def park(shop, event, handler):
    shop.orders.record_failure(event, step_name(handler, event.id), an_attempt(), a_reason(4), None)


def redrive(shop, document):
    return shop.store.open_orders.redrive(shop.orders.get(document["_id"]))


def test_redriven_steps_are_sent_by_the_next_round_even_into_a_crowd(shop):
    document = published(shop, place(shop.store))
    park(shop, event_of(document), "inventory")
    shop.bus.depths["inventory"] = CROWDED + 1
    assert after(shop, 1) == []
    assert redrive(shop, document)["parked"] == []
    assert [after(shop, 1), after(shop, 1)] == [[("order_created", "inventory")], []]
    assert "redriven" not in shop.orders.get(document["_id"])


def test_a_redrive_leaves_steps_alone_that_are_not_parked(shop):
    document = published(shop, place(shop.store))
    ended = published(shop, shop.cancel(document["_id"]))
    park(shop, event_of(ended), "email")
    redrive(shop, ended)
    assert after(shop, 1) == [("order_cancelled", "email")]
    assert after(shop, 59) == [("order_cancelled", name) for name in HANDLERS]


def test_a_redrive_of_nothing_parked_changes_nothing(shop):
    document = published(shop, place(shop.store))
    assert redrive(shop, document) == document == shop.orders.get(document["_id"])


def test_a_redriven_step_that_fails_again_is_parked_again(shop):
    document = published(shop, place(shop.store))
    for _ in range(2):
        park(shop, event_of(document), "inventory")
        redrive(shop, document)
        assert after(shop, 1) == [("order_created", "inventory")]
    park(shop, event_of(document), "inventory")
    assert shop.orders.get(document["_id"])["parked"] == [step_name("inventory", event_of(document).id)]


def test_what_was_sent_again_is_counted(shop):
    before = measured("orderproc_sweep_resent_total", handler="inventory")
    published(shop, place(shop.store))
    after(shop, 60)
    assert measured("orderproc_sweep_resent_total", handler="inventory") == before + 1


def test_what_is_sent_again_is_one_line_a_step_in_the_timeline(shop):
    document = published(shop, place(shop.store))
    ended = published(shop, shop.cancel(document["_id"]))
    assert after(shop, 60) and after(shop, 60)
    record(shop, event_of(ended), "inventory")
    assert after(shop, 60)
    lines = [line for line in view(shop.orders.get(document["_id"]))["timeline"] if line["by"] == "sweep"]
    times = {"inventory": 2, "shipping": 3, "email": 3}
    assert {line["to"]: line["times"] for line in lines} == times and len(lines) == 3
    assert {line["sent"] for line in lines} == {"order_cancelled"} and all(line["at"] for line in lines)


def test_lines_of_the_sweep_do_not_make_a_timeline_longer_than_it_may_be(shop):
    document = published(shop, place(shop.store))
    full = [{"at": now(), "event": "x", "by": "x", "n": n} for n in range(100)]
    shop.database["orders"].update_one({"_id": document["_id"]}, {"$set": {"timeline": full}})
    assert after(shop, 60) == [("order_created", "inventory")]
    timeline = shop.orders.get(document["_id"])["timeline"]
    assert [line.get("n") for line in timeline] == [*range(1, 100), None]


@pytest.mark.parametrize(("depth", "minutes"), [(1500, 1.5), (5000, 5), (300_000, 30)])
def test_a_crowded_queue_puts_the_next_look_off(shop, depth, minutes):
    """A backlog costs the store a look at each order once while it lasts."""
    document = published(shop, place(shop.store))
    shop.bus.depths["inventory"] = depth
    assert after(shop, 60) == []
    ahead = shop.orders.get(document["_id"])["due"] - now()
    assert timedelta(minutes=minutes - 0.1) < ahead <= timedelta(minutes=minutes)
    looks = []
    for _ in range(8):
        shop.pass_time(10)
        looks.append(shop.sweep.round())
    assert looks == [0] * 8
    shop.pass_time(minutes * 60 - 80)
    assert (shop.sweep.round(), sent(shop)) == (1, [])


def test_a_due_time_by_a_wrong_clock_is_put_right(shop):
    document = published(shop, place(shop.store))
    later = now() + timedelta(hours=5)
    shop.database["orders"].update_one({"_id": document["_id"]}, {"$set": {"due": later, "touched": later}})
    assert shop.sweep.round() == 1 and shop.sweep.round() == 0
    assert shop.orders.get(document["_id"])["due"] < now() + timedelta(minutes=31)
    assert [after(shop, 30 * 60), after(shop, 60)] == [[], [("order_created", "inventory")]]


# --- what somebody has edited, and what is not written


@pytest.mark.parametrize(
    "edit",
    [
        {"$unset": {"sweeps": 1}},
        {"$unset": {"outbox": 1}},
        {"$unset": {"rev": 1, "steps": 1}},
        {"$set": {"events": [{}]}},
        {"$push": {"events": {"orderstatus": "old"}}},
        {"$set": {"touched": "yesterday"}},
    ],
    ids=str,
)
def test_a_malformed_order_is_left_alone_and_stops_no_other(shop, edit):
    odd, good = (published(shop, place(shop.store)) for _ in range(2))
    shop.pass_time(60)
    shop.pass_time(60, odd["_id"])  # it comes first
    shop.database["orders"].update_one({"_id": odd["_id"]}, edit)
    assert shop.sweep.round() == 2
    assert [message.type for message in shop.bus.drain() if good["_id"] in message.body.decode()] == ["order_created"]
    assert shop.sweep.round() == 0
    ahead = shop.database["orders"].find_one({"_id": odd["_id"]})["due"] - now()
    assert timedelta(minutes=1) < ahead <= timedelta(minutes=30)


def test_what_is_logged_of_a_malformed_order_names_nobody(shop, caplog):
    document = published(shop, place(shop.store))
    shop.database["orders"].update_one({"_id": document["_id"]}, {"$unset": {"sweeps": 1}})
    after(shop, 60)
    logged = [str(vars(record)) for record in caplog.records]
    assert any(document["_id"] in line for line in logged) and not any("ada@" in line for line in logged)


def test_while_the_store_takes_no_writes_nothing_is_sent(shop, monkeypatch):
    place(shop.store)
    published(shop, place(shop.store))
    shop.pass_time(60)

    def refuse(writes):
        shop.stop.set()
        raise StoreUnavailable("no room")

    monkeypatch.setattr(shop.store.open_orders, "write", refuse)
    shop.sweep.run()
    assert shop.bus.sent == []


@pytest.mark.parametrize("code", [13, 14031, 16500])
def test_while_a_real_store_refuses_writes_nothing_is_sent(code, monkeypatch):
    monkeypatch.setattr("core.store.group_commit.PATIENCE", 0.2)
    with WireStore() as server:
        shop = Desk(stock={"A1": 10}, database=connect(server.url), **HANDLERS)
        place(shop.store)
        shop.pass_time(61)
        server.fault = always(on("orders", "update"), refuse_writes(code))
        for _ in range(3):
            with pytest.raises(StoreUnavailable):
                shop.sweep.round()
        assert shop.bus.sent == []
        server.fault = None
        wait_for(lambda: look(shop) == 1, 5)
        [document] = shop.database["orders"].find()
        assert sent(shop) == [("order_created", "")]
        wait_for(lambda: not shop.orders.get(document["_id"])["outbox"], 5)
        shop.database.client.close()


def look(shop) -> int:
    """A round's result; none while others still find out whether the store is back."""
    try:
        return shop.sweep.round()
    except StoreUnavailable:
        return 0


def test_an_order_whose_look_is_refused_is_not_sent_again(shop, monkeypatch):
    published(shop, place(shop.store))
    bulk = shop.store.open_orders._bulk
    monkeypatch.setattr(bulk, "do_each", lambda writes: [None for _ in writes])
    assert [after(shop, 60), after(shop, 1), after(shop, 1)][1:] == [[], []]


# --- closing


def test_an_order_without_unfinished_steps_is_closed(shop):
    document = shipped(shop)
    record(shop, event_of(document), "email")
    assert after(shop, 10) == [] and not is_open(shop, document)


def test_an_order_that_something_happened_to_meanwhile_is_not_closed(shop, monkeypatch):
    document = shipped(shop)
    document = record(shop, event_of(document), "email")
    look_again = shop.store.open_orders.look_again

    def look_again_late(read, due, *more):
        assert due is None, "it is to be closed"
        shop.database["orders"].update_one({"_id": read["_id"]}, {"$inc": {"rev": 1}})
        return look_again(read, due, *more)

    monkeypatch.setattr(shop.store.open_orders, "look_again", look_again_late)
    assert after(shop, 10) == [] and is_open(shop, document)


def test_an_event_waiting_in_an_outbox_keeps_its_order_open(shop):
    document = shipped(shop)
    shop.database["orders"].update_one({"_id": document["_id"]}, {"$set": {"outbox": [document["events"][0]["id"]]}})
    record_mail = event_of(document)
    shop.orders.record(record_mail, a_step("email", record_mail), [])
    shop.bus.outcome = "unsent"
    after(shop, 10)
    assert is_open(shop, document)


def test_pending_orders_without_unfinished_steps_are_closed_and_can_reopen(shop):
    created = event_of(published(shop, place(shop.store)))
    document = record(shop, created, "inventory")
    after(shop, 10)
    assert not is_open(shop, document)
    shop.cancel(document["_id"])
    assert after(shop, 10) == [("order_cancelled", "")]


# --- old pending moves


def take(shop, document, attempt, units=4) -> list[dict]:
    """Have an attempt take units; gives the moves that its order is to record."""
    shop.store.moves.take(f"{attempt}.0", document["_id"], {"A1": units})
    return [{"move": f"{attempt}.0", "sku": "A1", "quantity": units}]


def test_a_pending_move_is_left_alone_for_sixty_seconds(shop):
    take(shop, place(shop.store), "a1")
    after(shop, 59)
    assert len(shop.pending_moves()) == 1
    after(shop, 2)
    assert shop.pending_moves() == []


def test_the_old_pending_move_of_a_recorded_attempt_is_committed(shop):
    document = place(shop.store)
    record(shop, event_of(document), "inventory", moves=take(shop, document, "a1"), attempt="a1")
    after(shop, 61)
    wait_for(lambda: shop.pending_moves() == [] and shop.available() == 6)
    assert shop.orders.get(document["_id"])["fenced"] == []


def test_an_old_pending_give_back_that_was_recorded_is_committed(shop):
    document = place(shop.store)
    shop.store.moves.give_back("a1.0", document["_id"], {"A1": -4})
    moves = [{"move": "a1.0", "sku": "A1", "quantity": -4}]
    record(shop, event_of(document), "inventory", moves=moves, attempt="a1")
    after(shop, 61)
    wait_for(lambda: shop.pending_moves() == [] and shop.available() == 14)


def test_old_unrecorded_attempts_are_fenced_and_their_moves_rolled_back(shop):
    document = place(shop.store)
    moves = take(shop, document, "a1")
    after(shop, 61)
    assert shop.pending_moves() == [] and shop.available() == 10
    record(shop, event_of(document), "inventory", moves=moves, attempt="a1")
    assert shop.orders.get(document["_id"])["steps"] == []


def test_an_attempt_is_fenced_before_its_pending_move_rolls_back(shop, monkeypatch):
    """The other way round, an attempt could be recorded between the two, with nothing held."""
    document = place(shop.store)
    take(shop, document, "a1")
    seen, end = [], shop.store.moves.end

    def see(moves):
        seen.append((moves[0][1]["id"], shop.orders.get(document["_id"])["fenced"]))
        end(moves)

    monkeypatch.setattr(shop.store.moves, "end", see)
    after(shop, 61)
    assert seen == [("a1.0", ["a1"])]


def test_a_recorded_attempts_unrecorded_pending_move_is_rolled_back(shop):
    """It was short on another line, and the roll-back was lost."""
    document = place(shop.store)
    take(shop, document, "a1")
    record(shop, event_of(document), "inventory", attempt="a1")
    after(shop, 61)
    assert shop.pending_moves() == [] and shop.available() == 10


def test_a_pending_move_of_a_missing_order_is_rolled_back(shop):
    take(shop, {"_id": "0193"}, "a1")
    after(shop, 61)
    assert shop.pending_moves() == [] and shop.available() == 10


def test_pending_moves_grow_old_by_beats_and_no_clock(shop, monkeypatch):
    take(shop, place(shop.store), "a1")
    shop.store.lease.now = 500
    shop.sweep.round()
    assert [move["mark"] for move in shop.pending_moves()] == [500]
    monkeypatch.setattr("core.flow.sweep.now", lambda: now() + timedelta(days=1))
    for beat in (501, 559):
        shop.store.lease.now = beat
        shop.sweep.round()
        assert [move["mark"] for move in shop.pending_moves()] == [500]
    shop.store.lease.now = 560
    shop.sweep.round()
    assert shop.pending_moves() == [] and shop.available() == 10


def test_an_old_move_is_ended_and_a_young_one_left(shop):
    """Both are in one stock document."""
    for beat, attempt in ((1, "a1"), (50, "a2")):
        shop.store.lease.now = beat
        take(shop, place(shop.store), attempt)
        shop.sweep.round()
    shop.store.lease.now = 61
    shop.sweep.round()
    assert [move["id"] for move in shop.pending_moves()] == ["a2.0"] and shop.available() == 6


@pytest.fixture
def bulks(shop, monkeypatch):
    """The sizes of all bulks of this shop since it was cleared."""
    sizes = []

    def count(collection, writes):
        if writes and collection.database is shop.database:  # threads of earlier tests may still run
            sizes.append(len(writes))
        return bulk_write(collection, writes)

    monkeypatch.setattr(group_commit, "bulk_write", count)
    return sizes


def test_many_old_moves_are_ended_in_batches(shop, bulks):
    shop.stock.fill({"Z9": 1000})
    for number in range(BATCH + 50):
        shop.store.moves.take(f"a{number}.0", f"o{number}", {"Z9": 1})
    shop.pass_time(61)
    bulks.clear()
    shop.sweep.round()
    assert len(shop.pending_moves()) == 50 and len(bulks) < BATCH / 4, bulks
    shop.sweep.round()
    assert shop.pending_moves() == [] and shop.available("Z9") == 1000


def test_many_orders_are_looked_at_in_batches(shop, bulks):
    shop.bus.outcome = "unsent"
    for _ in range(BATCH + 50):
        place(shop.store)
    shop.pass_time(10)
    bulks.clear()
    assert [shop.sweep.round() for _ in range(3)] == [BATCH, 50, 0]
    assert sum(bulks) == BATCH + 50 and len(bulks) < BATCH / 4


ODD_MOVES = [
    {"id": 7, "order": "o", "units": 1, "mark": 0},
    {"id": "a.0", "order": "o", "units": "many", "mark": 0},
    {"id": "a.0", "order": "o", "units": 1, "mark": "x"},
    {"id": "a.0", "order": {"$in": []}, "units": 1, "mark": 0},
    {"mark": 0},
    "a text",
]


@pytest.mark.parametrize("odd", ODD_MOVES, ids=str)
def test_a_malformed_move_stops_no_other(shop, odd):
    take(shop, place(shop.store), "a1")
    shop.database["stock"].insert_one({"_id": "0", "available": 1, "moves": [odd, {"mark": 0}]})
    shop.sweep.round()
    shop.store.lease.now += 60
    shop.sweep.round()
    assert shop.available() == 10


@pytest.mark.parametrize("steps", [[{"step": "x", "moves": [{}]}], [{}], [7], None], ids=str)
def test_a_malformed_order_of_an_old_move_stops_no_other(shop, steps):
    odd, good = place(shop.store), place(shop.store)
    take(shop, odd, "a1", units=1)
    take(shop, good, "a2")
    shop.database["orders"].update_one({"_id": odd["_id"]}, {"$set": {"steps": steps}})
    shop.pass_time(61)
    shop.sweep.round()
    assert shop.available() in (9, 10) and "a2.0" not in [move["id"] for move in shop.pending_moves()]


# --- the lease (what it is: test_lease.py)


def test_whoever_has_not_the_lease_does_not_look(shop):
    place(shop.store)
    shop.pass_time(10)
    held, shop.store.lease.now = shop.store.lease.now, 0
    assert shop.sweep.round() == 0 and sent(shop) == []
    shop.store.lease.now = held
    assert shop.sweep.round() == 1


def test_a_stopped_sweep_frees_the_lease(shop):
    shop.stop.set()
    shop.sweep.run()
    assert shop.store.lease.freed


# --- a bus that forgets


def test_a_forgetful_bus_gets_unfinished_and_parked_steps_at_start(shop):
    published(shop, place(shop.store))
    parked = event_of(published(shop, place(shop.store)))
    shop.orders.record_failure(parked, step_name("inventory", parked.id), an_attempt(), a_reason(4), None)
    place(shop.store)
    done = shipped(shop)
    record(shop, event_of(done), "email")
    wait_for(lambda: now() > shop.orders.get(done["_id"])["touched"], 1)
    sweep = shop.new_sweep(forgetful=True)
    assert sweep.round() == 4
    assert sorted(sent(shop)) == [("order_created", "")] + [("order_created", "inventory")] * 2
    assert "parked" not in view(shop.orders.get(parked.subject))
    sweep.round()
    assert sent(shop) == []


def test_a_forgetful_bus_gets_steps_whose_next_try_was_ahead(shop):
    """The message that was to bring it died with the process before."""
    created = event_of(published(shop, place(shop.store)))
    shop.orders.record_failure(created, step_name("inventory", created.id), an_attempt(), a_reason(), 90)
    shop.new_sweep(forgetful=True).round()
    assert sent(shop) == [("order_created", "inventory")]


def test_starting_on_a_forgetful_bus_ends_earlier_pending_moves(shop):
    take(shop, place(shop.store), "a1")
    start_forgetful(shop).round()
    assert shop.pending_moves() == [] and shop.available() == 10


def test_starting_on_a_forgetful_bus_fences_no_attempt_it_caused(shop):
    document = published(shop, place(shop.store))
    sweep = start_forgetful(shop)
    take(shop, document, "a2")
    sweep.round()
    assert sent(shop) == [("order_created", "inventory")]
    assert len(shop.pending_moves()) == 1 and shop.orders.get(document["_id"])["fenced"] == []


def start_forgetful(shop):
    """A sweep that has begun to run on a bus in memory, some minutes after the first ever did; no round yet."""
    shop.store.lease.now = 100
    wait_for(lambda: not list(shop.database["orders"].find({"touched": {"$gte": now()}})), 1)
    sweep = shop.new_sweep(forgetful=True)
    shop.stop.set()
    sweep.run()
    return sweep


def test_waking_goes_in_batches_and_each_order_once(shop):
    for _ in range(5):
        published(shop, place(shop.store))
    wait_for(lambda: not list(shop.database["orders"].find({"touched": {"$gte": now()}})), 1)
    began = now()
    woken = [shop.store.open_orders.wake(2, began) for _ in range(4)]
    assert woken == [2, 2, 1, 0]
    shop.sweep.round()
    assert sorted(sent(shop)) == [("order_created", "inventory")] * 5


def test_waking_takes_as_many_rounds_as_it_needs(shop, monkeypatch):
    monkeypatch.setattr("core.flow.sweep.BATCH", 2)
    ids = {published(shop, place(shop.store))["_id"] for _ in range(5)}
    wait_for(lambda: not list(shop.database["orders"].find({"touched": {"$gte": now()}})), 1)
    woken, wake, sweep = [], shop.store.open_orders.wake, shop.new_sweep(forgetful=True)
    monkeypatch.setattr(shop.store.open_orders, "wake", lambda *args: (woken.append(wake(*args)), woken[-1])[1])
    for _ in range(6):
        sweep.round()
    assert woken == [2, 2, 1]
    again = [json.loads(message.body)["subject"] for message in shop.bus.drain()]
    assert sorted(again) == sorted(ids)


def test_a_broker_that_keeps_its_queues_needs_no_such_start(shop):
    published(shop, place(shop.store))
    assert shop.new_sweep(forgetful=False).round() == 0 and sent(shop) == []


# --- measuring, and going on


def test_the_outboxes_are_measured(shop):
    place(shop.store)
    place(shop.store)
    shop.pass_time(5)
    shop.sweep.round()
    assert measured("orderproc_outbox_events") == 2 and 4 < measured("orderproc_outbox_oldest_seconds") < 60


def test_who_does_not_sweep_shows_nothing_of_the_outboxes(shop):
    place(shop.store)
    shop.pass_time(5)
    shop.sweep.round()
    shop.store.lease.now = 0  # it is another's
    shop.sweep.round()
    assert measured("orderproc_outbox_events") == measured("orderproc_outbox_oldest_seconds") == 0


def test_outboxes_that_cannot_be_measured_show_no_number(shop, monkeypatch):
    def away(most):
        shop.stop.set()
        raise StoreUnavailable("away")

    monkeypatch.setattr(shop.store.open_orders, "outbox_size", away)
    shop.sweep.run()
    assert math.isnan(measured("orderproc_outbox_events")) and math.isnan(measured("orderproc_outbox_oldest_seconds"))


def test_the_outboxes_of_so_many_orders_are_counted_at_most(shop):
    for _ in range(5):
        place(shop.store)
    assert shop.store.open_orders.outbox_size(3)[0] == 3


def test_an_outbox_is_known_by_when_it_began_to_wait(shop):
    document = place(shop.store)
    assert document["outboxSince"] == document["createdAt"]
    assert "outboxSince" not in published(shop, document)
    cancelled = shop.cancel(document["_id"])
    assert cancelled["outboxSince"] == cancelled["updatedAt"]
    shop.database["orders"].update_one({"_id": document["_id"]}, {"$push": {"outbox": "another"}})
    shop.orders.clear(document["_id"], cancelled["outbox"][0])
    wait_for(lambda: shop.orders.get(document["_id"])["outbox"] == ["another"], 5)
    assert "outboxSince" in shop.orders.get(document["_id"])


def test_ten_thousand_orders_are_counted_at_most(shop, monkeypatch):
    asked = []
    monkeypatch.setattr(shop.store.open_orders, "outbox_size", lambda most: (asked.append(most), (most, now()))[1])
    for _ in range(3):
        shop.sweep.round()
    assert asked == [10_000] and measured("orderproc_outbox_events") == 10_000
    monkeypatch.setattr("core.flow.outbox.MEASURE_EVERY", 0)
    shop.sweep.round()
    assert len(asked) == 2


def test_a_clock_that_goes_back_takes_no_order_back(shop, monkeypatch):
    document = published(shop, place(shop.store))
    before = now() - timedelta(hours=2)
    for module in ("core.store.orders", "core.flow.sweep"):
        monkeypatch.setattr(f"{module}.now", lambda: before)
    cancelled = shop.cancel(document["_id"])
    assert document["createdAt"] <= document["updatedAt"] == cancelled["updatedAt"]
    shop.sweep.round()
    assert shop.orders.get(document["_id"])["updatedAt"] == cancelled["updatedAt"]


def test_whatever_a_round_reads_is_bounded():
    with WireStore() as server:
        shop = Desk(stock={"A1": 10}, database=connect(server.url), **HANDLERS)
        take(shop, place(shop.store), "a1")
        shop.pass_time(61)
        server.commands.clear()
        shop.new_sweep(forgetful=True).round()
        shop.database.client.close()
    plain = [command for name, command in server.commands if name == "find" and "$in" not in str(command["filter"])]
    assert {command["find"] for command in plain} == {"orders", "stock"}
    assert all(0 < command.get("limit", 0) <= BATCH for command in plain)
    assert all({"$limit": 10_000} in command["pipeline"] for name, command in server.commands if name == "aggregate")


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
