"""What can happen to an order: events, the four statuses, and the JSON Schemas that say what is valid.

An event travels as a CloudEvents 1.0 envelope (https://github.com/cloudevents/spec). Knows no database, broker or HTTP.
"""

import json
import os
import re
import time
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from typing import Any

import jsonschema

from core.settings import ROOT

STATUS = {
    "order_created": "pending",
    "order_confirmed": "processed",
    "order_failed": "failed",
    "order_cancelled": "cancelled",
}
FINAL = ("processed", "failed", "cancelled")
FACTS = {"order_failed": {"reason": "failureReason"}, "order_confirmed": {"shipment": "shipment"}}  # field: order's
FROM_API_ONLY = ("order_created", "order_cancelled")
MOST_FAULTS = 20
ATTRIBUTES = ("id", "source", "subject", "time", "orderstatus", "traceparent")  # of the envelope, as of Event
LARGEST_EVENT = 64 * 1024  # bytes of one envelope; with its order it stays far below what any broker takes


class Invalid(Exception):
    """A message that is no event, or an answer that breaks the rules; the text says how."""


class Event:
    """One thing that happened to one order. A handler gives type and data; recording it fills in the rest."""

    id = source = subject = time = orderstatus = traceparent = ""

    def __init__(self, type: str, /, **data: Any) -> None:
        self.type, self.data = type, data

    @property
    def order(self) -> dict[str, Any]:
        """The order as the API shows it, without its timeline; as new as the event or newer."""
        return self.data["order"]

    @property
    def trace(self) -> str:
        """The trace id (32 hex digits) inside `traceparent`."""
        return self.traceparent[3:35]

    def envelope(self) -> dict[str, Any]:
        """The CloudEvents envelope, as the outbox keeps it: without the order."""
        attributes = {name: getattr(self, name) for name in ATTRIBUTES}
        data = {name: value for name, value in self.data.items() if name != "order"}
        fixed = {"specversion": "1.0", "datacontenttype": "application/json"}
        return fixed | attributes | {"type": self.type, "data": data}


def created_by_api(type: str, order_id: str, traceparent: str, event_id: str | None = None) -> Event:
    """An event the API announces."""
    return _filled(Event(type), event_id or str(uuid.uuid4()), "/orderproc/api", order_id, STATUS[type], traceparent)


def follow_up(parent: Event, handler: str, position: int, answer: Event, status: str) -> Event:
    """A handler's answer as an event of its order; the id comes from the parent's, so a repeat is recognised.

    A new event: a handler may return the same `Event` object for every order, and on several threads at once.
    """
    event_id = str(uuid.uuid5(uuid.UUID(parent.id), f"{handler}/{answer.type}/{position}"))
    return _filled(
        Event(answer.type, **answer.data),
        event_id,
        f"/orderproc/handlers/{handler}",
        parent.subject,
        status,
        parent.traceparent,
    )


def _filled(event: Event, id: str, source: str, subject: str, orderstatus: str, traceparent: str) -> Event:
    event.id, event.source, event.subject, event.orderstatus = id, source, subject, orderstatus
    event.traceparent, event.time = traceparent, rfc3339(now())
    return event


def message_body(envelope: dict[str, Any], order: dict[str, Any]) -> bytes:
    """The envelope with its order put in, as it travels."""
    whole = {**envelope, "data": {"order": order, **envelope["data"]}}
    return json.dumps(whole, ensure_ascii=False, allow_nan=False).encode()


def parse(body: bytes) -> Event:
    """The event in a message body. Raises Invalid, which says what is wrong with it."""
    try:
        envelope = json.loads(body)
        type = envelope["type"]
        faults = find_faults(event_schemas()[type], envelope)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Invalid(f"not an event with a type of {', '.join(event_schemas())}: {error!r:.200}") from None
    if faults:
        raise Invalid(f"not a valid {type}: {faults[0][0]} {faults[0][1]}")
    return _parsed(envelope)


def _parsed(envelope: dict[str, Any]) -> Event:
    try:
        uuid.UUID(envelope["id"])  # follow-up ids are derived from it
    except ValueError:
        raise Invalid(f"/id must be a UUID, not {envelope['id']!r:.100}") from None
    event = Event(envelope["type"], **envelope["data"])
    vars(event).update({name: envelope.get(name, "") for name in ATTRIBUTES})
    event.traceparent = new_traceparent(event.traceparent)
    return event


def check_answers(parent: Event, handler: str, answers: Iterable[Event], order: dict[str, Any]) -> list[Event]:
    """A handler's answers, filled in and checked against the rules and their schemas. Raises Invalid."""
    answers = list(answers)
    with_status = [answer.type for answer in answers if answer.type in STATUS]
    if len(with_status) > 1 or (with_status and parent.orderstatus in FINAL):
        raise Invalid(f"{handler} answered {', '.join(with_status)}: at most one with a status, none on a final order")
    status = STATUS[with_status[0]] if with_status else parent.orderstatus
    events = [follow_up(parent, handler, n, answer, status) for n, answer in enumerate(answers)]
    for event in events:
        _check_answer(event, handler, order)
    return events


def _check_answer(event: Event, handler: str, order: dict[str, Any]) -> None:
    if event.type in FROM_API_ONLY or event.type not in event_schemas():
        raise Invalid(f"{handler} answered {event.type}: {near(event.type, set(event_schemas()) - set(FROM_API_ONLY))}")
    body = message_body(event.envelope(), order)
    faults = find_faults(event_schemas()[event.type], json.loads(body))
    if faults or len(body) > LARGEST_EVENT + len(json.dumps(order)):
        raise Invalid(f"{handler} answered {event.type}: {faults[0] if faults else f'over {LARGEST_EVENT} bytes'}")


def near(word: str, words: Iterable[str]) -> str:
    """A hint for a word that is not one of `words`."""
    import difflib

    match = difflib.get_close_matches(word, list(words), 1)
    return f"did you mean {match[0]}?" if match else f"it must be one of {', '.join(sorted(words))}"


# --- schemas -------------------------------------------------------------------------------------------------------


@cache
def schema(name: str) -> jsonschema.Draft202012Validator:
    """The validator of `schemas/<name>.json`; made once, because making one costs far more than using it."""
    return jsonschema.Draft202012Validator(json.loads((ROOT / f"schemas/{name}.json").read_text()))


@cache
def event_schemas() -> dict[str, jsonschema.Draft202012Validator]:
    """Event type -> validator; a new event type is one more file in `schemas/events/`."""
    return {path.stem: schema(f"events/{path.stem}") for path in sorted((ROOT / "schemas/events").glob("*.json"))}


def find_faults(validator: jsonschema.Draft202012Validator, value: Any) -> list[tuple[str, str]]:
    """What is wrong, as (JSON Pointer, what would be right); one per field, at most 20, empty where all is well."""
    found: dict[str, str] = {}
    for error in validator.iter_errors(value):  # found one by one, so this stops early on a hopeless value
        for pointer, message in _explain(error):
            found.setdefault(pointer, message)
        if len(found) >= MOST_FAULTS:
            break
    return list(found.items())[:MOST_FAULTS]


def _explain(error: jsonschema.ValidationError) -> list[tuple[str, str]]:
    # Our own words: the library's echo the input, which may be a megabyte.
    pointer = "".join(map(_pointed, error.absolute_path))
    rule, limit, value = error.validator, error.validator_value, error.instance
    if rule == "required":
        return [(pointer + _pointed(name), "is required") for name in limit if name not in value]
    if rule == "additionalProperties":
        known = error.schema["properties"]
        return [(pointer + _pointed(name), "is not a known field") for name in value if name not in known]
    return [(pointer, WORDS.get(rule, "{schema[description]}").format(limit=limit, schema=error.schema))]


def _pointed(part: str | int) -> str:
    return "/" + str(part)[:200].replace("~", "~0").replace("/", "~1")


WORDS = {
    "type": "must be of type {limit}", "minimum": "must be at least {limit}", "maximum": "must be at most {limit}",
    "minItems": "must have at least {limit} entries", "maxItems": "must have at most {limit} entries",
    "minLength": "must have at least {limit} characters", "maxLength": "must have at most {limit} characters",
    "enum": "must be one of {limit}", "const": "must be {limit}",
}  # fmt: skip


# --- ids, time, trace ----------------------------------------------------------------------------------------------


def new_order_id() -> str:
    """A UUIDv7 (RFC 9562): sorts by the millisecond it was made in."""
    number = (time.time_ns() // 1_000_000 << 80) | int.from_bytes(os.urandom(10))
    number = number & ~(0xF << 76) | 0x7 << 76
    return str(uuid.UUID(int=number & ~(0x3 << 62) | 0x2 << 62))


def now() -> datetime:
    """The time in UTC as the store gives it back: without a zone, cut to milliseconds."""
    moment = datetime.now(UTC).replace(tzinfo=None)
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def rfc3339(moment: datetime) -> str:
    """2026-01-31T09:30:00.000Z"""
    return moment.isoformat(timespec="milliseconds") + "Z"


def new_traceparent(given: str = "") -> str:
    """The caller's W3C traceparent where it is a good one, else a new trace."""
    match = re.fullmatch(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", given)
    if match and int(match[1], 16) and int(match[2], 16) and (given[:2] != "00" or not match[4]):
        return f"00-{match[1]}-{match[2]}-{match[3]}"
    return f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-01"
