"""The lease of the sweep: one process holds it, and whoever sees its beat stand still for ten seconds takes it over."""

import threading
from concurrent.futures import ThreadPoolExecutor

import mongomock
import pytest

from core.store.connection import StoreUnavailable
from core.store.consumers import EXPIRES, Lease
from core.store.group_commit import GroupCommit


class Clock:
    """In place of the module `time`: a monotonic clock that goes on by hand. Nobody may ask for the time of day."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("core.store.consumers.time", clock)
    return clock


@pytest.fixture
def leases():
    return mongomock.MongoClient()["orderproc"]["leases"]


@pytest.fixture
def bulk(leases, clock):
    return GroupCommit(leases)


@pytest.fixture
def one(bulk):
    return Lease(bulk)


@pytest.fixture
def other(bulk):
    return Lease(bulk)


def test_a_free_lease_is_taken_and_kept(one, other, clock):
    beats = []
    for _ in range(30):
        beats.append(one.beat())
        assert other.beat() == 0
        clock.now += 1.1
    assert beats == list(range(1, 31))


def test_a_beat_grows_at_most_once_a_second(one, clock, leases):
    assert one.beat() == 1
    for _ in range(4):
        clock.now += 0.25
        assert one.beat() == 1
    clock.now += 0.25
    assert one.beat() == 2 == leases.find_one()["beat"]


def test_a_beat_that_stands_still_for_ten_seconds_is_over(one, other, clock):
    assert one.beat() == 1 and other.beat() == 0
    clock.now += EXPIRES
    assert other.beat() == 0
    clock.now += 0.1
    assert other.beat() == 2


def test_who_comes_late_watches_for_ten_seconds_of_its_own(one, other, clock):
    """However old the beat is, when it was raised nobody else can tell."""
    one.beat()
    clock.now += 3600
    assert other.beat() == 0
    clock.now += EXPIRES
    assert other.beat() == 0
    clock.now += 0.1
    assert other.beat() == 2


def test_a_holder_that_is_slow_keeps_the_lease(one, other, clock):
    for _ in range(10):
        assert one.beat() and other.beat() == 0
        clock.now += EXPIRES - 1


def test_a_holder_that_wakes_up_first_keeps_the_lease(one, other, clock):
    """Whoever saw it stand still for long enough takes the lease only if nobody has raised the beat since."""
    assert [one.beat(), other.beat()] == [1, 0]
    clock.now += EXPIRES + 1
    assert [one.beat(), other.beat(), one.beat()] == [2, 0, 2]
    clock.now += 1.1
    assert [one.beat(), other.beat()] == [3, 0]


def test_no_time_of_day_is_in_the_lease(one, leases):
    one.beat()
    assert leases.find_one().keys() == {"_id", "owner", "beat"}


def test_a_holder_that_was_replaced_learns_it(one, other, clock):
    assert one.beat() == 1 and other.beat() == 0
    clock.now += EXPIRES + 1  # it was paused
    assert other.beat() == 2
    assert one.beat() == 0
    one.free()
    clock.now += 1.1
    assert other.beat() == 3 and one.beat() == 0


def test_a_freed_lease_is_taken_at_once(one, other, clock):
    assert one.beat() == 1 and other.beat() == 0
    one.free()
    clock.now += 0.1
    assert [other.beat(), other.beat()] == [0, 2], "it sees that it is free, then takes it"


def test_freeing_a_lease_that_another_holds_changes_nothing(one, other, leases):
    one.beat()
    other.free()
    assert leases.find_one()["owner"] and one.beat() == 1


def test_beats_never_go_back_from_holder_to_holder(bulk, clock):
    beats = []
    for _ in range(5):
        process = Lease(bulk)
        for _ in range(14):
            beats.append(process.beat())
            clock.now += 1.1
    held = [beat for beat in beats if beat]
    assert held == sorted(set(held)) and len(held) > 15


@pytest.mark.parametrize("state", ["new", "freed", "expired"])
def test_of_sixteen_who_try_at_once_one_gets_it(bulk, clock, state):
    crowd, barrier = [Lease(bulk) for _ in range(16)], threading.Barrier(16)
    if state != "new":
        before = Lease(bulk)
        before.beat()
        assert {process.beat() for process in crowd} == {0}
        if state == "freed":
            before.free()
            assert {process.beat() for process in crowd} == {0}, "they see that it is free"
        clock.now += EXPIRES + 1

    def beat(process: Lease) -> int:
        barrier.wait(10)
        return process.beat()

    with ThreadPoolExecutor(16) as pool:
        beats = list(pool.map(beat, crowd))
    assert sorted(beats)[:-1] == [0] * 15 and max(beats) > 0


def test_a_lease_taken_twice_by_a_repeat_is_ours(one, other, bulk, clock, monkeypatch):
    """The first copy was done, and its answer lost."""
    do = bulk.do
    monkeypatch.setattr(bulk, "do", lambda writes=(), read=(): [do(writes), do(writes, read)][1])
    assert one.beat() == 1 and other.beat() == 0
    clock.now += 1.1
    assert one.beat() == 2


def test_without_the_store_nobody_learns_who_holds_it(one, other, bulk, clock, monkeypatch):
    def away(*_):
        raise StoreUnavailable("away")

    assert one.beat() == 1
    clock.now += 1.1
    with monkeypatch.context() as patch:
        patch.setattr(bulk, "do", away)
        for process in (one, other):
            with pytest.raises(StoreUnavailable):
                process.beat()
    assert one.beat() == 2 and other.beat() == 0


def test_a_lease_that_somebody_deleted_is_taken_again(one, other, leases, clock):
    """A backup without it was restored."""
    assert one.beat() and other.beat() == 0
    leases.delete_many({})
    held = []
    for _ in range(20):
        clock.now += 1.1
        held += [process.beat() for process in (one, other)]
    assert any(held[-2:])
