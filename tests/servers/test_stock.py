"""The stock, on mongomock (no server needed) and on a real store: the same promises on both."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from core.base.ids import now
from core.flow.services import StockInDoubt, StockMoves
from core.store.connection import StoreUnavailable
from core.store.stock import Stock
from tools.chaos.system import wait_for


@pytest.fixture
def stock(database):
    stock = Stock(database)
    stock.fill({"A1": 10, "B2": 3, "C3": 0})
    return stock


@pytest.fixture
def available(stock):
    return lambda sku="A1": stock.get(sku)["available"]


@pytest.fixture
def pending(database):
    """The ids of all pending moves."""
    return lambda: {move["id"] for document in database["stock"].find() for move in document.get("moves", [])}


def commit(stock, pending, id, moves):
    """Commit moves, and wait until it is done."""
    stock.commit(id, moves)
    wait_for(lambda: id not in pending(), 5)


# --- what the API calls


def test_stock_shows_the_units_free_to_sell_and_nothing_else(stock):
    stock.take("n", "o", {"A1": 4})
    assert stock.get("A1") == {"sku": "A1", "available": 6} and stock.get("Z9") is None


def test_pages_come_by_sku_and_begin_behind_a_cursor(stock):
    stock.fill({f"S{n}": n for n in range(4)})
    assert [entry["sku"] for entry in stock.page(None, 4)] == ["A1", "B2", "C3", "S0"]
    assert stock.page("S1", 4) == [{"sku": "S2", "available": 2}, {"sku": "S3", "available": 3}]


def test_filling_never_writes_over_what_is_there(stock, available):
    stock.take("n", "o", {"A1": 4})
    stock.fill({"A1": 10, "D4": 1})
    assert (available("A1"), available("D4")) == (6, 1)


def test_setting_stock_leaves_what_is_held_in_doubt_alone(stock, available, pending):
    stock.take("n", "o", {"A1": 4})
    assert stock.put("A1", 100) == {"sku": "A1", "available": 100}
    assert available() == 100 and pending() == {"n"}
    stock.roll_back("n", {"A1": 4})
    assert available() == 104


def test_setting_stock_makes_a_sku_that_can_be_taken(stock, available):
    stock.put("N1", 2)
    assert stock.take("n", "o", {"N1": 2}) == {} and available("N1") == 0


def test_many_first_writes_of_a_sku_at_once_make_one(stock, database):
    with ThreadPoolExecutor(16) as crowd:
        assert all(crowd.map(lambda n: stock.put("N1", n), range(16)))
    assert database["stock"].count_documents({"_id": "N1"}) == 1


# --- taking


def test_a_take_removes_units_at_once_leaving_a_pending_move(stock, available, database):
    assert stock.take("n", "o", {"A1": 4, "B2": 3}) == {}
    assert (available("A1"), available("B2")) == (6, 0)
    [move] = database["stock"].find_one({"_id": "A1"})["moves"]
    assert move.items() >= {"id": "n", "order": "o", "units": 4}.items()


def test_a_take_repeated_takes_once(stock, available):
    for _ in range(2):
        assert stock.take("n", "o", {"A1": 4}) == {}
    assert available() == 6


def test_of_each_sku_all_units_are_taken_or_none(stock, available):
    assert stock.take("n", "o", {"A1": 11, "B2": 2}) == {"A1": "out_of_stock"}
    assert (available("A1"), available("B2")) == (10, 1)


def test_a_sku_nobody_knows_is_unknown(stock):
    assert stock.take("n", "o", {"Z9": 1, "C3": 1}) == {"Z9": "unknown_sku", "C3": "out_of_stock"}


def test_units_in_a_pending_take_make_a_shortage_doubtful(stock):
    stock.take("other", "o1", {"A1": 8})
    assert stock.take("n", "o2", {"A1": 4}) == {"A1": "in_doubt"}


def test_units_in_a_pending_give_back_make_a_shortage_doubtful(stock):
    stock.give_back("other", "o1", {"C3": -5})
    assert stock.take("n", "o2", {"C3": 4}) == {"C3": "in_doubt"}


def test_a_shortage_that_no_pending_move_can_end_is_certain(stock):
    stock.take("other", "o1", {"A1": 8})
    assert stock.take("n", "o2", {"A1": 11}) == {"A1": "out_of_stock"}


def test_committed_units_are_gone_for_good(stock, pending):
    stock.take("other", "o1", {"A1": 8})
    commit(stock, pending, "other", {"A1": 8})
    assert stock.take("n", "o2", {"A1": 4}) == {"A1": "out_of_stock"}


def test_of_a_hundred_takes_at_once_exactly_ten_get_units(stock, available, pending):
    with ThreadPoolExecutor(50) as crowd:
        answers = list(crowd.map(lambda n: stock.take(f"n{n}", f"o{n}", {"A1": 1}), range(100)))
    assert answers.count({}) == 10 and available() == 0 and len(pending()) == 10


# --- committing and rolling back


def test_committed_takes_last_and_rolled_back_takes_are_undone(stock, available, pending):
    stock.take("kept", "o", {"A1": 4})
    stock.take("undone", "o", {"A1": 2})
    commit(stock, pending, "kept", {"A1": 4})
    stock.roll_back("undone", {"A1": 2})
    assert available() == 6 and pending() == set()


def test_a_give_back_adds_nothing_until_it_is_committed(stock, available, pending):
    stock.give_back("back", "o", {"A1": -4})
    assert available() == 10 and pending() == {"back"}
    commit(stock, pending, "back", {"A1": -4})
    assert available() == 14


def test_rolling_back_a_give_back_adds_nothing(stock, available, pending):
    stock.give_back("back", "o", {"A1": -4})
    stock.roll_back("back", {"A1": -4})
    assert available() == 10 and pending() == set()


def test_a_give_back_repeated_gives_once(stock, available, pending, database):
    for _ in range(2):
        stock.give_back("back", "o", {"A1": -4})
    assert len(database["stock"].find_one({"_id": "A1"})["moves"]) == 1
    commit(stock, pending, "back", {"A1": -4})
    assert available() == 14


def test_ending_a_pending_move_again_changes_nothing(stock, available, pending):
    stock.take("kept", "o", {"A1": 4})
    commit(stock, pending, "kept", {"A1": 4})
    stock.take("undone", "o", {"A1": 2})
    stock.give_back("back", "o", {"B2": -5})
    commit(stock, pending, "back", {"B2": -5})
    for _ in range(2):
        stock.roll_back("undone", {"A1": 2})
        stock.roll_back("kept", {"A1": 4})
        stock.commit("back", {"B2": -5})
    assert (available("A1"), available("B2")) == (6, 8)


def test_only_the_pending_move_that_is_meant_ends(stock, pending):
    stock.take("a", "o1", {"A1": 1})
    stock.take("b", "o2", {"A1": 1})
    stock.roll_back("a", {"A1": 1})
    assert pending() == {"b"}


# --- what the sweep calls


def test_old_pending_moves_are_those_made_before_a_moment(stock, database):
    stock.take("old", "o1", {"A1": 1, "B2": 1})
    stock.take("new", "o2", {"A1": 1})
    long_ago = now() - timedelta(minutes=2)
    for sku in ("A1", "B2"):
        database["stock"].update_one({"_id": sku, "moves.id": "old"}, {"$set": {"moves.$.at": long_ago}})
    found = stock.old_moves(now() - timedelta(minutes=1), 10)
    assert sorted((sku, move["id"], move["order"]) for sku, move in found) == [("A1", "old", "o1"), ("B2", "old", "o1")]
    assert len({sku for sku, _ in stock.old_moves(now() - timedelta(minutes=1), 1)}) == 1


def end(stock, sku, move, as_committed):
    """End a pending move by its entry, as the sweep does."""
    (stock.commit if as_committed else stock.roll_back)(move["id"], {sku: move["units"]})


@pytest.mark.parametrize(("as_committed", "units"), [(True, 6), (False, 10)])
def test_a_pending_take_commits_or_rolls_back_only_once(stock, available, database, pending, as_committed, units):
    stock.take("n", "o", {"A1": 4})
    [move] = database["stock"].find_one({"_id": "A1"})["moves"]
    for _ in range(2):
        end(stock, "A1", move, as_committed)
    assert available() == units and pending() == set()


@pytest.mark.parametrize(("as_committed", "units"), [(True, 14), (False, 10)])
def test_a_pending_give_back_commits_or_rolls_back_only_once(stock, available, database, pending, as_committed, units):
    stock.give_back("n", "o", {"A1": -4})
    [move] = database["stock"].find_one({"_id": "A1"})["moves"]
    for _ in range(2):
        end(stock, "A1", move, as_committed)
    assert available() == units and pending() == set()


# --- the moves of one attempt, as handlers make them

ORDER = {"_id": "o", "steps": []}


def test_lines_of_one_sku_are_added_up(stock, available):
    moves = StockMoves(stock, ORDER, "a", last_try=False)
    assert moves.take([{"sku": "A1", "quantity": 4}, {"sku": "B2", "quantity": 1}, {"sku": "A1", "quantity": 5}]) == {}
    assert available() == 1
    assert [(move["sku"], move["quantity"]) for move in moves.made()] == [("A1", 9), ("B2", 1)]
    assert moves.take([{"sku": "B2", "quantity": 2}, {"sku": "B2", "quantity": 2}]) == {"B2": "out_of_stock"}


def test_a_line_that_is_short_takes_nothing_of_the_others(stock, available, pending):
    moves = StockMoves(stock, ORDER, "a", last_try=False)
    assert moves.take([{"sku": "A1", "quantity": 1}, {"sku": "C3", "quantity": 1}]) == {"C3": "out_of_stock"}
    assert available() == 10 and pending() == set() and moves.made() == []


def test_a_doubtful_shortage_is_retried_and_finally_out_of_stock(stock, pending):
    stock.take("other", "o1", {"A1": 8})
    line = [{"sku": "A1", "quantity": 4}]
    with pytest.raises(StockInDoubt):
        StockMoves(stock, ORDER, "a", last_try=False).take(line)
    assert StockMoves(stock, ORDER, "b", last_try=True).take(line) == {"A1": "out_of_stock"}
    assert pending() == {"other"}


def test_moves_are_committed_or_rolled_back_together(stock, available, pending):
    for end, units in (("roll_back", 10), ("commit", 7)):
        moves = StockMoves(stock, ORDER, end, last_try=False)
        moves.take([{"sku": "A1", "quantity": 1}])
        moves.take([{"sku": "A1", "quantity": 2}])
        getattr(moves, end)()
        wait_for(lambda: pending() == set(), 5)
        assert available() == units


HOLDING = {"_id": "o", "steps": [{"moves": [{"move": "n", "sku": "A1", "quantity": 4}]}]}


def test_a_give_back_returns_exactly_what_recorded_steps_hold(stock, available, pending):
    moves = StockMoves(stock, HOLDING, "a", last_try=False)
    moves.give_back()
    assert [(move["sku"], move["quantity"]) for move in moves.made()] == [("A1", -4)]
    moves.commit()
    wait_for(lambda: available() == 14, 5)
    nothing = StockMoves(stock, ORDER, "b", last_try=False)
    nothing.give_back()
    assert nothing.made() == [] and pending() == set()


def test_giving_back_twice_in_one_run_gives_back_once(stock, available):
    moves = StockMoves(stock, HOLDING, "a", last_try=False)
    moves.give_back()
    moves.give_back()
    moves.commit()
    wait_for(lambda: available() >= 14, 5)
    assert available() == 14 and sum(move["quantity"] for move in moves.made()) == -4


def test_an_unknown_outcome_that_a_handler_swallows_cannot_be_recorded(stock, monkeypatch):
    """Whether the units are held nobody knows; were they recorded as held, a later give-back could make units up."""
    moves = StockMoves(stock, HOLDING, "a", last_try=False)
    for name, call in (("take", lambda: moves.take([{"sku": "A1", "quantity": 1}])), ("give_back", moves.give_back)):
        monkeypatch.setattr(stock, name, lambda *_: (_ for _ in ()).throw(StoreUnavailable("no answer")))
        with pytest.raises(StoreUnavailable):
            call()
        with pytest.raises(StoreUnavailable):
            moves.made()
