"""Today's release and a next one side by side on one store and one broker: a roll and a roll-back under load."""

import json
from datetime import timedelta

import pytest

from core.base.ids import now
from core.bus.topology import dead_queue, main_queue
from tests.support.next_release import Beside, make_next_release
from tests.support.servers import STANDARD, delete_queues, length
from tools.chaos.system import System, wait_for

STOCK = {"A1": 100_000}
ENOUGH = 20  # events of either release that the other must have handled


@pytest.fixture
def old(system, broker_url):
    """Today's release; it runs."""
    running = system()
    running.call("PUT", "/stock/A1", {"available": STOCK["A1"]})
    yield running
    delete_queues(broker_url, ["points"])


@pytest.fixture
def new(tmp_path, old):
    """The next release; it does not run yet."""
    (tmp_path / "new").mkdir()
    release = Beside(tmp_path / "new", make_next_release(tmp_path / "program"), old)
    yield release
    release.__exit__()
    old.__exit__()  # before its queues are deleted


def test_upgrade_and_downgrade_under_load_lose_double_and_park_nothing(old, new, rabbit):
    early = {result.id for result in old.post_many(ENOUGH, clients=2)}
    old.wait_until_final()
    let_the_sweep_close_all(old)

    of_old, of_new = roll(leaving=old, staying=new)
    new.wait_until_whole(STOCK)
    # A new handler gets what is announced from the moment its queue is there. Older orders it gets on request.
    wait_for(lambda: with_points(new) == of_old | of_new, 30, "points for orders of the roll, and no others", every=0.5)
    have_the_sweep_look_again(new)
    everything = early | of_old | of_new
    wait_for(lambda: with_points(new) == counted(new) == everything, 30, "no step is unfinished", every=0.5)

    of_new_again, of_old_again = roll(leaving=new, staying=old)
    old.wait_until_whole(STOCK)
    # The handler that today's release has not: its events wait in its queue, and nobody else is troubled.
    without = {order["id"] for order in old.orders()} - with_points(old)
    assert len(without) >= ENOUGH
    wait_for(lambda: length(rabbit, main_queue("points")) >= len(without), what="an event waits for each")

    start(new)
    assert old.stop("consumer") == 0
    everything |= of_old_again | of_new_again
    wait_for(lambda: with_points(new) == everything, 30, "points for all", every=0.5)
    have_the_sweep_look_again(new)
    wait_for(lambda: counted(new) == everything, 30, "no step is unfinished", every=0.5)
    new.wait_until_whole(STOCK)
    orders = {order["id"]: order for order in new.orders()}
    assert set(orders) == everything  # nothing was stored that was not answered with 201
    greeted = {id for id, order in orders.items() if order.get("greeting")}
    assert greeted == of_new | of_new_again  # today's release kept it
    lines_of_all = [line for order in orders.values() for line in order["timeline"]]
    assert not [line for line in lines_of_all if "parked" in line]
    # One try may fail for a reason of the moment; what a release cannot read fails for every event.
    failed = [line for line in lines_of_all if "failed" in line]
    assert len(failed) <= 1, failed
    assert [length(rabbit, dead_queue(name)) for name in (*STANDARD, "points")] == [0, 0, 0, 0]
    seen = [(line["release"], line["service"]) for line in lines(new) if line["message"] == "confirmed"]
    assert set(seen) == {("", "standard"), ("next", "express")}  # what is new is used, what is missing is defaulted


def test_a_key_is_one_order_whichever_release_is_asked(old, new):
    start(new)
    body, key = System.order(new), {"Idempotency-Key": "once"}  # without the new field
    answers = [release.call("POST", "/orders", body, **key) for release in (old, new, old)]
    assert [status for status, _ in answers] == [201, 201, 201]
    assert len({answer["id"] for _, answer in answers}) == 1
    assert new.call("POST", "/orders", new.order())[0] == 201
    assert old.call("POST", "/orders", new.order())[0] == 422  # so clients send it when the roll is over


# --- the roll


def start(release: System) -> None:
    for name in ("api", "consumer"):
        if name not in release.processes:
            release.start(name)
    release.wait_ready()


def roll(leaving: System, staying: System) -> tuple[set[str], set[str]]:
    """Start one release beside the other, and end the other, all under load; gives the orders each accepted."""
    start(staying)
    before = crossed(leaving, staying)
    with staying.load(clients=2, pause=0.05) as stay:
        with leaving.load(clients=2, pause=0.05) as leave:
            enough = [count + ENOUGH for count in before]
            wait_for(lambda: all(map(int.__ge__, crossed(leaving, staying), enough)), 60, "either handles the other's")
            assert leaving.stop("api") == 0
        assert leaving.stop("consumer") == 0
        many = len(stay) + ENOUGH
        wait_for(lambda: len(stay) > many, 60, "one release alone")
    assert {result.status for result in leave} <= {0, 201} and {result.status for result in stay} == {201}
    seconds, counts = staying.wait_until_final(60), crossed(leaving, staying)
    print(
        f"{len(leave)} + {len(stay)} orders; either handled the other's events: {counts}; final after {seconds:.1f} s"
    )
    return accepted(leave), accepted(stay)


def accepted(results) -> set[str]:
    return {result.id for result in results if result.status == 201}


def crossed(one: System, other: System) -> list[int]:
    """How many steps each release did on events that the other one announced."""
    with one.database() as database:
        events = [event for order in database.orders.find({}, {"events": 1}) for event in order["events"]]
    made = {True: {event["id"] for event in events if "release" in event}}
    made[False] = {event["id"] for event in events} - made[True]
    return [sum(id in made[not isinstance(each, Beside)] for id in handled(each)) for each in (one, other)]


def handled(release: System) -> list[str]:
    """The ids of events whose step was done, as its log shows."""
    return [
        line["event"] for line in lines(release) if line["logger"] == "consumer" and line["message"][-5:] == " done"
    ]


def lines(release: System) -> list[dict]:
    return [json.loads(line) for line in release.log("consumer").splitlines() if line.endswith("}")]


# --- what only the next release does


def with_points(release: System) -> set[str]:
    """Orders that its own handler gave points; never twice."""
    timelines = [(order["id"], line) for order in release.orders() for line in order["timeline"]]
    found = [id for id, line in timelines if line.get("done") == "points_awarded"]
    assert len(found) == len(set(found))
    return set(found)


def counted(release: System) -> set[str]:
    """Orders that its inventory counted, on an event that today's inventory does not take."""
    return {line["order"] for line in lines(release) if line["message"] == "sold"}


def let_the_sweep_close_all(release: System) -> None:
    with release.database() as database:
        database.orders.update_many({}, {"$set": {"due": now()}})
        wait_for(
            lambda: not database.orders.count_documents({"due": {"$exists": True}}),
            30,
            "no step is unfinished",
            every=0.2,
        )


def have_the_sweep_look_again(release: System) -> None:
    """At every order, closed or not. Unfinished steps are sent again once it was left alone for a minute, so age it."""
    with release.database() as database:
        database.leases.delete_many({})  # that of the consumer that ended; it would run out in 10 s
        older = {"due": now(), "touched": now() - timedelta(minutes=2)}
        database.orders.update_many({}, {"$set": older, "$inc": {"rev": 1}})
