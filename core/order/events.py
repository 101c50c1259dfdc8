"""An event: one thing that happened to one order. It travels as a CloudEvents 1.0 envelope, with the order put in.

https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md
"""

import json
import uuid
from typing import Any

from core.base.ids import new_traceparent, now, rfc3339, trace_id
from core.order.schemas import event_schemas, find_faults

Envelope = dict[str, Any]


class EventInvalid(Exception):
    """A message that is no event, or an answer that breaks the rules; the text says how."""


class Event:
    """One thing that happened to one order. A handler gives type and data; the rest is filled in on a copy of it."""

    def __init__(self, type: str, /, **data: Any) -> None:
        self.type, self.data = type, data
        self.id = self.source = self.subject = self.time = self.orderstatus = self.traceparent = ""

    @property
    def order(self) -> dict[str, Any]:
        """The order as the API shows it, without its timeline; as new as the event or newer."""
        return self.data["order"]

    @property
    def trace(self) -> str:
        """The trace id inside `traceparent`."""
        return trace_id(self.traceparent)

    def envelope(self) -> Envelope:
        """The CloudEvents envelope, as the outbox keeps it: without the order."""
        return {
            "specversion": "1.0", "id": self.id, "source": self.source, "type": self.type, "subject": self.subject,
            "time": self.time, "datacontenttype": "application/json", "orderstatus": self.orderstatus,
            "traceparent": self.traceparent,
            "data": {name: value for name, value in self.data.items() if name != "order"},
        }  # fmt: skip


def make_event(
    type: str, data: dict[str, Any], *, id: str, source: str, subject: str, orderstatus: str, traceparent: str,
    time: str = "",
) -> Event:  # fmt: skip
    """An event with all that belongs to it; without a time it happens now."""
    event = Event(type, **data)
    event.id, event.source, event.subject, event.orderstatus = id, source, subject, orderstatus
    event.traceparent, event.time = traceparent, time or rfc3339(now())
    return event


def message_body(envelope: Envelope, order: dict[str, Any]) -> bytes:
    """The envelope with its order put in, as it travels."""
    whole = {**envelope, "data": {"order": order, **envelope["data"]}}
    return json.dumps(whole, ensure_ascii=False, allow_nan=False).encode()


def parse(body: bytes) -> Event:
    """The event in a message body. Raises EventInvalid, which says what is wrong with it."""
    try:
        envelope = json.loads(body)
        type = envelope["type"]
        faults = find_faults(event_schemas()[type], envelope)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise EventInvalid(f"not an event with a type of {', '.join(event_schemas())}: {error!r:.200}") from None
    if faults:
        raise EventInvalid(f"not a valid {type}: {faults[0][0]} {faults[0][1]}")
    try:
        uuid.UUID(envelope["id"])  # ids of what follows are derived from it
    except ValueError:
        raise EventInvalid(f"/id must be a UUID, not {envelope['id']!r:.100}") from None
    attributes = {name: envelope[name] for name in ("id", "source", "subject", "time", "orderstatus")}
    trace = new_traceparent(envelope.get("traceparent", ""))
    return make_event(envelope["type"], envelope["data"], traceparent=trace, **attributes)
