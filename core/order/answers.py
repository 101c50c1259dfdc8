"""What a handler answered, made into events of its order and checked against the rules."""

import json
import uuid
from collections.abc import Iterable
from typing import Any

from core.order.events import Event, EventInvalid, make_event, message_body
from core.order.schemas import event_schemas, find_faults, nearest
from core.order.state_machine import MOST_EVENTS, TRANSITIONS

LARGEST_EVENT = 64 * 1024  # bytes of one envelope; with its order it stays far below what any broker takes


def check_answers(
    parent: Event, handler: str, returned: Event | Iterable[Event] | None, room: int = MOST_EVENTS
) -> list[Event]:
    """What a handler returned for `parent`, as new events: at most one with a status, none on a final order, and no
    more than the order has `room` for.

    New ones, because a handler may return the same object for every order. Raises EventInvalid where an answer breaks
    a rule or its schema, or JSON cannot hold it.
    """
    answers = [returned] if isinstance(returned, Event) else list(() if returned is None else returned)
    if strangers := [answer for answer in answers if not isinstance(answer, Event)]:
        raise EventInvalid(f"{handler} answered {strangers[0]!r:.50}: it must be an Event, a list of them, or nothing")
    if parent.type in [answer.type for answer in answers]:  # with nobody between, that would go on for ever
        raise EventInvalid(f"{handler} answered {parent.type}, which is what it took")
    setting = [answer.type for answer in answers if answer.type in TRANSITIONS]
    if len(setting) > 1 or any(TRANSITIONS[type].needs != parent.orderstatus for type in setting):
        raise EventInvalid(f"{handler} answered {', '.join(setting)}: at most one with a status, none on a final order")
    if len(answers) > room:
        raise EventInvalid(f"{handler} answered {len(answers)} events: an order has at most {MOST_EVENTS}")
    status = TRANSITIONS[setting[0]].leaves if setting else parent.orderstatus
    events = [follow_up(parent, handler, position, answer, status) for position, answer in enumerate(answers)]
    for event in events:
        _check(event, handler, parent.order)
    return events


def follow_up(parent: Event, handler: str, position: int, answer: Event, status: str) -> Event:
    """An answer as an event of its parent's order; its id is derived from the parent's, so a repeat is recognised."""
    event_id = str(uuid.uuid5(uuid.UUID(parent.id), f"{handler}/{answer.type}/{position}"))
    return make_event(
        answer.type, answer.data, id=event_id, source=f"/orderproc/handlers/{handler}", subject=parent.subject,
        orderstatus=status, traceparent=parent.traceparent,
    )  # fmt: skip


def _check(event: Event, handler: str, order: dict[str, Any]) -> None:
    from_handlers = [type for type in event_schemas() if type not in TRANSITIONS or TRANSITIONS[type].by == "handler"]
    if event.type not in from_handlers:
        raise EventInvalid(f"{handler} answered {event.type}: {nearest(event.type, from_handlers)}")
    try:
        body = message_body(event.envelope(), order)
    except (TypeError, ValueError) as error:
        odd = _find_odd(event.data, "/data") or error
        raise EventInvalid(f"{handler} answered {event.type}: {odd}, which JSON cannot hold") from None
    faults = find_faults(event_schemas()[event.type], json.loads(body))
    if faults or len(body) > LARGEST_EVENT + len(json.dumps(order)):
        raise EventInvalid(f"{handler} answered {event.type}: {faults[0] if faults else f'over {LARGEST_EVENT} bytes'}")


def _find_odd(value: Any, pointer: str) -> str:
    """The first value that JSON cannot hold, as its JSON Pointer and type; empty where there is none."""
    if isinstance(value, dict | list | tuple):
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        return next(filter(None, (_find_odd(child, f"{pointer}/{name}") for name, child in inside)), "")
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        return ""
    except (TypeError, ValueError):
        return f"{pointer} is {value!r:.50} ({type(value).__name__})"
