"""The stock, on mongomock (no server needed) and on a real store: the same promises on both."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from pymongo.errors import AutoReconnect

from core.flow.services import StockInDoubt, StockMoves
from core.store.connection import DocumentExists, KeyReused, StoreUnavailable, bulk_write
from core.store.stock import PreconditionFailed
from tools.chaos.system import wait_for


@pytest.fixture
def stock(store):
    store.stock.fill({"A1": 10, "B2": 3, "C3": 0})
    return store.stock


@pytest.fixture
def moves(stock, store):
    return store.moves


@pytest.fixture
def available(stock):
    return lambda sku="A1": stock.get(sku)["available"]


@pytest.fixture
def pending(database):
    """The ids of all pending moves."""
    return lambda: {move["id"] for document in database["stock"].find() for move in document.get("moves", [])}


def commit(moves, pending, id, lines):
    """Commit a move, and wait until it is done."""
    moves.commit(id, lines)
    wait_for(lambda: id not in pending(), 5)


# --- what the API calls


def test_stock_shows_the_units_free_to_sell_and_nothing_else(stock, moves):
    moves.take("n", "o", {"A1": 4})
    assert stock.get("A1") == {"sku": "A1", "available": 6} and stock.get("Z9") is None


def test_pages_come_by_sku_and_begin_behind_a_cursor(stock):
    stock.fill({f"S{n}": n for n in range(4)})
    assert [entry["sku"] for entry in stock.page(None, 4)] == ["A1", "B2", "C3", "S0"]
    assert stock.page("S1", 4) == [{"sku": "S2", "available": 2}, {"sku": "S3", "available": 3}]


def test_filling_never_writes_over_what_is_there(stock, moves, available):
    moves.take("n", "o", {"A1": 4})
    stock.fill({"A1": 10, "D4": 1})
    assert (available("A1"), available("D4")) == (6, 1)


def test_setting_stock_leaves_what_is_held_in_doubt_alone(stock, moves, available, pending):
    moves.take("n", "o", {"A1": 4})
    assert stock.put("A1", 100, "p1") == ({"sku": "A1", "available": 100}, False)
    assert available() == 100 and pending() == {"n"}
    moves.roll_back("n", {"A1": 4})
    assert available() == 104


def test_setting_stock_makes_a_sku_that_can_be_taken(stock, moves, available):
    stock.put("N1", 2, "p1")
    assert moves.take("n", "o", {"N1": 2}) == {} and available("N1") == 0


def test_a_put_repeated_changes_nothing_even_after_a_sale(stock, moves, available):
    first = stock.put("N1", 5, "p1")
    moves.take("n", "o", {"N1": 3})
    again = stock.put("N1", 5, "p1")
    assert (first, again) == (({"sku": "N1", "available": 5}, True), ({"sku": "N1", "available": 2}, False))
    with pytest.raises(KeyReused):
        stock.put("N1", 6, "p1")
    assert available("N1") == 2


def test_a_put_asks_what_its_caller_needs(stock, available):
    asked = []
    for sku in ("A1", "N1"):
        with pytest.raises(PreconditionFailed):
            stock.put(sku, 5, "p1", needs=asked.append)
    assert asked == [{"sku": "A1", "available": 10}, None]
    assert available() == 10 and stock.get("N1") is None
    assert stock.put("N1", 5, "p2", needs=lambda entry: entry is None) == ({"sku": "N1", "available": 5}, True)


@pytest.mark.parametrize("sku", ["A1", "N1"])
def test_a_late_copy_of_a_put_changes_nothing(stock, moves, available, database, sku, monkeypatch):
    copies, do = [], stock._bulk.do

    def remember(writes=(), *args, **named):
        copies.extend(writes)
        return do(writes, *args, **named)

    monkeypatch.setattr(stock._bulk, "do", remember)
    stock.put(sku, 100, "p1")
    stock.put(sku, 5, "p2")
    moves.take("n", "o", {sku: 3})
    for copy in copies:
        with contextlib.suppress(DocumentExists):
            do([copy])
    assert available(sku) == 2 and database["stock"].find_one({"_id": sku})["rev"] == 2


def test_a_sale_between_reading_and_writing_fails_a_condition(stock, moves, available):
    def sells(entry):
        if not sold:
            sold.append(moves.take("n", "o", {"A1": 1}))
        return entry["available"] == 10

    sold = []
    with pytest.raises(PreconditionFailed):
        stock.put("A1", 20, "p1", needs=sells)
    assert available() == 9


def test_puts_at_once_each_count(stock, database, available):
    with ThreadPoolExecutor(16) as crowd:
        entries = list(crowd.map(lambda n: stock.put("A1", n, f"p{n}"), range(16)))
    assert sorted(entry["available"] for entry, _ in entries) == list(range(16))
    document = database["stock"].find_one({"_id": "A1"})
    assert document["rev"] == 16 and document["put"]["available"] == available()


def test_many_first_writes_of_a_sku_at_once_make_one(stock, database):
    with ThreadPoolExecutor(16) as crowd:
        assert all(crowd.map(lambda n: stock.put("N1", n, f"p{n}"), range(16)))
    assert [document["rev"] for document in database["stock"].find({"_id": "N1"})] == [16]


# --- taking


def test_a_take_removes_units_at_once_leaving_a_pending_move(moves, available, database):
    assert moves.take("n", "o", {"A1": 4, "B2": 3}) == {}
    assert (available("A1"), available("B2")) == (6, 0)
    [move] = database["stock"].find_one({"_id": "A1"})["moves"]
    assert move.items() >= {"id": "n", "order": "o", "units": 4}.items()


def test_a_take_repeated_takes_once(moves, available):
    for _ in range(2):
        assert moves.take("n", "o", {"A1": 4}) == {}
    assert available() == 6


def test_of_each_sku_all_units_are_taken_or_none(moves, available):
    assert moves.take("n", "o", {"A1": 11, "B2": 2}) == {"A1": "out_of_stock"}
    assert (available("A1"), available("B2")) == (10, 1)


def test_a_sku_nobody_knows_is_unknown(moves):
    assert moves.take("n", "o", {"Z9": 1, "C3": 1}) == {"Z9": "unknown_sku", "C3": "out_of_stock"}


def test_units_in_a_pending_take_make_a_shortage_doubtful(moves):
    moves.take("other", "o1", {"A1": 8})
    assert moves.take("n", "o2", {"A1": 4}) == {"A1": "in_doubt"}


def test_units_in_a_pending_give_back_make_a_shortage_doubtful(moves):
    moves.give_back("other", "o1", {"C3": -5})
    assert moves.take("n", "o2", {"C3": 4}) == {"C3": "in_doubt"}


def test_a_shortage_that_no_pending_move_can_end_is_certain(moves):
    moves.take("other", "o1", {"A1": 8})
    assert moves.take("n", "o2", {"A1": 11}) == {"A1": "out_of_stock"}


def test_committed_units_are_gone_for_good(moves, pending):
    moves.take("other", "o1", {"A1": 8})
    commit(moves, pending, "other", {"A1": 8})
    assert moves.take("n", "o2", {"A1": 4}) == {"A1": "out_of_stock"}


def test_of_a_hundred_takes_at_once_exactly_ten_get_units(moves, available, pending):
    with ThreadPoolExecutor(50) as crowd:
        answers = list(crowd.map(lambda n: moves.take(f"n{n}", f"o{n}", {"A1": 1}), range(100)))
    assert answers.count({}) == 10 and available() == 0 and len(pending()) == 10


# --- committing and rolling back


def test_committed_takes_last_and_rolled_back_takes_are_undone(moves, available, pending):
    moves.take("kept", "o", {"A1": 4})
    moves.take("undone", "o", {"A1": 2})
    commit(moves, pending, "kept", {"A1": 4})
    moves.roll_back("undone", {"A1": 2})
    assert available() == 6 and pending() == set()


def test_a_give_back_adds_nothing_until_it_is_committed(moves, available, pending):
    moves.give_back("back", "o", {"A1": -4})
    assert available() == 10 and pending() == {"back"}
    commit(moves, pending, "back", {"A1": -4})
    assert available() == 14


def test_rolling_back_a_give_back_adds_nothing(moves, available, pending):
    moves.give_back("back", "o", {"A1": -4})
    moves.roll_back("back", {"A1": -4})
    assert available() == 10 and pending() == set()


def test_a_give_back_repeated_gives_once(moves, available, pending, database):
    for _ in range(2):
        moves.give_back("back", "o", {"A1": -4})
    assert len(database["stock"].find_one({"_id": "A1"})["moves"]) == 1
    commit(moves, pending, "back", {"A1": -4})
    assert available() == 14


def test_ending_a_pending_move_again_changes_nothing(moves, available, pending):
    moves.take("kept", "o", {"A1": 4})
    commit(moves, pending, "kept", {"A1": 4})
    moves.take("undone", "o", {"A1": 2})
    moves.give_back("back", "o", {"B2": -5})
    commit(moves, pending, "back", {"B2": -5})
    for _ in range(2):
        moves.roll_back("undone", {"A1": 2})
        moves.roll_back("kept", {"A1": 4})
        moves.commit("back", {"B2": -5})
    assert (available("A1"), available("B2")) == (6, 8)


def test_only_the_pending_move_that_is_meant_ends(moves, pending):
    moves.take("a", "o1", {"A1": 1})
    moves.take("b", "o2", {"A1": 1})
    moves.roll_back("a", {"A1": 1})
    assert pending() == {"b"}


@pytest.mark.parametrize("verb", ["take", "give_back", "put"])
def test_what_may_not_be_repeated_is_sent_once(stock, moves, verb, monkeypatch):
    """A late copy would take, give or set once more after the move was ended or the units were sold."""
    sent, call = [], {
        "take": lambda: moves.take("n", "o", {"A1": 1}),
        "give_back": lambda: moves.give_back("n", "o", {"A1": -1}),
        "put": lambda: stock.put("A1", 5, "p1"),
    }[verb]  # fmt: skip
    lose_answers(monkeypatch, sent)
    with pytest.raises(StoreUnavailable, match="nobody knows"):
        call()
    assert len(sent) == 1


def test_a_roll_back_is_repeated_until_it_is_acknowledged(moves, available, pending, monkeypatch):
    sent = []
    moves.take("n", "o", {"A1": 4})
    lose_answers(monkeypatch, sent, most=2)
    moves.roll_back("n", {"A1": 4})
    assert len(sent) == 3 and available() == 10 and pending() == set()


def lose_answers(monkeypatch, sent, most=9):
    """Have bulks done whose answer is lost, `most` of them; gives all in `sent`."""

    def lose(collection, writes):
        failures = bulk_write(collection, writes)
        sent.extend([writes] if writes else [])
        if writes and len(sent) <= most:
            raise AutoReconnect("lost")
        return failures

    monkeypatch.setattr("core.store.group_commit.bulk_write", lose)


# --- what the sweep calls


def test_pending_moves_are_marked_once_and_found_by_their_mark(moves):
    moves.take("old", "o1", {"A1": 1, "B2": 1})
    unmarked = moves.pending(0, 10)
    assert sorted((sku, move["id"], move["order"]) for sku, move in unmarked) == [
        ("A1", "old", "o1"),
        ("B2", "old", "o1"),
    ]
    moves.mark(unmarked, 7)
    moves.take("new", "o2", {"A1": 1})
    moves.mark(unmarked, 8)
    assert [move["id"] for _, move in moves.pending(6, 10)] == ["new"]
    assert sorted(move["id"] for _, move in moves.pending(7, 10)) == ["new", "old", "old"]
    assert len(moves.pending(7, 1)) == 1


def test_of_several_moves_only_the_one_meant_is_marked(moves, database):
    for id in ("a", "b", "c"):
        moves.take(id, "o", {"A1": 1})
    entries = dict(zip("abc", moves.pending(0, 10), strict=True))
    moves.mark([entries["b"]], 5)
    moves.mark([entries["b"], entries["c"]], 9)  # one is marked already, in the same document
    marks = {move["id"]: move["mark"] for move in database["stock"].find_one({"_id": "A1"})["moves"]}
    assert marks == {"a": 0, "b": 5, "c": 9}


def test_two_moves_of_one_document_are_ended_in_one_go(moves, available, pending):
    moves.take("a", "o", {"A1": 1})
    moves.give_back("b", "o", {"A1": -2})
    moves.take("c", "o", {"A1": 3})
    a, b, c = [move for _, move in moves.pending(0, 10)]
    moves.end([("A1", a, False), ("A1", b, True), ("A1", c, True)])
    assert (available(), pending()) == (9, set())


def test_an_entry_that_is_no_move_is_passed_over(moves, database):
    moves.take("n", "o", {"A1": 1})
    database["stock"].update_one({"_id": "A1"}, {"$push": {"moves": {"mark": 0, "note": "by hand"}}})
    assert [move["id"] for _, move in moves.pending(0, 10)] == ["n"]


@pytest.mark.parametrize(("as_committed", "units"), [(True, 6), (False, 10)])
def test_a_pending_take_commits_or_rolls_back_only_once(moves, available, database, pending, as_committed, units):
    moves.take("n", "o", {"A1": 4})
    [move] = database["stock"].find_one({"_id": "A1"})["moves"]
    for _ in range(2):
        moves.end([("A1", move, as_committed)])
    assert available() == units and pending() == set()


@pytest.mark.parametrize(("as_committed", "units"), [(True, 14), (False, 10)])
def test_a_pending_give_back_commits_or_rolls_back_only_once(moves, available, database, pending, as_committed, units):
    moves.give_back("n", "o", {"A1": -4})
    [move] = database["stock"].find_one({"_id": "A1"})["moves"]
    for _ in range(2):
        moves.end([("A1", move, as_committed)])
    assert available() == units and pending() == set()


# --- the moves of one attempt, as handlers make them

ORDER = {"_id": "o", "steps": []}


def test_lines_of_one_sku_are_added_up(moves, available):
    made = StockMoves(moves, ORDER, "a")
    assert made.take([{"sku": "A1", "quantity": 4}, {"sku": "B2", "quantity": 1}, {"sku": "A1", "quantity": 5}]) == {}
    assert available() == 1
    assert [(move["sku"], move["quantity"]) for move in made.made()] == [("A1", 9), ("B2", 1)]
    assert made.take([{"sku": "B2", "quantity": 2}, {"sku": "B2", "quantity": 2}]) == {"B2": "out_of_stock"}


def test_a_line_that_is_short_takes_nothing_of_the_others(moves, available, pending):
    made = StockMoves(moves, ORDER, "a")
    assert made.take([{"sku": "A1", "quantity": 1}, {"sku": "C3", "quantity": 1}]) == {"C3": "out_of_stock"}
    assert available() == 10 and pending() == set() and made.made() == []


def test_a_doubtful_shortage_is_never_final(moves, pending):
    moves.take("other", "o1", {"A1": 8})
    line = [{"sku": "A1", "quantity": 4}]
    made = StockMoves(moves, ORDER, "a")
    with pytest.raises(StockInDoubt):
        made.take(line)
    with pytest.raises(StockInDoubt):  # also where the handler swallowed it
        made.made()
    assert pending() == {"other"}
    moves.commit("other", {"A1": 8})
    wait_for(lambda: pending() == set(), 5)
    assert StockMoves(moves, ORDER, "b").take(line) == {"A1": "out_of_stock"}


def test_what_an_attempt_holds_itself_leaves_it_in_no_doubt(moves, available):
    made = StockMoves(moves, ORDER, "a")
    assert made.take([{"sku": "A1", "quantity": 8}]) == {}
    assert made.take([{"sku": "A1", "quantity": 4}]) == {"A1": "out_of_stock"}
    assert available() == 2 and [move["quantity"] for move in made.made()] == [8]


def test_moves_are_committed_or_rolled_back_together(moves, available, pending):
    for end, units in (("roll_back", 10), ("commit", 7)):
        made = StockMoves(moves, ORDER, end)
        made.take([{"sku": "A1", "quantity": 1}])
        made.take([{"sku": "A1", "quantity": 2}])
        getattr(made, end)()
        wait_for(lambda: pending() == set(), 5)
        assert available() == units


HOLDING = {"_id": "o", "steps": [{"moves": [{"move": "n", "sku": "A1", "quantity": 4}]}]}


def test_a_give_back_returns_exactly_what_recorded_steps_hold(moves, available, pending):
    made = StockMoves(moves, HOLDING, "a")
    made.give_back()
    assert [(move["sku"], move["quantity"]) for move in made.made()] == [("A1", -4)]
    made.commit()
    wait_for(lambda: available() == 14, 5)
    nothing = StockMoves(moves, ORDER, "b")
    nothing.give_back()
    assert nothing.made() == [] and pending() == set()


def test_giving_back_twice_in_one_run_gives_back_once(moves, available):
    made = StockMoves(moves, HOLDING, "a")
    made.give_back()
    made.give_back()
    made.commit()
    wait_for(lambda: available() >= 14, 5)
    assert available() == 14 and sum(move["quantity"] for move in made.made()) == -4


def test_an_unknown_outcome_that_a_handler_swallows_cannot_be_recorded(moves, monkeypatch):
    """Whether the units are held nobody knows; were they recorded as held, a later give-back could make units up."""
    made = StockMoves(moves, HOLDING, "a")
    for name, call in (("take", lambda: made.take([{"sku": "A1", "quantity": 1}])), ("give_back", made.give_back)):
        monkeypatch.setattr(moves, name, lambda *_: (_ for _ in ()).throw(StoreUnavailable("no answer")))
        with pytest.raises(StoreUnavailable):
            call()
        with pytest.raises(StoreUnavailable):
            made.made()
