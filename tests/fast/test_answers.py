"""What a handler answers: which answers count, and the events that are made of them."""

import re
import uuid

import pytest

from core.order.answers import check_answers, follow_up
from core.order.events import Event, EventInvalid
from tests.fakes import event
from tests.support.samples import LABEL


def test_the_same_answer_of_one_handler_keeps_its_id():
    parent = event("order_created")
    first, again, other, second = (
        follow_up(parent, handler, position, Event("inventory_reserved"), "pending").id
        for handler, position in [("inventory", 0), ("inventory", 0), ("audit", 0), ("inventory", 1)]
    )
    assert first == again and len({first, other, second}) == 3
    assert first == str(uuid.uuid5(uuid.UUID(parent.id), "inventory/inventory_reserved/0"))


def test_an_answer_belongs_to_its_parents_order_and_trace():
    parent = event("order_created")
    [answer] = check_answers(parent, "inventory", Event("order_failed", reason="out_of_stock"))
    assert (answer.subject, answer.traceparent) == (parent.subject, parent.traceparent)
    assert (answer.source, answer.orderstatus) == ("/orderproc/handlers/inventory", "failed")


def test_an_answer_without_a_status_leaves_the_orders_status_unchanged():
    [answer] = check_answers(event("order_created"), "inventory", Event("inventory_reserved"))
    assert answer.orderstatus == "pending"


@pytest.mark.parametrize("returned", [None, [], (), iter([])], ids=["None", "a list", "a tuple", "a generator"])
def test_no_answer_is_fine(returned):
    assert check_answers(event("order_failed"), "email", returned) == []


@pytest.mark.parametrize("form", [list, tuple, iter], ids=["a list", "a tuple", "a generator"])
def test_several_answers_come_in_any_iterable(form):
    answers = check_answers(event("order_created"), "inventory", form([Event("inventory_reserved")] * 2))
    assert [answer.type for answer in answers] == ["inventory_reserved"] * 2
    assert answers[0].id != answers[1].id


def test_what_a_handler_returned_is_left_as_it_is():
    returned = Event("inventory_reserved")
    [answer] = check_answers(event("order_created"), "inventory", returned)
    assert answer is not returned and (returned.id, returned.subject, returned.time, returned.data) == ("", "", "", {})


@pytest.mark.parametrize(
    ("parent", "answers", "why"),
    [
        ("order_created", [Event("order_failed", reason="x"), Event("order_confirmed", shipment=LABEL)], "at most one"),
        ("order_failed", [Event("order_confirmed", shipment=LABEL)], "none on a final order"),
        ("order_cancelled", [Event("order_failed", reason="x")], "none on a final order"),
        ("order_confirmed", [Event("order_failed", reason="x")], "none on a final order"),
        ("order_created", [Event("order_created")], "answered order_created, which is what it took"),
        ("inventory_reserved", [Event("inventory_reserved")], "answered inventory_reserved, which is what it took"),
        ("order_confirmed", [Event("order_created")], "answered order_created: "),
        ("order_created", [Event("order_cancelled")], "answered order_cancelled"),
        ("order_created", [Event("inventory_resreved")], "did you mean inventory_reserved"),
        ("order_created", [Event("order_failed")], "/data/reason"),
        ("order_created", [Event("order_failed", reason="")], "/data/reason"),
        ("order_created", [Event("order_failed", reason="x" * 201)], "/data/reason"),
        ("order_created", [Event("inventory_reserved", note="x" * 70_000)], "over 65536 bytes"),
    ],
)
def test_an_answer_that_breaks_the_rules_is_refused(parent, answers, why):
    with pytest.raises(EventInvalid, match=re.escape(why)):
        check_answers(event(parent), "inventory", answers)


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (float("nan"), "/data/note is nan (float)"),
        ({"a": [1, {1, 2}]}, "/data/note/a/1 is {1, 2} (set)"),
        (("x", b"bytes"), "/data/note/1 is b'bytes' (bytes)"),
        ("\ud800", r"/data/note is '\ud800' (str)"),
    ],
)
def test_an_answer_that_is_no_json_is_refused_and_says_where(value, where):
    with pytest.raises(EventInvalid, match=re.escape(f"inventory answered inventory_reserved: {where}")):
        check_answers(event("order_created"), "inventory", [Event("inventory_reserved", note=value)])


@pytest.mark.parametrize(("returned", "shown"), [("text", "'t'"), ([None], "None"), ([{"type": "x"}], "{'type': 'x'}")])
def test_what_is_no_event_is_no_answer(returned, shown):
    with pytest.raises(EventInvalid, match=re.escape(f"answered {shown}: it must be an Event, a list of them")):
        check_answers(event("order_created"), "inventory", returned)
