"""Group commit: who shares a bulk, who gets which error, and that nobody waits for ever."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import mongomock
import pytest
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
from core.store.connection import NEVER, DocumentExists, DocumentRefused, StoreBusy, StoreUnavailable, Write, within
from core.store.group_commit import LOG_EVERY, GroupCommit
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
        error = self.plan.pop(0) if self.plan else None
        if error:
            raise error
        self.documents |= documents

    def find(self, where):
        self.finds.append(where["_id"]["$in"])
        return Found([self.documents[id] for id in where["_id"]["$in"] if id in self.documents])


class Found(list):
    """A cursor, which remembers its batch size."""

    def batch_size(self, size: int) -> "Found":
        self.size = size
        return self


def shown(error: Exception) -> str:
    details = getattr(error, "details", None) or {}
    codes = [each["code"] for each in details.get("writeErrors", ())] or [getattr(error, "code", "")]
    return "-".join([type(error).__name__, *map(str, codes)])


def inserted(operations) -> dict[str, dict]:
    """{id: document} of pymongo's InsertOne, which shows its document nowhere else."""
    return {operation._doc["_id"]: operation._doc for operation in operations}


def insert(id: str, **fields) -> Write:
    return Write(None, {"_id": id, **fields})


def wait_until_gathered(group: GroupCommit, count: int) -> None:
    """Wait until that many calls wait for the next bulk; who waits shows nowhere else."""
    wait_for(lambda: group._waiting.qsize() == count, 5)


def refuse(where):
    raise OperationFailure("the read is refused")


@pytest.fixture(autouse=True)
def short_pause(monkeypatch):
    monkeypatch.setattr(group_commit, "PAUSE", 0.01)
    monkeypatch.setattr(group_commit, "GRACE", 0.0)


@pytest.fixture
def crowd():
    with ThreadPoolExecutor(64) as pool:
        yield pool


def while_one_is_on_its_way(collection, group, crowd, calls, waiting=None):
    """Run the calls while a first bulk is held, so that they gather; gives their futures when all is answered."""
    collection.hold.clear()
    first = crowd.submit(group.do, [insert("first")])
    assert collection.entered.wait(5)
    futures = [crowd.submit(call) for call in calls]
    wait_until_gathered(group, waiting or len(calls))
    collection.hold.set()
    first.result(5)
    return futures


# --- sharing


def test_whoever_is_alone_gets_a_batch_of_one_at_once():
    collection = Collection()
    group = GroupCommit(collection)
    started = time.monotonic()
    assert group.do([insert("a", n=1)], ["a"]) == {"a": {"_id": "a", "n": 1}}
    assert (collection.bulks, collection.finds) == ([["a"]], [["a"]])
    assert time.monotonic() - started < 0.5


def test_many_threads_share_one_bulk_and_one_read(crowd):
    collection = Collection()
    group = GroupCommit(collection)
    calls = [lambda name=f"o{n}": group.do([insert(name)], [name]) for n in range(40)]
    answers = [future.result(5) for future in while_one_is_on_its_way(collection, group, crowd, calls)]
    assert [list(answer) for answer in answers] == [[f"o{n}"] for n in range(40)]
    assert [len(bulk) for bulk in collection.bulks] == [1, 40] and len(collection.finds) == 1


def test_a_bulk_has_a_largest_size(crowd, monkeypatch):
    monkeypatch.setattr(group_commit, "LARGEST_BATCH", 4)
    collection = Collection()
    group = GroupCommit(collection)
    calls = [lambda n=n: group.do([insert(f"{n}a"), insert(f"{n}b")]) for n in range(7)]
    for future in while_one_is_on_its_way(collection, group, crowd, calls):
        future.result(5)
    assert [len(bulk) for bulk in collection.bulks] == [1, 4, 4, 4, 2]


def test_one_call_with_too_many_writes_still_makes_one_bulk(monkeypatch):
    monkeypatch.setattr(group_commit, "LARGEST_BATCH", 4)
    collection = Collection()
    GroupCommit(collection).do([insert(str(n)) for n in range(9)])
    assert [len(bulk) for bulk in collection.bulks] == [9]


def test_a_read_alone_is_one_find_and_no_bulk():
    collection = Collection()
    assert GroupCommit(collection).do(read=["missing"]) == {}
    assert (collection.bulks, collection.finds) == ([], [["missing"]])


# --- errors


def test_an_error_inside_a_bulk_answers_only_its_own_waiter(crowd):
    collection = Collection(None, bulk_error((1, 11000), (3, 121)))
    group = GroupCommit(collection)
    calls = [lambda n=n: group.do([insert(str(n))]) for n in range(5)]
    futures = while_one_is_on_its_way(collection, group, crowd, calls)
    by_place = {bulk: futures[int(bulk)].exception(5) for bulk in collection.bulks[1]}
    none = type(None)
    assert [type(error) for error in by_place.values()] == [none, DocumentExists, none, DocumentRefused, none]
    assert len(collection.bulks) == 2


def test_an_error_of_any_of_its_writes_is_the_waiters(crowd):
    group = GroupCommit(Collection(bulk_error((1, 11000))))
    with pytest.raises(DocumentExists):
        group.do([insert("a"), insert("b"), insert("c")])


def test_one_that_cannot_be_encoded_fails_only_the_culprit(crowd):
    collection = Collection()
    group = GroupCommit(collection)
    calls = [lambda n=n: group.do([insert(str(n), x={1} if n == 2 else 1)], [str(n)]) for n in range(4)]
    futures = while_one_is_on_its_way(collection, group, crowd, calls, waiting=3)
    assert isinstance(futures[2].exception(5), DocumentRefused)
    assert all(futures[n].result(5) for n in (0, 1, 3))
    assert [len(bulk) for bulk in collection.bulks] == [1, 3]


OPEN = (1, 6, 7, 8, 11, 13, 15, 20, 50, 66, 79, 89, 91, 100, 112, 133, 189, 262, 301, 365, 462, 8000, 10107, 11600)
OPEN += (11601, 11602, 13388, 13435, 13436, 14031, 16500, 17280, 40333)
UNKNOWN = [
    *(bulk_error((0, code)) for code in OPEN),
    *(OperationFailure(f"code {code}", code) for code in (*OPEN, *NEVER, 11000)),
    OperationFailure("no code at all"),
    AutoReconnect("gone"),
    ValueError("what nobody thought of"),
    NetworkTimeout("timed out"),
    ServerSelectionTimeoutError("nobody there"),
    WTimeoutError("no majority"),
    ExecutionTimeout("too slow"),
    bulk_error(write_concern=True),
    bulk_error((0, 11000), write_concern=True),
]


@pytest.mark.parametrize("error", UNKNOWN, ids=shown)
def test_an_unknown_outcome_repeats_the_write_until_it_is_acknowledged(error):
    collection = Collection(error, error, error)
    assert GroupCommit(collection).do([insert("a")], ["a"]) == {"a": {"_id": "a"}}
    assert collection.bulks == [["a"]] * 4


@pytest.mark.parametrize("error", UNKNOWN, ids=shown)
def test_a_write_meant_once_is_not_resent_unlike_its_neighbours(error, crowd):
    collection = Collection(None, error, error)
    group = GroupCommit(collection)
    calls = [lambda n=n: group.do([insert(str(n))], [str(n)], once=n == 1) for n in range(3)]
    futures = while_one_is_on_its_way(collection, group, crowd, calls)
    failed = {future for future in futures if future.exception(5)}
    assert failed <= {futures[1]} and {type(future.exception()) for future in failed} <= {StoreUnavailable}
    assert [bulk for bulk in collection.bulks if "1" in bulk] == collection.bulks[1:2]


@pytest.mark.parametrize("error", UNKNOWN, ids=shown)
def test_a_refusal_after_an_unknown_outcome_is_open(error):
    """It may have been made by the first copy: whoever believes the refusal undoes what is there."""
    with pytest.raises(StoreUnavailable, match="nobody knows"):
        GroupCommit(Collection(error, bulk_error((0, 121)))).do([insert("a")])


def test_what_is_done_once_is_answered_like_anything_else():
    assert GroupCommit(Collection()).do([insert("a")], ["a"], once=True) == {"a": {"_id": "a"}}


def test_what_was_sent_once_is_not_resent_for_its_read():
    collection = Collection()
    collection.find = refuse
    with pytest.raises(StoreUnavailable, match="nobody knows"):
        GroupCommit(collection).do([insert("a")], ["a"], once=True)
    assert collection.bulks == [["a"]]


def test_a_lost_read_repeats_the_write_before_it():
    collection = Collection()
    answers = iter([AutoReconnect("gone")])
    find = collection.find

    def lost(where):
        for error in answers:
            raise error
        return find(where)

    collection.find = lost
    assert GroupCommit(collection).do([insert("a")], ["a"]) == {"a": {"_id": "a"}}
    assert collection.bulks == [["a"]] * 2


def test_an_acknowledged_write_is_never_answered_with_a_reads_error():
    """Whoever gets an error other than StoreUnavailable may undo what it did; the write is there."""
    collection = Collection()
    collection.find = refuse
    with pytest.raises(StoreUnavailable), within(0.3):
        GroupCommit(collection).do([insert("a")], ["a"])


# --- the store is away


class Away(Collection):
    """Nobody answers, or all is refused, until `back`."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.back, self.error = False, error or AutoReconnect("away")

    def bulk_write(self, operations, ordered):
        if not self.back:
            self.bulks.append(list(inserted(operations)))
            raise self.error
        super().bulk_write(operations, ordered)


def do_within(group: GroupCommit, id: str, seconds: float) -> dict:
    with within(seconds):
        return group.do([insert(id)])


def refusal(group: GroupCommit, id: str) -> str:
    """Why a write was not done: nobody answers, or another finds out already whether the store is back."""
    try:
        do_within(group, id, 0.1)
    except StoreUnavailable as error:
        return str(error)
    return ""


def test_a_waiter_past_its_deadline_is_answered_and_never_written():
    collection = Away()
    group = GroupCommit(collection)
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match="no answer"):
        do_within(group, "early", 0.1)
    assert 0.1 <= time.monotonic() - started < 0.5
    wait_for(lambda: "no answer" in refusal(group, "late"), 5, "it gave the early one up, and tries the next")
    collection.back = True
    wait_for(lambda: refusal(group, "late") == "", 5, "it is written")
    assert "early" not in collection.documents and collection.bulks[-1] == ["late"]


def test_a_deadline_is_each_waiters_own(crowd):
    collection = Away()
    group = GroupCommit(collection)
    away = collection.bulk_write

    def held(operations, ordered):
        collection.entered.set()
        assert collection.hold.wait(5)
        away(operations, ordered)

    collection.bulk_write = held
    collection.hold.clear()
    futures = [crowd.submit(do_within, group, "first", 3)]
    assert collection.entered.wait(5)
    futures += [crowd.submit(do_within, group, "short", 0.2), crowd.submit(do_within, group, "long", 3)]
    wait_until_gathered(group, 2)
    collection.hold.set()
    assert isinstance(futures[1].exception(1), StoreUnavailable)
    collection.back = True
    assert [futures[0].exception(3), futures[2].exception(3)] == [None, None]
    assert "short" not in collection.documents


@pytest.mark.parametrize("error", [AutoReconnect("away"), OperationFailure("no right", 13), bulk_error((0, 14031))])
def test_while_away_one_waits_and_others_are_refused_at_once(error, crowd):
    collection = Away(error)
    group = GroupCommit(collection)
    one = crowd.submit(do_within, group, "one", 5)
    wait_for(lambda: collection.bulks, 5)
    wait_for(lambda: refusal(group, "probe") == "the store is away", 5)
    started = time.monotonic()
    others = [crowd.submit(group.do, [insert(f"other{n}")]) for n in range(50)]
    assert {type(other.exception(1)) for other in others} == {StoreUnavailable}
    assert time.monotonic() - started < 0.5 and not one.done()
    collection.back = True
    one.result(2)
    assert group.do([insert("again")]) == {}
    assert set(collection.documents) == {"one", "again"}


def test_of_a_crowd_one_finds_out_whether_it_is_back(crowd, monkeypatch):
    """Also when those who wait have one write's own fault, as a store may refuse one and take the next."""
    monkeypatch.setattr(group_commit, "LET_IN_EVERY", 60.0)
    collection = Away(OperationFailure("no right", 13))
    group = GroupCommit(collection)
    one = crowd.submit(do_within, group, "one", 5)
    wait_for(lambda: len(collection.bulks) > 1, 5)
    reasons = list(crowd.map(lambda n: refusal(group, str(n)), range(50)))
    assert sorted(reasons)[0].startswith("no answer") and reasons.count("the store is away") == 49
    collection.back = True
    one.result(2)


def test_where_nobody_tries_any_longer_the_next_one_does(monkeypatch):
    monkeypatch.setattr(group_commit, "LET_IN_EVERY", 60.0)
    collection = Away()
    group = GroupCommit(collection)
    for id in ("early", "later"):
        assert "no answer" in refusal(group, id)
        wait_for(lambda: not group._trying, 5)
    collection.back = True
    assert do_within(group, "now", 1) == {}


def test_while_nobody_answers_one_asks_for_all(crowd):
    collection = Away()
    group = GroupCommit(collection)
    calls = [lambda n=n: do_within(group, str(n), 5) for n in range(5)]
    collection.back = True
    collection.hold.clear()
    first = crowd.submit(group.do, [insert("first")])
    assert collection.entered.wait(5)
    futures = [crowd.submit(call) for call in calls]
    wait_until_gathered(group, 5)
    collection.back = False
    collection.hold.set()
    first.result(5)
    wait_for(lambda: len(collection.bulks) > 8, 5)
    collection.back = True
    assert [future.result(5) for future in futures] == [{}] * 5
    assert len(collection.bulks[1]) == 5 and collection.bulks[2:8] == [collection.bulks[2]] * 6
    assert len(collection.bulks[2]) == 1


def test_who_gave_up_takes_no_room_in_a_batch(crowd, monkeypatch):
    monkeypatch.setattr(group_commit, "LARGEST_BATCH", 2)
    monkeypatch.setattr(group_commit, "GRACE", 60.0)
    collection = Away()
    group = GroupCommit(collection)
    for future in [crowd.submit(do_within, group, str(n), 0.1) for n in range(5)]:
        assert isinstance(future.exception(5), StoreUnavailable)
    collection.back = True
    assert do_within(group, "now", 1) == {}
    assert list(collection.documents) == ["now"]


def test_after_a_write_without_answer_nobody_reads(crowd):
    """It would take as long, for nothing."""
    collection = Collection(None, AutoReconnect("gone"))
    group = GroupCommit(collection)
    collection.hold.clear()
    futures = [crowd.submit(group.do, [insert("first")])]
    assert collection.entered.wait(5)
    futures.append(crowd.submit(group.do, [insert("a")], ["a"]))
    wait_until_gathered(group, 1)
    futures.append(crowd.submit(lambda: group.do(read=["b"])))
    wait_until_gathered(group, 2)
    collection.hold.set()
    assert [future.result(5) for future in futures] == [{}, {"a": {"_id": "a"}}, {}]
    assert (collection.bulks, collection.finds) == ([["first"], ["a"], ["a"]], [["a"], ["b"]])


def test_in_the_first_moment_of_failing_everybody_waits(crowd, monkeypatch):
    monkeypatch.setattr(group_commit, "GRACE", 60.0)
    collection = Away()
    group = GroupCommit(collection)
    futures = [crowd.submit(do_within, group, "one", 5)]
    wait_for(lambda: "write" in group._failing and collection.bulks, 5)
    futures += [crowd.submit(do_within, group, str(n), 5) for n in range(20)]
    time.sleep(0.05)
    collection.back = True
    assert [future.result(5) for future in futures] == [{}] * 21


def test_what_waited_while_the_store_was_away_is_written_afterwards(crowd):
    collection = Collection(AutoReconnect("away"), AutoReconnect("away"))
    group = GroupCommit(collection)
    calls = [lambda n=n: group.do([insert(str(n))]) for n in range(3)]
    for future in while_one_is_on_its_way(collection, group, crowd, calls):
        assert future.exception(5) is None
    assert set(collection.documents) == {"first", "0", "1", "2"}


# --- plain reads, and asking whether the store answers


def test_a_plain_reads_error_is_a_store_unavailable():
    with pytest.raises(StoreUnavailable, match="refused"), GroupCommit(Collection()).reading():
        raise OperationFailure("refused")


def test_a_plain_read_is_refused_at_once_while_away(crowd):
    collection = Away()
    collection.find = lambda where: gone()
    group = GroupCommit(collection)
    one = crowd.submit(lambda: group.do(read=["one"]))
    wait_for(lambda: reason(group) == "the store is away", 5)
    started = time.monotonic()
    assert reason(group) == "the store is away" and time.monotonic() - started < 0.5
    del collection.find
    assert one.result(5) == {}
    asked = len(collection.finds)
    with group.reading() as found:
        assert found is collection and len(collection.finds) == asked, "it is known to be back"


def gone():
    raise AutoReconnect("away")


def reason(group: GroupCommit) -> str:
    """Why a plain read was refused."""
    try:
        with within(0.1), group.reading() as collection:
            collection.find({"_id": {"$in": []}})
    except StoreUnavailable as error:
        return str(error)
    return ""


# --- bounds


def test_beyond_the_bound_writes_are_answered_busy_and_not_done(crowd, monkeypatch):
    monkeypatch.setattr(group_commit, "LARGEST_QUEUE", 3)
    collection = Collection()
    group = GroupCommit(collection)

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
def test_without_the_batching_thread_callers_do_not_hang():
    """Its end is the end of the process; until then nobody waits longer than it asked for."""
    collection = Collection(SystemExit("dead"))
    group = GroupCommit(collection)
    for id in ("the one it died of", "later"):
        started = time.monotonic()
        with pytest.raises(StoreUnavailable):
            do_within(group, id, 0.2)
        assert time.monotonic() - started < 1


# --- offers


def test_an_offer_is_written_without_anybody_waiting():
    collection = Collection()
    collection.hold.clear()
    GroupCommit(collection).offer(insert("a"), insert("b"))
    collection.hold.set()
    wait_for(lambda: set(collection.documents) == {"a", "b"}, 5)


def test_an_offer_that_is_refused_raises_nowhere():
    collection = Collection(bulk_error((0, 11000)))
    group = GroupCommit(collection)
    group.offer(insert("a"))
    assert group.do([insert("b")]) == {}


def test_an_offer_is_dropped_while_the_store_is_away(crowd):
    collection = Away()
    group = GroupCommit(collection)
    one = crowd.submit(do_within, group, "one", 5)
    wait_for(lambda: collection.bulks, 5)
    wait_for(lambda: refusal(group, "probe") == "the store is away", 5)
    group.offer(insert("offered"))
    collection.back = True
    one.result(5)
    assert set(collection.documents) == {"one"}


# --- each for itself


def test_each_write_for_itself_shares_bulks_and_gives_documents():
    collection = Collection()
    group = GroupCommit(collection)
    assert group.do_each([insert("a"), insert("b")]) == [{"_id": "a"}, {"_id": "b"}]
    assert group.do_each([]) == []


def test_of_each_a_refused_one_is_none_and_logged(caplog):
    collection = Collection(bulk_error((0, 121)), bulk_error((0, 121)))
    documents = GroupCommit(collection).do_each([insert("a"), insert("b", x=1)])
    assert documents[0] is None and "refused" in caplog.text


def test_each_write_for_itself_takes_few_bulks(crowd, monkeypatch):
    monkeypatch.setattr(group_commit, "LARGEST_BATCH", 50)
    collection = Collection()
    group = GroupCommit(collection)
    calls = [lambda: group.do_each([insert(str(n)) for n in range(200)])]
    [documents] = while_one_is_on_its_way(collection, group, crowd, calls, waiting=200)
    assert [document["_id"] for document in documents.result(5)] == [str(n) for n in range(200)]
    assert [len(bulk) for bulk in collection.bulks] == [1, 50, 50, 50, 50]


def test_of_each_one_that_fails_leaves_the_others_done(caplog):
    collection = Collection()
    bulk_write = collection.bulk_write

    def refuse_b(operations, ordered):
        if set(inserted(operations)) == {"b"}:
            raise bulk_error((0, 121))
        if "b" in inserted(operations):
            raise AutoReconnect("gone")
        bulk_write(operations, ordered)

    collection.bulk_write = refuse_b
    with pytest.raises(StoreUnavailable), within(2):
        GroupCommit(collection).do_each([insert("a"), insert("b"), insert("c")])
    assert {"a", "c"} <= set(collection.documents)


# --- refused by an answer


def test_the_list_of_certain_refusals_is_short():
    assert set(NEVER) == {2, 9, 14, 28, 40, 52, 121, 10334, 17419, 17420}


@pytest.mark.parametrize("code", NEVER)
@pytest.mark.parametrize("once", [False, True])
def test_what_can_never_be_stored_is_refused_for_certain(code, once):
    collection = Collection(bulk_error((0, code)))
    with pytest.raises(DocumentRefused, match=str(code)):
        GroupCommit(collection).do([insert("a")], once=once)
    assert collection.bulks == [["a"]]


def test_of_several_writes_errors_the_open_one_counts():
    group = GroupCommit(Collection(bulk_error((0, 121), (1, 189), (2, 11000)), bulk_error((0, 121), (2, 11000))))
    with pytest.raises(StoreUnavailable, match="nobody knows"):
        group.do([insert("a"), insert("b"), insert("c")], once=True)


def test_a_duplicate_is_certain_also_after_an_unknown_outcome():
    with pytest.raises(DocumentExists):
        GroupCommit(Collection(AutoReconnect("gone"), bulk_error((0, 11000)))).do([insert("a")])


def test_a_document_beyond_any_limit_is_refused_unsent():
    collection = Collection()
    with pytest.raises(DocumentRefused, match="bytes"):
        GroupCommit(collection).do([insert("a", text="x" * 16_000_000)])
    assert collection.bulks == []


class Poisoned(Collection):
    """Refuses every bulk with one document in it."""

    def __init__(self, poison: str) -> None:
        super().__init__()
        self.poison = poison

    def bulk_write(self, operations, ordered):
        if self.poison in inserted(operations):
            self.bulks.append(list(inserted(operations)))
            raise OperationFailure("nested too deep", 15)
        super().bulk_write(operations, ordered)


def test_one_poison_write_does_not_stop_the_others(crowd):
    collection = Poisoned("1")
    group = GroupCommit(collection)
    calls = [lambda n=n: do_within(group, str(n), 1) for n in range(4)]
    futures = while_one_is_on_its_way(collection, group, crowd, calls)
    assert [type(future.exception(5)) for future in futures] == [type(None), StoreUnavailable, *[type(None)] * 2]


def test_what_comes_later_is_done_beside_a_poison_write(crowd, monkeypatch):
    monkeypatch.setattr(group_commit, "LET_IN_EVERY", 0.1)
    collection = Poisoned("poison")
    group = GroupCommit(collection)
    poison = crowd.submit(do_within, group, "poison", 3)
    wait_for(lambda: len(collection.bulks) > 3, 5)
    for n in range(3):
        time.sleep(group_commit.LET_IN_EVERY)
        assert do_within(group, str(n), 1) == {} and not poison.done()


def test_writes_go_on_while_reads_are_refused(crowd):
    collection = Collection()
    collection.find = refuse
    group = GroupCommit(collection)
    reading = crowd.submit(lambda: group.do(read=["a"]))
    wait_for(lambda: "read" in group._failing, 5)
    for n in range(5):
        assert do_within(group, str(n), 1) == {}
    del collection.find
    assert reading.result(5) == {}


def test_reads_go_on_while_writes_are_refused(crowd):
    collection = Collection()
    collection.documents["a"] = {"_id": "a"}
    collection.bulk_write = lambda operations, ordered: refuse(operations)
    group = GroupCommit(collection)
    writing = crowd.submit(do_within, group, "b", 1)
    wait_for(lambda: refusal(group, "c") == "the store is away", 5, "others do not wait")
    for _ in range(5):
        assert group.do(read=["a"]) == {"a": {"_id": "a"}}
    assert isinstance(writing.exception(5), StoreUnavailable)


def test_a_store_that_refuses_has_one_line_with_the_code(caplog):
    collection = Collection(*[bulk_error((0, 16500))] * 20)
    GroupCommit(collection).do([insert("a")])
    assert [(record.code, record.kind) for record in caplog.records] == [(16500, "write")]


def test_a_store_that_goes_on_refusing_is_logged_sometimes(caplog, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(group_commit, "time", clock)
    collection = Collection(*[bulk_error((0, 13))] * 50)
    bulk_write = collection.bulk_write

    def late(operations, ordered):
        clock.now += 1
        bulk_write(operations, ordered)

    collection.bulk_write = late
    group = GroupCommit(collection)
    group.offer(insert("a"))
    wait_for(lambda: clock.now >= 30, 5, "an offer is tried for so long")
    assert [record.code for record in caplog.records] == [13] * 3, f"one in {LOG_EVERY} seconds"


class Clock:
    """In place of the module `time`: goes on by hand."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        """At once."""


def test_a_read_back_is_one_round_trip_however_many():
    found = Found()
    collection = Collection()
    collection.find = lambda where: found
    GroupCommit(collection).do(read=[str(n) for n in range(500)])
    assert found.size > 500


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
