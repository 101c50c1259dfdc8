"""The worker: one delivery from its arrival to its ack.

    python consumer.py                          consume until SIGTERM
    python consumer.py check                    print which handler takes what; needs no server
    python consumer.py dead [HANDLER]           list what was parked, and why
    python consumer.py redrive HANDLER | --all  send it round again     [--limit N] [--dry-run]
    python consumer.py purge HANDLER            throw it away           [--yes]
    python consumer.py retire HANDLER           delete the queues of a handler that is gone   [--yes]

`Worker` is the heart of it: `deliver`, then `process`, then `run_step`. The bus's own thread never waits for it.
"""

import copy
import logging
import threading
import time
import uuid
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

from core.base import logs, metrics
from core.base.settings import SettingInvalid, Settings
from core.bus.bus import Bus, Delivery
from core.flow.outbox import Outbox
from core.flow.services import Functions, Services, StockInDoubt, StockMoves, lambda_client
from core.order.answers import check_answers
from core.order.events import Event, EventInvalid, parse
from core.order.state_machine import MOST_EVENTS, TRANSITIONS, OrderDocument, Outcome, Step, outcome_of, step_name
from core.running import commands, discovery, wiring
from core.running.health import serve_health
from core.running.process import exit_code, leave, read_settings, stop_on_signal
from core.store.connection import DocumentRefused, StoreUnavailable
from core.store.orders import OrderMissing
from core.store.store import Store

log = logging.getLogger("consumer")
GRACE = 9.0  # seconds from SIGTERM to the end, whatever hangs. What is cut off comes again, as after a kill -9.


class AttemptRefused(Exception):
    """Why an attempt is made again: the sweep fenced it, or another handler gave the stock back first.

    Never raised; its name shows in the timeline.
    """


class Attempt(NamedTuple):
    """One run of a step, with an id of its own."""

    delivery: Delivery
    event: Event
    step: str  # what it is recorded under
    id: str


class Worker:
    """Runs handlers on threads of their own, and sees every delivery to its end."""

    def __init__(
        self, handlers: discovery.Handlers, settings: Settings, store: Store, outbox: Outbox, functions: Functions,
        stop: threading.Event,
    ) -> None:  # fmt: skip
        self._handlers, self._delays, self._stop = handlers, settings.retry_delays, stop
        self._store, self._orders, self._outbox, self._functions = store, store.orders, outbox, functions
        # One for each handler: one that hangs takes no other's threads.
        self._pools = {name: ThreadPoolExecutor(settings.concurrency, name) for name in handlers}

    def deliver(self, delivery: Delivery) -> None:
        """Take a delivery off the bus's thread."""
        self._pools[delivery.handler].submit(self._run, delivery)

    def _run(self, delivery: Delivery) -> None:
        try:
            outcome = self.process(delivery)
        except StoreUnavailable:  # only on a stop: nobody is to wait for it any longer
            return delivery.release()
        except BaseException as error:  # this one message is set aside, for a person, and no other suffers
            log.exception("a delivery went wrong in a way nobody thought of; parked")
            outcome = self._park(delivery, logs.text_of(error))
        metrics.DELIVERIES.labels(delivery.handler, outcome).inc()

    def process(self, delivery: Delivery) -> Outcome:
        """See a delivery to its end, however long the store is away. Raises StoreUnavailable on a stop."""
        try:
            event = parse(delivery.body)
        except EventInvalid as error:
            log.error("parked what is no event", extra={"handler": delivery.handler, "error": str(error)})
            return self._park(delivery, str(error))
        with logs.context(order=event.subject, event=event.id, handler=delivery.handler, trace=event.trace):
            while True:
                attempt = Attempt(delivery, event, step_name(delivery.handler, event.id), uuid.uuid4().hex)
                try:
                    with logs.context(attempt=attempt.id):
                        outcome = self.run_step(attempt)
                        log.info(f"{event.type} {outcome}")
                    return outcome
                except (StoreUnavailable, StockInDoubt):  # no outcome: keep the message, spend no try, run it again
                    self._wait_for_the_store()

    def _wait_for_the_store(self) -> None:
        """A second at least, and until it reads and writes. Raises StoreUnavailable on a stop."""
        while not self._stop.wait(1):
            if self._store.ping():
                return
        raise StoreUnavailable("stopped while waiting for the store")

    def run_step(self, attempt: Attempt) -> Outcome:
        """Run the step once: read the order, run the handler, record what it did, and only then ack."""
        delivery, event, step = attempt.delivery, attempt.event, attempt.step
        order = self._orders.get(event.subject)
        if order is None:  # a store that has just failed over may not know it yet
            return self._try_later(attempt, OrderMissing(f"there is no order {event.subject}"))
        outcome = outcome_of(order, event, step, attempt.id)
        # This attempt's id is new, so the order can only say `already`, or that its status moved on: then, skipped.
        # So is a type that only another release of this handler takes: not recorded, it stays unfinished for that one.
        if outcome or event.type not in self._handlers[delivery.handler]:
            delivery.ack()
            return "already" if outcome == "already" else "skipped"
        moves = StockMoves(self._store.moves, order, attempt.id)
        try:
            began = time.monotonic()
            answers = self._run_handler(attempt, moves, MOST_EVENTS - len(order["events"]))
            made = Step(step=step, attempt=attempt.id, moves=moves.made(), ms=round((time.monotonic() - began) * 1000))
            order = self._orders.record(event, made, answers)
        except StoreUnavailable:  # the store did not reply, so the step may be recorded: the moves stay pending
            raise
        except BaseException as error:  # sys.exit, a cancelled asyncio task, a panic of another language: a failed try
            moves.roll_back()
            if isinstance(error, StockInDoubt):  # no try is spent on that
                raise
            return self._try_later(attempt, error)
        return self._conclude(attempt, order, answers, moves)

    def _run_handler(self, attempt: Attempt, moves: StockMoves, room: int) -> list[Event]:
        handler, event = attempt.delivery.handler, attempt.event
        services = Services(moves, self._functions, event.traceparent, logging.getLogger(f"handlers.{handler}"))
        with metrics.HANDLER_SECONDS.labels(handler).time():
            # Its own copy: whatever it does to the event, what it answers is checked against the order as it is.
            answers = self._handlers[handler][event.type](copy.deepcopy(event), services)
            return check_answers(event, handler, answers, room)

    def _conclude(self, attempt: Attempt, order: OrderDocument, answers: list[Event], moves: StockMoves) -> Outcome:
        """What the order says counts: the recorded attempt is committed, any other rolled back.

        What a crash in here leaves undone (an event unpublished, a move pending) the sweep does.
        """
        outcome = outcome_of(order, attempt.event, attempt.step, attempt.id)
        if outcome == "done":
            moves.commit()
            self._publish(order, answers)
        else:
            moves.roll_back()
        # None after a write: it gives stock back, and another handler's step already had. Read anew, nothing is held.
        if outcome is None or outcome == "fenced":
            return self._try_later(attempt, AttemptRefused(), outcome or "retried")
        attempt.delivery.ack()
        return outcome

    def _publish(self, order: OrderDocument, answers: list[Event]) -> None:
        self._outbox.publish_pending(order, answers)
        for status in [TRANSITIONS[answer.type].leaves for answer in answers if answer.type in TRANSITIONS]:
            metrics.ORDERS.labels(status).inc()

    def _try_later(self, attempt: Attempt, error: BaseException, outcome: Outcome = "retried") -> Outcome:
        delivery, tries = attempt.delivery, attempt.delivery.tries + 1
        wait = self._delays[tries - 1] if tries <= len(self._delays) else None
        # Not its text: it may name people.
        why = {"try": tries, "error": type(error).__name__, "where": logs.raised_at(error)}
        log.warning("a try failed", exc_info=log.isEnabledFor(logging.DEBUG), extra=why)
        with suppress(OrderMissing, DocumentRefused):  # then the message alone tells of it
            self._orders.record_failure(attempt.event, attempt.step, attempt.id, why, wait)
        if wait is None:
            return self._park(delivery, logs.text_of(error))
        delivery.retry(wait, tries)
        return outcome

    def _park(self, delivery: Delivery, reason: str) -> Outcome:
        delivery.park(reason, delivery.tries + 1)
        return "parked"


# --- the process -----------------------------------------------------------------------------------------------------


def consume(
    settings: Settings, handlers: discovery.Handlers, store: Store, bus: Bus, client: Any, stop: threading.Event
) -> None:
    """Run the handlers that HANDLERS names, of all in `handlers`, until `stop`. `client` is a Lambda client."""
    outbox = Outbox(store, bus, {type for types in handlers.values() for type in types})
    functions = Functions(client, send_email=settings.email_function, make_label=settings.label_function)
    worker = Worker(handlers, settings, store, outbox, functions, stop)
    wiring.keep_consuming(settings, handlers, store, bus, outbox, worker.deliver, stop)


def run(settings: Settings, _: Namespace) -> None:
    """Consume until SIGTERM."""
    if settings.single_process:
        raise SettingInvalid("MONGODB_URL, AMQP_URL: embedded and memory live in orderproc.py, so run that instead")
    stop = stop_on_signal(within=GRACE)
    store, bus = wiring.connect_all(settings, settings.mongodb_url)
    handlers = discovery.discover(settings.handlers_dir, settings.handlers)
    serve_health(settings, "METRICS_PORT", store, lambda: bus.consuming and bus.up, needs_broker=True)
    consume(settings, handlers, store, bus, lambda_client(settings.concurrency * len(handlers)), stop)


def main(argv: list[str] | None = None) -> int:
    """Run a command; gives the exit code."""
    args = commands.parse_arguments(str(__doc__), ["run", *commands.COMMANDS], argv)
    command, needed = commands.COMMANDS.get(args.command, (run, ("MONGODB_URL", "AMQP_URL")))
    return exit_code(lambda: command(read_settings(needed), args))


if __name__ == "__main__":
    leave(main())
