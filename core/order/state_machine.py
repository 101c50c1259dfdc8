"""The order as a state machine: its document, and every decision about it. Pure: no store, no broker, no clock.

A decision is a `Change`: what must hold of the order, and what becomes of it then. `core/store/orders.py` makes one
conditional write of it. A condition that has become false never becomes true again: so the first writer wins, and a
change may be written again at any time. (But for `failed_attempt`, whose line may be cut off and written again.)
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple, TypedDict

from core.order.events import Envelope, Event

Line = dict[str, Any]  # of the timeline: {"at", "by", and "event", "done", "failed", "parked" or "sent": an event type}
# How a delivery ended. `done`: this attempt is recorded; `already`: another one is; `lost`: its answers came too late;
# `skipped`: the order has moved on, or another release's handler takes the event; `fenced`: the sweep ruled this
# attempt out; `retried` and `parked`: it failed, for now or for good.
Outcome = Literal["done", "already", "lost", "skipped", "fenced", "retried", "parked"]


class Transition(NamedTuple):
    """What an event needs of its order, and does to it."""

    needs: str  # the status before; empty where there is no order yet
    leaves: str  # the status after
    by: str  # who may announce it: "api" or "handler"
    copies: dict[str, str] = {}  # field of the event's data -> field of the order  # noqa: RUF012


TRANSITIONS = {  # any other event (inventory_reserved) leaves the status as it is, and handlers announce it
    "order_created": Transition("", "pending", "api"),
    "order_confirmed": Transition("pending", "processed", "handler", {"shipment": "shipment"}),
    "order_failed": Transition("pending", "failed", "handler", {"reason": "failureReason"}),
    "order_cancelled": Transition("pending", "cancelled", "api"),
}
MOST_EVENTS = 200  # that an order announces; handlers that answer each other would fill the document for ever
STATUSES = list(dict.fromkeys(row.leaves for row in TRANSITIONS.values()))


class Move(TypedDict):
    """Units that an attempt held for the order; negative where it gave them back."""

    move: str  # <attempt id>.<number>: the pending move's id in the stock document
    sku: str
    quantity: int


class Step(TypedDict):
    """A handler's work on one event, as it is recorded; only one attempt ever is."""

    step: str  # handler/event id
    attempt: str
    moves: list[Move]
    ms: int  # that the handler took


class OrderDocument(TypedDict, total=False):
    """One order as it is stored. Money is in minor units, times are in UTC."""

    _id: str
    requestKey: str  # unique: whose Idempotency-Key it is
    fingerprint: str  # of the request's body
    owner: str
    status: str
    customerId: str
    email: str
    currency: str
    items: list[dict[str, Any]]
    total: int
    shippingAddress: dict[str, str]
    createdAt: datetime
    updatedAt: datetime
    failureReason: str
    shipment: dict[str, str]
    timeline: list[Line]
    events: list[Envelope]  # all that were announced
    outbox: list[str]  # ids of those that the broker has not confirmed
    outboxSince: datetime  # when the oldest of them came; absent where there is none
    steps: list[Step]
    fenced: list[str]  # attempts that can never be recorded
    parked: list[str]  # steps that were set aside after the last try
    redriven: list[str]  # steps that the sweep sends at its next look, as somebody asked for it
    stockReturned: bool
    touched: datetime  # what the sweep's patience counts from: the last change or, after a failed try, the next try
    due: datetime  # when the sweep looks next; absent once nothing is in the outbox, unfinished or parked
    sweeps: int  # how often it sent events again since `touched`
    rev: int  # raised by every Change: the sweep's own write is dropped if one came after it read the order


@dataclass(frozen=True, kw_only=True)
class Change:
    """What must hold of an order, and what becomes of it."""

    order_id: str
    at: datetime
    status: str  # must be the order's
    lines: Sequence[Line]  # go into the timeline
    events: Sequence[Event] = ()  # are announced: they go into the outbox
    step: str = ""  # must not be recorded yet
    record: Step | None = None  # is recorded; its attempt must not be fenced
    failed_attempt: str = ""  # must not have a line in the timeline yet
    next_try: datetime | None = None
    park: bool = False  # whether the step is among the parked ones afterwards

    @property
    def fields(self) -> dict[str, Any]:
        """What the events make of the order: its status, and what is copied out of them."""
        fields: dict[str, Any] = {}
        for event in self.events:
            if row := TRANSITIONS.get(event.type):
                copies = {field: event.data[name] for name, field in row.copies.items()}
                fields |= {"status": row.leaves, "parked": []} | copies  # a new status supersedes what was parked
        return fields

    @property
    def returns_stock(self) -> bool:
        """Whether units are given back. Then none may have been given back before."""
        return self.record is not None and any(move["quantity"] < 0 for move in self.record["moves"])


# --- decisions -------------------------------------------------------------------------------------------------------


def new_order(order: dict[str, Any], event: Event, at: datetime) -> OrderDocument:
    """The document of a new order (with its `_id`, owner and all that the client sent), and the event it announces."""
    document: Any = {
        **order, "status": TRANSITIONS[event.type].leaves, "createdAt": at, "updatedAt": at,
        "timeline": [{"at": at, **announced(event, "api")}], "events": [event.envelope()], "outbox": [event.id],
        "outboxSince": at, "steps": [], "fenced": [], "parked": [], "touched": at, "sweeps": 0, "rev": 0,
    }  # fmt: skip
    return document


def cancel(event: Event, at: datetime) -> Change:
    """A pending order is cancelled."""
    needed, lines = TRANSITIONS[event.type].needs, [announced(event, "api")]
    return Change(order_id=event.subject, at=at, status=needed, lines=lines, events=[event])


def record(event: Event, step: Step, answers: Sequence[Event], at: datetime) -> Change:
    """An attempt did its step, and these events follow."""
    by, ms = handler_of(step["step"]), step["ms"]
    lines = [announced(answer, by) | {"of": event.type, "ms": ms} for answer in answers]
    lines = lines or [{"done": event.type, "by": by, "ms": ms}]
    return Change(
        order_id=event.subject, at=at, status=event.orderstatus,
        lines=lines, events=answers, step=step["step"], record=step,
    )  # fmt: skip


def fail(event: Event, step: str, attempt: str, why: Line, wait: float | None, at: datetime) -> Change:
    """A try failed; the next one is `wait` seconds away, or there is none and the step is parked.

    `why` goes into the timeline: {"try", "error", "where"}.
    """
    kind, next_try = ("parked", None) if wait is None else ("failed", at + timedelta(seconds=wait))
    line = {kind: event.type, "by": handler_of(step), **why, "attempt": attempt, "next": next_try}
    return Change(
        order_id=event.subject, at=at, status=event.orderstatus, lines=[line], step=step,
        failed_attempt=attempt, next_try=next_try, park=wait is None,
    )  # fmt: skip


def announced(event: Event, by: str) -> Line:
    """What the timeline says of an event."""
    return {"event": event.type, "id": event.id, "by": by}


def step_name(handler: str, event_id: str) -> str:
    """What a step is recorded under."""
    return f"{handler}/{event_id}"


def handler_of(step: str) -> str:
    """Whose step it is."""
    return step.partition("/")[0]


# --- what an order says ----------------------------------------------------------------------------------------------


def outcome_of(order: OrderDocument, event: Event, step: str, attempt: str) -> Outcome | None:
    """What became of an attempt, as the order tells it; None where nothing is decided yet.

    `event.orderstatus` is the status in which the event left the order. `parked` does not count: what is redriven runs.
    """
    for recorded in order["steps"]:
        if recorded["step"] == step:
            return "done" if recorded["attempt"] == attempt else "already"
    if order["status"] != event.orderstatus:
        return "lost"
    return "fenced" if attempt in order.get("fenced", []) else None


def holdings(order: OrderDocument) -> dict[str, int]:
    """{sku: units} that the order's recorded steps hold."""
    held: Counter[str] = Counter()
    for step in order["steps"]:
        for move in step["moves"]:
            held[move["sku"]] += move["quantity"]
    return {sku: units for sku, units in held.items() if units > 0}


def unfinished_steps(order: OrderDocument, subscribers: dict[str, list[str]]) -> list[tuple[str, Envelope]]:
    """(handler, envelope) of the steps that the order's events still ask for.

    `subscribers` is {event type: handlers}. An event whose status is no longer the order's asks for nothing.
    """
    settled = {step["step"] for step in order["steps"]} | set(order["parked"])
    current = [event for event in order["events"] if event["orderstatus"] == order["status"]]
    steps = [(handler, event) for event in current for handler in subscribers.get(event["type"], [])]
    return [(handler, event) for handler, event in steps if step_name(handler, event["id"]) not in settled]
