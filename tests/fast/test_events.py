"""Events: what travels, what is accepted as one, which answers of a handler count."""

import json
import re
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import events
from core.events import Event, Invalid, check_answers, follow_up, message_body, new_traceparent, parse
from tests.fakes import ORDER, event

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def body(**changes) -> bytes:
    """An order_created as it travels, with fields changed, or left out where None."""
    envelope = event("order_created").envelope() | changes
    return message_body({name: value for name, value in envelope.items() if value is not None}, ORDER)


# --- the envelope


def test_an_event_survives_the_journey():
    sent = event("order_failed", reason="out_of_stock")
    sent.source = "/orderproc/handlers/inventory"
    got = parse(message_body(sent.envelope(), sent.order))
    assert (got.id, got.type, got.subject, got.time) == (sent.id, sent.type, sent.subject, sent.time)
    assert (got.orderstatus, got.traceparent, got.data) == (sent.orderstatus, sent.traceparent, sent.data)


def test_the_envelope_in_the_outbox_has_no_order_in_it():
    assert event("order_failed", reason="out_of_stock").envelope()["data"] == {"reason": "out_of_stock"}


def test_an_envelope_is_what_cloudevents_ask_for():
    envelope = event("order_created").envelope()
    assert envelope["specversion"] == "1.0" and envelope["datacontenttype"] == "application/json"
    assert envelope["source"] == "/orderproc/api" and envelope["orderstatus"] == "pending"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", envelope["time"])


def test_fields_nobody_knows_are_ignored_on_the_way_in():
    assert parse(body(sequence="7")).type == "order_created"


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "not an event"),
        (b"\xff\xfe", "not an event"),
        (b"[" * 100_000, "not an event"),
        (b"[]", "not an event"),
        (b"{}", "not an event"),
        (b"null", "not an event"),
        (b'{"type": ["order_created"]}', "not an event"),
        (b'{"type": "order_lost"}', "order_created"),
        (b'{"type": "order_created"}', "not a valid order_created"),
        (body(subject=None), "/subject is required"),
        (body(id="41"), "/id must be a UUID"),
        (body(orderstatus="failed"), "/orderstatus"),
        (body(specversion="0.3"), "/specversion"),
    ],
)
def test_what_is_no_event_is_refused_with_a_short_reason(raw, why):
    with pytest.raises(Invalid) as refused:
        parse(raw)
    assert why in str(refused.value) and len(str(refused.value)) < 500


def test_an_event_with_a_bad_trace_starts_a_new_one():
    assert parse(body(traceparent="rubbish")).trace != parse(body(traceparent=None)).trace


def test_an_event_keeps_a_good_trace():
    assert parse(body(traceparent=TRACE)).trace == "4bf92f3577b34da6a3ce929d0e0e4736"


# --- answers


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
    [answer] = check_answers(parent, "inventory", [Event("order_failed", reason="out_of_stock")], ORDER)
    assert (answer.subject, answer.traceparent) == (parent.subject, parent.traceparent)
    assert (answer.source, answer.orderstatus) == ("/orderproc/handlers/inventory", "failed")


def test_an_answer_without_a_status_leaves_the_orders_status_unchanged():
    [answer] = check_answers(event("order_created"), "inventory", [Event("inventory_reserved")], ORDER)
    assert answer.orderstatus == "pending"


def test_no_answer_is_fine():
    assert check_answers(event("order_failed"), "email", [], ORDER) == []


SHIPPED = {"shipment": {"carrier": "post", "trackingNumber": "T-1"}}


@pytest.mark.parametrize(
    ("parent", "answers", "why"),
    [
        ("order_created", [Event("order_failed", reason="x"), Event("order_confirmed", **SHIPPED)], "at most one"),
        ("order_failed", [Event("order_confirmed", **SHIPPED)], "none on a final order"),
        ("order_cancelled", [Event("order_failed", reason="x")], "none on a final order"),
        ("order_confirmed", [Event("order_failed", reason="x")], "none on a final order"),
        ("order_created", [Event("order_created")], "answered order_created"),
        ("order_created", [Event("order_cancelled")], "answered order_cancelled"),
        ("order_created", [Event("inventory_resreved")], "did you mean inventory_reserved"),
        ("order_created", [Event("order_failed")], "/data/reason"),
        ("order_created", [Event("order_failed", reason="")], "/data/reason"),
        ("order_created", [Event("order_failed", reason="x" * 201)], "/data/reason"),
        ("order_created", [Event("inventory_reserved", note="x" * 70_000)], "over 65536 bytes"),
    ],
)
def test_an_answer_that_breaks_the_rules_is_refused(parent, answers, why):
    with pytest.raises(Invalid, match=re.escape(why)):
        check_answers(event(parent), "inventory", answers, ORDER)


@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}, b"bytes"])
def test_an_answer_that_is_no_json_is_refused(value):
    with pytest.raises((TypeError, ValueError)):
        check_answers(event("order_created"), "inventory", [Event("inventory_reserved", note=value)], ORDER)


# --- faults


def test_a_fault_names_the_field_that_is_missing_or_unknown():
    faults = events.find_faults(events.schema("order"), {"custmerId": "ada", "items": [{"sku": "A1", "quantity": 1}]})
    assert {("/customerId", "is required"), ("/custmerId", "is not a known field")} <= set(faults)
    assert ("/items/0/price", "is required") in faults


def test_there_are_at_most_twenty_faults_and_none_echoes_input():
    faults = events.find_faults(events.schema("order"), {str(n) + "x" * 50_000: 1 for n in range(50)})
    assert len(faults) == 20 and all(len(pointer + message) < 400 for pointer, message in faults)


def test_pointers_are_escaped_as_rfc_6901_says():
    assert ("/a~1b~0c", "is not a known field") in events.find_faults(events.schema("order"), {"a/b~c": 1})


def test_every_event_type_that_sets_a_status_has_a_schema():
    assert set(events.STATUS) < set(events.event_schemas())


# --- ids, time, trace


def test_order_ids_are_uuids_version_7_and_sort_by_time():
    made = [uuid.UUID(events.new_order_id()) for _ in range(100)]
    assert {(id.version, id.variant) for id in made} == {(7, uuid.RFC_4122)} and len(set(made)) == 100
    assert [id.int >> 80 for id in made] == sorted(id.int >> 80 for id in made)


def test_now_is_what_the_store_gives_back():
    moment = events.now()
    assert moment.tzinfo is None and moment.microsecond % 1000 == 0


def test_times_have_milliseconds_and_a_z():
    assert events.rfc3339(events.datetime(2026, 1, 31, 9, 30, 0, 7000)) == "2026-01-31T09:30:00.007Z"


@pytest.mark.parametrize("given", [TRACE, TRACE[:-2] + "00", "01" + TRACE[2:] + "-what-comes-later"])
def test_a_good_traceparent_is_kept(given):
    assert new_traceparent(given)[3:52] == given[3:52]


@pytest.mark.parametrize(
    "given",
    [
        "",
        TRACE.upper(),
        TRACE + "-more",
        "ff" + TRACE[2:],
        TRACE + "\n",
        "00-" + "0" * 32 + TRACE[35:],
        TRACE[:36] + "0" * 16 + "-01",
    ],
)
def test_a_bad_traceparent_gives_way_to_a_new_trace(given):
    made = new_traceparent(given)
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-01", made) and made[3:35] not in given.lower()


@given(st.text(max_size=80))
def test_whatever_is_given_a_traceparent_comes_out(given):
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", new_traceparent(given))


def test_a_body_is_json_in_utf_8():
    assert json.loads(message_body(event("order_created").envelope(), {**ORDER, "customerId": "Zoë"}).decode())
