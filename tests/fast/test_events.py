"""Events: what travels, and what is accepted as one."""

import json
import re

import pytest

from core.order.events import Event, EventInvalid, make_event, message_body, parse
from tests.fakes import ORDER, event

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def body(**changes) -> bytes:
    """An order_created as it travels, with fields changed, or left out where None."""
    envelope = event("order_created").envelope() | changes
    return message_body({name: value for name, value in envelope.items() if value is not None}, ORDER)


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
    with pytest.raises(EventInvalid) as error:
        parse(raw)
    assert why in str(error.value) and len(str(error.value)) < 500


def test_an_event_with_a_bad_trace_starts_a_new_one():
    assert parse(body(traceparent="rubbish")).trace != parse(body(traceparent=None)).trace


def test_an_event_keeps_a_good_trace():
    assert parse(body(traceparent=TRACE)).trace == "4bf92f3577b34da6a3ce929d0e0e4736"


def test_a_body_is_json_in_utf_8():
    assert json.loads(message_body(event("order_created").envelope(), {**ORDER, "customerId": "Zoë"}).decode())


def test_a_field_of_the_data_may_have_any_name():
    data = {"type": "gift", "self": 1, "id": "7", "time": "late"}
    made = make_event("order_failed", data, id="i", source="s", subject="o", orderstatus="failed", traceparent="t")
    assert (made.type, made.id, made.data) == ("order_failed", "i", data)
    assert Event("order_failed", **data).data == data
