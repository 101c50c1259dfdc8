"""Group commit: who shares a bulk, who gets which error, and that nobody waits for ever."""

import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import mongomock
import pytest
from bson.errors import InvalidDocument
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    ExecutionTimeout,
    NetworkTimeout,
    OperationFailure,
    ServerSelectionTimeoutError,
    WTimeoutError,
)

from core.store import group_commit
from core.store.connection import DocumentExists, StoreBusy, StoreUnavailable
from core.store.group_commit import GroupCommit, Write
from tools.chaos.system import wait_for


def bulk_error(*refused: tuple[int, int], write_concern: bool = False) -> BulkWriteError:
    errors = [{"index": index, "code": code, "errmsg": f"error {code}"} for index, code in refused]
    return BulkWriteError({"writeErrors": errors, "writeConcernErrors": [{"code": 64}] if write_concern else []})


class Collection:
    """What group commit sees of a store. `plan` says how the next bulks end (None: well); `hold` holds them up."""

    name = "fake"

    def __init__(self, *plan: Exception | None) -> None:
        self.plan, self.documents = list(plan), {}
        self.bulks: list[list[str]] = []
        self.finds: list[list[str]] = []
        self.hold, self.entered = threading.Event(), threading.Event()
        self.hold.set()

    def bulk_write(self, operations, ordered):
        assert not ordered
        documents = inserted(operations)
        self.bulks.append(list(documents))
        self.entered.set()
        assert self.hold.wait(10)
        if any(isinstance(document.get("x"), set) for document in documents.values()):
            raise InvalidDocument("cannot encode a set")
        error = self.plan.pop(0) if self.plan else None
        if error:
            raise error
        self.documents |= documents

    def find(self, where):
        self.finds.append(where["_id"]["$in"])
        return [self.documents[id] for id in where["_id"]["$in"] if id in self.documents]


def inserted(operations) -> dict[str, dict]:
    """{id: document} of pymongo's InsertOne, which shows its document nowhere else."""
    return {operation._doc["_id"]: operation._doc for operation in operations}


def insert(id: str, **fields) -> Write:
    return Write(None, {"_id": id, **fields})


def wait_until_gathered(group: GroupCommit, count: int) -> None:
    """Wait until that many calls wait for the next bulk; who waits shows nowhere else."""
    wait_for(lambda: group._waiting.qsize() == count, 5)


def nothing() -> None:
    """Nothing to prepare."""


def refuse(where):
    raise OperationFailure("the read is refused")


@pytest.fixture(autouse=True)
def short_pause(monkeypatch):
    monkeypatch.setattr(group_commit, "PAUSE", 0.01)


@pytest.fixture
def crowd():
    with ThreadPoolExecutor(64) as pool:
        yield pool


def while_one_is_on_its_way(collection, group, crowd, calls):
    """Run the calls while a first bulk is held, so that they gather; gives their futures when all is answered."""
    collection.hold.clear()
    first = crowd.submit(group.do, [insert("first")])
    assert collection.entered.wait(5)
    futures = [crowd.submit(call) for call in calls]
    wait_until_gathered(group, len(calls))
    collection.hold.set()
    first.result(5)
    return futures


# --- sharing


def test_whoever_is_alone_gets_a_batch_of_one_at_once():
    collection = Collection()
    group = GroupCommit(collection, nothing)
    started = time.monotonic()
    assert group.do([insert("a", n=1)], ["a"]) == {"a": {"_id": "a", "n": 1}}
    assert (collection.bulks, collection.finds) == ([["a"]], [["a"]])
    assert time.monotonic() - started < 0.5


def test_many_threads_share_one_bulk_and_one_read(crowd):
    collection = Collection()
    group = GroupCommit(collection, nothing)
    calls = [lambda name=f"o{n}": group.do([insert(name)], [name]) for n in range(40)]
    answers = [future.result(5) for future in while_one_is_on_its_way(collection, group, crowd, calls)]
    assert [list(answer) for answer in answers] == [[f"o{n}"] for n in range(40)]
    assert [len(bulk) for bulk in collection.bulks] == [1, 40] and len(collection.finds) == 1


def test_a_bulk_has_a_largest_size(crowd, monkeypatch):
    monkeypatch.setattr(group_commit, "LARGEST_BATCH", 4)
    collection = Collection()
    group = GroupCommit(collection, nothing)
    calls = [lambda n=n: group.do([insert(f"{n}a"), insert(f"{n}b")]) for n in range(7)]
    for future in while_one_is_on_its_way(collection, group, crowd, calls):
        future.result(5)
    assert [len(bulk) for bulk in collection.bulks] == [1, 4, 4, 4, 2]


def test_one_call_with_too_many_writes_still_makes_one_bulk(monkeypatch):
    monkeypatch.setattr(group_commit, "LARGEST_BATCH", 4)
    collection = Collection()
    GroupCommit(collection, nothing).do([insert(str(n)) for n in range(9)])
    assert [len(bulk) for bulk in collection.bulks] == [9]


def test_a_read_alone_is_one_find_and_no_bulk():
    collection = Collection()
    assert GroupCommit(collection, nothing).do(read=["missing"]) == {}
    assert (collection.bulks, collection.finds) == ([], [["missing"]])


# --- errors


def test_an_error_inside_a_bulk_answers_only_its_own_waiter(crowd):
    collection = Collection(None, bulk_error((1, 11000), (3, 121)))
    group = GroupCommit(collection, nothing)
    calls = [lambda n=n: group.do([insert(str(n))]) for n in range(5)]
    futures = while_one_is_on_its_way(collection, group, crowd, calls)
    by_place = {bulk: futures[int(bulk)].exception(5) for bulk in collection.bulks[1]}
    none = type(None)
    assert [type(error) for error in by_place.values()] == [none, DocumentExists, none, RuntimeError, none]
    assert len(collection.bulks) == 2


def test_an_error_of_any_of_its_writes_is_the_waiters(crowd):
    group = GroupCommit(Collection(bulk_error((1, 11000))), nothing)
    with pytest.raises(DocumentExists):
        group.do([insert("a"), insert("b"), insert("c")])


def test_one_that_cannot_be_encoded_fails_only_the_culprit(crowd):
    collection = Collection()
    group = GroupCommit(collection, nothing)
    calls = [lambda n=n: group.do([insert(str(n), x={1} if n == 2 else 1)], [str(n)]) for n in range(4)]
    futures = while_one_is_on_its_way(collection, group, crowd, calls)
    assert isinstance(futures[2].exception(5), InvalidDocument)
    assert all(futures[n].result(5) for n in (0, 1, 3))


UNKNOWN = [
    AutoReconnect("gone"),
    NetworkTimeout("timed out"),
    ServerSelectionTimeoutError("nobody there"),
    WTimeoutError("no majority"),
    ExecutionTimeout("too slow"),
    bulk_error(write_concern=True),
    bulk_error((0, 11000), write_concern=True),
]


@pytest.mark.parametrize("error", UNKNOWN, ids=lambda error: type(error).__name__)
def test_an_unknown_outcome_repeats_the_write_until_it_is_acknowledged(error):
    collection = Collection(error, error, error)
    assert GroupCommit(collection, nothing).do([insert("a")], ["a"]) == {"a": {"_id": "a"}}
    assert collection.bulks == [["a"]] * 4


@pytest.mark.parametrize("error", UNKNOWN, ids=lambda error: type(error).__name__)
def test_a_write_meant_once_is_not_resent_unlike_its_neighbours(error, crowd):
    collection = Collection(None, error, error)
    group = GroupCommit(collection, nothing)
    calls = [lambda n=n: group.do([insert(str(n))], [str(n)], once=n == 1) for n in range(3)]
    futures = while_one_is_on_its_way(collection, group, crowd, calls)
    assert isinstance(futures[1].exception(5), StoreUnavailable)
    assert futures[0].result(5) and futures[2].result(5)
    assert [sorted(bulk) for bulk in collection.bulks] == [["first"], ["0", "1", "2"], ["0", "2"], ["0", "2"]]


def test_what_is_done_once_is_answered_like_anything_else():
    assert GroupCommit(Collection(), nothing).do([insert("a")], ["a"], once=True) == {"a": {"_id": "a"}}


def test_a_lost_read_repeats_the_write_before_it():
    collection = Collection()
    answers = iter([AutoReconnect("gone")])
    find = collection.find

    def lost(where):
        for error in answers:
            raise error
        return find(where)

    collection.find = lost
    assert GroupCommit(collection, nothing).do([insert("a")], ["a"]) == {"a": {"_id": "a"}}
    assert collection.bulks == [["a"]] * 2


def test_an_acknowledged_write_is_never_answered_with_a_reads_error():
    """Whoever gets an error other than StoreUnavailable may undo what it did; the write is there."""
    collection = Collection()
    collection.find = refuse
    with pytest.raises(StoreUnavailable):
        GroupCommit(collection, nothing).do([insert("a")], ["a"], seconds=0.3)


# --- the store is away


class Away(Collection):
    """Nobody answers until `back`."""

    def __init__(self) -> None:
        super().__init__()
        self.back = False

    def bulk_write(self, operations, ordered):
        if not self.back:
            self.bulks.append(list(inserted(operations)))
            raise AutoReconnect("away")
        super().bulk_write(operations, ordered)


def refusal(group: GroupCommit, id: str) -> str:
    """Why a write was not done: nobody answers, or another finds out already whether the store is back."""
    try:
        group.do([insert(id)], seconds=0.1)
    except StoreUnavailable as error:
        return str(error)
    return ""


def test_a_waiter_past_its_deadline_is_answered_and_never_written():
    collection = Away()
    group = GroupCommit(collection, nothing)
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match="no answer"):
        group.do([insert("early")], seconds=0.1)
    assert 0.1 <= time.monotonic() - started < 0.5
    wait_for(lambda: "no answer" in refusal(group, "late"), 5, "it gave the early one up, and tries the next")
    collection.back = True
    wait_for(lambda: refusal(group, "late") == "", 5, "it is written")
    assert "early" not in collection.documents and collection.bulks[-1] == ["late"]


def test_a_deadline_is_each_waiters_own(crowd):
    collection = Away()
    group = GroupCommit(collection, nothing)
    away = collection.bulk_write

    def held(operations, ordered):
        collection.entered.set()
        assert collection.hold.wait(5)
        away(operations, ordered)

    collection.bulk_write = held
    collection.hold.clear()
    futures = [crowd.submit(group.do, [insert("first")], (), 3)]
    assert collection.entered.wait(5)
    futures += [crowd.submit(group.do, [insert("short")], (), 0.2), crowd.submit(group.do, [insert("long")], (), 3)]
    wait_until_gathered(group, 2)
    collection.hold.set()
    assert isinstance(futures[1].exception(1), StoreUnavailable)
    collection.back = True
    assert [futures[0].exception(3), futures[2].exception(3)] == [None, None]
    assert "short" not in collection.documents


def test_while_away_one_waits_and_others_are_refused_at_once(crowd):
    collection = Away()
    group = GroupCommit(collection, nothing)
    one = crowd.submit(group.do, [insert("one")], (), 5)
    wait_for(lambda: group.away, 5)
    started = time.monotonic()
    others = [crowd.submit(group.do, [insert(f"other{n}")]) for n in range(50)]
    assert {type(other.exception(1)) for other in others} == {StoreUnavailable}
    assert time.monotonic() - started < 0.5 and not one.done()
    collection.back = True
    one.result(2)
    assert not group.away and group.do([insert("again")]) == {}
    assert set(collection.documents) == {"one", "again"}


def test_what_waited_while_the_store_was_away_is_written_afterwards(crowd):
    collection = Collection(AutoReconnect("away"), AutoReconnect("away"))
    group = GroupCommit(collection, nothing)
    calls = [lambda n=n: group.do([insert(str(n))]) for n in range(3)]
    for future in while_one_is_on_its_way(collection, group, crowd, calls):
        assert future.exception(5) is None
    assert set(collection.documents) == {"first", "0", "1", "2"}


# --- plain reads, and asking whether the store answers


def test_a_plain_reads_error_is_a_store_unavailable():
    with pytest.raises(StoreUnavailable, match="refused"), GroupCommit(Collection(), nothing).reading():
        raise OperationFailure("refused")


def test_a_plain_read_is_refused_at_once_while_away(crowd):
    collection = Away()
    group = GroupCommit(collection, nothing)
    one = crowd.submit(group.do, [insert("one")], (), 5)
    wait_for(lambda: group.away, 5)
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match="away"), group.reading():
        pytest.fail("it reads")
    assert time.monotonic() - started < 0.5
    collection.back = True
    one.result(5)
    with group.reading() as found:
        assert found is collection


def test_a_crowd_of_pings_asks_once(crowd):
    collection = Collection()
    group = GroupCommit(collection, nothing)
    assert [ping.result(5) for ping in [crowd.submit(group.ping) for _ in range(50)]] == [True] * 50
    assert collection.finds == [["-"]]


def test_a_ping_asks_again_after_a_second(monkeypatch):
    collection = Collection()
    group = GroupCommit(collection, nothing)
    assert group.ping()
    collection.find = refuse
    assert group.ping(), "the answer of a moment ago"
    monkeypatch.setattr(time, "monotonic", lambda real=time.monotonic: real() + 1.1)
    monkeypatch.setattr(group, "do", functools.partial(group.do, seconds=0.1))
    assert not group.ping()


# --- bounds


def test_beyond_the_bound_writes_are_answered_busy_and_not_done(crowd, monkeypatch):
    monkeypatch.setattr(group_commit, "LARGEST_QUEUE", 3)
    collection = Collection()
    group = GroupCommit(collection, nothing)

    def one_more():
        wait_until_gathered(group, 3)
        with pytest.raises(StoreBusy):
            group.do([insert("too many")])
        group.offer(insert("offered too many"))
        collection.hold.set()

    extra = crowd.submit(one_more)
    collection.hold.clear()
    first = crowd.submit(group.do, [insert("first")])
    assert collection.entered.wait(5)
    rest = [crowd.submit(group.do, [insert(str(n))]) for n in range(3)]
    extra.result(5)
    assert [future.result(5) for future in [first, *rest]] == [{}] * 4
    assert set(collection.documents) == {"first", "0", "1", "2"}


# --- a thread that died


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_batching_thread_is_logged_and_callers_never_hang(caplog):
    def die() -> None:
        raise SystemExit("dead")

    threads = set(threading.enumerate())
    group = GroupCommit(Collection(), die)
    with pytest.raises(StoreUnavailable):
        group.do([insert("the one it died of")], seconds=0.2)
    wait_for(lambda: set(threading.enumerate()) <= threads, 5, "its thread is over")
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match="dead"):
        group.do([insert("later")])
    group.offer(insert("later still"))
    assert time.monotonic() - started < 0.2
    assert ["the batching thread died" in record.message for record in caplog.records] == [True]


# --- offers


def test_an_offer_is_written_without_anybody_waiting():
    collection = Collection()
    collection.hold.clear()
    GroupCommit(collection, nothing).offer(insert("a"), insert("b"))
    collection.hold.set()
    wait_for(lambda: set(collection.documents) == {"a", "b"}, 5)


def test_an_offer_that_is_refused_raises_nowhere():
    collection = Collection(bulk_error((0, 11000)))
    group = GroupCommit(collection, nothing)
    group.offer(insert("a"))
    assert group.do([insert("b")]) == {}


def test_an_offer_is_dropped_while_the_store_is_away(crowd):
    collection = Away()
    group = GroupCommit(collection, nothing)
    one = crowd.submit(group.do, [insert("one")], (), 5)
    wait_for(lambda: group.away, 5)
    group.offer(insert("offered"))
    collection.back = True
    one.result(5)
    assert set(collection.documents) == {"one"}


# --- preparing


def test_preparing_comes_before_the_first_bulk_and_once():
    order, collection = [], Collection()
    group = GroupCommit(collection, lambda: order.append(list(collection.bulks)))
    group.do([insert("a")])
    group.do([insert("b")])
    assert order == [[]]


def test_preparing_is_repeated_while_the_store_is_away():
    failures = [AutoReconnect("away"), ServerSelectionTimeoutError("away")]

    def prepare() -> None:
        if failures:
            raise failures.pop()

    assert GroupCommit(Collection(), prepare).do([insert("a")], ["a"]) == {"a": {"_id": "a"}}


def test_a_failed_preparation_raises_at_the_caller_and_is_repeated():
    failures = [OperationFailure("index options conflict")]

    def prepare() -> None:
        if failures:
            raise failures.pop()

    collection = Collection()
    group = GroupCommit(collection, prepare)
    with pytest.raises(OperationFailure):
        group.do([insert("a")])
    assert collection.bulks == [] and group.do([insert("b")]) == {}


# --- mongomock, which has no usable bulk


def test_on_mongomock_writes_run_singly_with_the_same_answers():
    writes = [
        insert("a"),
        insert("a"),
        Write({"_id": "a"}, {"$set": {"n": 1}}),
        Write({"_id": "b"}, {"$set": {"n": 2}}, True),
    ]
    collection = mongomock.MongoClient()["orderproc"]["orders"]
    errors = group_commit.bulk_write(collection, writes)
    assert {index: type(error) for index, error in errors.items()} == {1: DocumentExists}
    assert list(collection.find()) == [{"_id": "a", "n": 1}, {"_id": "b", "n": 2}]
