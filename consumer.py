"""The worker: finds the handlers, runs them, retries, parks, sweeps.

    python consumer.py                          consume until SIGTERM
    python consumer.py check                    print which handler takes what; needs no server
    python consumer.py dead [HANDLER]           list what was parked, and why
    python consumer.py redrive HANDLER          send it round again     [--limit N] [--dry-run]
    python consumer.py purge HANDLER            throw it away           [--yes]
    python consumer.py retire HANDLER           delete the queues of a handler that is gone   [--yes]

How one delivery goes, `Worker._attempt` says from top to bottom. The bus's own loop never waits for it.
"""

import argparse
import importlib.util
import inspect
import logging
import os
import signal
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bottle
import waitress

from core import events, settings, telemetry
from core.bus import Admin, BadTopology, Bus, BusAway, Delivery, Message, Rabbit, dead_queue, main_queue, retry_queue
from core.events import Event, Invalid
from core.outbox import Outbox
from core.services import Functions, Services, StockMoves, TryAgain
from core.settings import BadSetting, Settings
from core.stock import Stock
from core.store import Orders, StoreAway, connect, standing, step_name
from core.sweep import Sweep

log = logging.getLogger("consumer")
GRACE = 9.0  # seconds from SIGTERM to the end, whatever hangs: what is cut off then comes again, as after a kill -9
Handlers = dict[str, dict[str, Callable[..., Any]]]  # handler -> event type -> function
OUTCOMES = {"mine": "done", "done": "already", "moved": "lost"}  # where a step stands: what came of the delivery
FORWARD_AGAIN = 5.0  # seconds


class BadHandler(BadSetting):
    """A handler file that stops the start; the text names the file and the fix."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; gives the exit code."""
    words = _arguments(argv)
    needed = {"run": ("MONGODB_URL", "AMQP_URL"), "check": ()}.get(words.command, ("AMQP_URL",))
    try:
        config = settings.load(os.environ, needed)
        telemetry.set_up_logging(config.log_level, config.log_format)
        settings.warn_of_demo_values(os.environ)
        return COMMANDS[words.command](config, words) or 0
    except (BadSetting, BadTopology, BusAway) as error:
        print(error, file=sys.stderr)
        return 2


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=list(COMMANDS), default="run")
    parser.add_argument("handler", nargs="?", default="")
    parser.add_argument("--limit", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--yes", action="store_true")
    words = parser.parse_args(argv)
    if words.command in ("redrive", "purge", "retire") and not words.handler:
        parser.error(f"{words.command} needs the name of a handler")
    if words.limit < 1:
        parser.error("--limit must be at least 1")
    return words


def _run(config: Settings, words: argparse.Namespace) -> int:
    if config.single_process:
        raise BadSetting(
            "MONGODB_URL, AMQP_URL: embedded and memory live inside orderproc.py, which consumes as well; start that"
        )
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _end(stop))
    database, bus = connect(config.mongodb_url), Rabbit(config.amqp_url, config.retry_delays)
    orders, handlers = Orders(database), discover(config.handlers_dir, config.handlers)
    serve_health(config, orders, bus)
    consume(config, handlers, orders, Stock(database), bus, stop)
    return 0


def _end(stop: threading.Event) -> None:
    stop.set()
    last = threading.Timer(GRACE, os._exit, [0])
    last.daemon = True
    last.start()


def consume(
    config: Settings, handlers: Handlers, orders: Orders, stock: Stock, bus: Bus, stop: threading.Event, **client: Any
) -> None:
    """Run the handlers until `stop`. `client` is for the Lambda client (embedded mode calls no cloud)."""
    names = [name for name in handlers if not config.handlers or name in config.handlers]
    for line in describe(handlers):
        log.info(line)
    takers = {type: [name for name in handlers if type in handlers[name]] for type in events.event_schemas()}
    outbox = Outbox(orders, bus, {type for type in takers if takers[type]})
    functions = Functions(
        {"send_email": config.email_function, "make_label": config.label_function},
        config.concurrency * len(names),
        **client,
    )
    worker = Worker(handlers, config, orders, stock, bus, outbox, functions, stop)
    Sweep(orders, stock, bus, outbox, takers, stop, forgetful=config.amqp_url == "embedded").start()
    bus.consume(
        {name: list(taken) for name, taken in handlers.items()}, names, config.concurrency, worker.deliver, stop
    )
    bus.close()


# --- finding handlers --------------------------------------------------------------------------------------------


def discover(folder: Path, wanted: Sequence[str] = ()) -> Handlers:
    """Every handler in the folder. Raises BadHandler, or BadSetting where HANDLERS names one that is not there."""
    paths = [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_")]
    handlers = {path.stem: _functions(path) for path in paths}
    if not handlers:
        raise BadHandler(f"{folder}: there is no handler; HANDLERS_DIR must name a folder with .py files")
    for name in wanted:
        if name not in handlers:
            raise BadSetting(f"HANDLERS: there is no {name} in {folder}; {events.near(name, handlers)}")
    return handlers


def _functions(path: Path) -> dict[str, Any]:
    if not path.stem.isidentifier():
        raise BadHandler(f"{path}: the name must be letters, digits and underscores; it names queues")
    module = _import(path)
    found = {name: f for name, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}
    public = {name: function for name, function in found.items() if not name.startswith("_")}
    for name, function in public.items():
        _check(path, name, function)
    if not public:
        raise BadHandler(f"{path}: no function is named after an event type; add one, for example order_created")
    return public


def _import(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"handlers.{path.stem}", path)
    if spec is None or spec.loader is None:
        raise BadHandler(f"{path}: cannot be imported")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        what = " ".join(str(error).split())
        raise BadHandler(f"{path}: line {_line(path, error)}: {type(error).__name__}: {what}") from None
    return module


def _line(path: Path, error: BaseException) -> int | None:
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno
    return next((f.lineno for f in traceback.extract_tb(error.__traceback__)[::-1] if f.filename == str(path)), 1)


def _check(path: Path, name: str, function: Callable[..., Any]) -> None:
    if name not in events.event_schemas():
        hint = events.near(name, events.event_schemas())
        raise BadHandler(f"{path}: {name} is no event type: {hint} (helpers start with _)")
    if inspect.iscoroutinefunction(function):
        raise BadHandler(f"{path}: {name} is async: make it a plain def; handlers run on threads")
    try:
        inspect.signature(function).bind("event", "services")
    except TypeError:
        raise BadHandler(f"{path}: {name} must take two arguments: (event, services)") from None


def describe(handlers: Handlers) -> list[str]:
    """A line for each event a handler takes."""
    return [f"{type:<20} -> {name:<12} -> {main_queue(name)}" for name, taken in handlers.items() for type in taken]


# --- one delivery ------------------------------------------------------------------------------------------------


class Worker:
    """Runs handlers on a pool of threads, and decides what becomes of each delivery."""

    def __init__(
        self, handlers: Handlers, config: Settings, orders: Orders, stock: Stock, bus: Bus, outbox: Outbox,
        functions: Any, stop: threading.Event,
    ) -> None:  # fmt: skip
        self._handlers, self._delays, self._stop = handlers, config.retry_delays, stop
        self._orders, self._stock, self._bus, self._outbox, self._functions = orders, stock, bus, outbox, functions
        self._pool = ThreadPoolExecutor(config.concurrency * len(handlers), thread_name_prefix="handler")

    def deliver(self, delivery: Delivery) -> None:
        """Take a delivery off the bus's thread."""
        self._pool.submit(self._run, delivery)

    def _run(self, delivery: Delivery) -> None:
        try:
            outcome = self._handle(delivery)
            telemetry.DELIVERIES.labels(delivery.handler, outcome).inc()
        except StoreAway:  # only on a stop: nobody is to wait for it any longer
            delivery.release()
        except Exception:
            log.exception("a delivery went wrong in a way nobody thought of; it comes again")
            self._come_again(delivery)

    def _handle(self, delivery: Delivery) -> str:
        try:
            event = events.parse(delivery.body)
        except Invalid as error:
            log.error("parked what is no event", extra={"handler": delivery.handler, "error": str(error)})
            return self._park(delivery, str(error))
        with telemetry.about(order=event.subject, event=event.id, handler=delivery.handler, trace=event.trace):
            return self._persist(delivery, event)

    def _persist(self, delivery: Delivery, event: Event) -> str:
        while True:
            attempt = uuid.uuid4().hex
            try:
                with telemetry.about(attempt=attempt):
                    outcome = self._attempt(delivery, event, attempt)
                    log.info(f"{event.type} {outcome}")
                return outcome
            except StoreAway:  # no outcome: keep the message, spend no try, and wait with all the others
                if self._stop.wait(1):
                    raise

    def _attempt(self, delivery: Delivery, event: Event, attempt: str) -> str:
        step = step_name(delivery.handler, event.id)
        order = self._orders.get(event.subject)
        if order is None:
            return self._park(delivery, f"there is no order {event.subject}")
        # A type that only another release of the handler takes is its to do: not recorded here.
        where = standing(order, event, step) if event.type in self._handlers[delivery.handler] else "moved"
        if where != "open":
            delivery.ack()
            return OUTCOMES[where]
        moves = StockMoves(self._stock, order, attempt, last_try=delivery.tries >= len(self._delays))
        try:
            answers = self._answers(delivery.handler, event, moves)
            order = self._orders.record(event, step, attempt, answers, moves.moves())
        except StoreAway:  # the notes stay: what was asked may have happened
            raise
        except (Exception, SystemExit) as error:  # a handler may call what calls sys.exit
            moves.revert()
            return self._try_later(delivery, event, attempt, error)
        where = standing(order, event, step, attempt)
        if where == "mine":
            moves.settle()
            self._outbox.announce(order, answers)
            for status in [events.STATUS[answer.type] for answer in answers if answer.type in events.STATUS]:
                telemetry.ORDERS.labels(status).inc()
        else:
            moves.revert()
        if where not in OUTCOMES:
            return self._try_later(delivery, event, attempt, TryAgain(where))
        delivery.ack()
        return OUTCOMES[where]

    def _answers(self, handler: str, event: Event, moves: StockMoves) -> list[Event]:
        services = Services(moves, self._functions, event.traceparent, logging.getLogger(f"handlers.{handler}"))
        with telemetry.HANDLER_SECONDS.labels(handler).time():
            answer = self._handlers[handler][event.type](event, services)
        answers = [] if answer is None else [answer] if isinstance(answer, Event) else list(answer)
        return events.check_answers(event, handler, answers, event.order)

    def _try_later(self, delivery: Delivery, event: Event, attempt: str, error: BaseException) -> str:
        tries, step = delivery.tries + 1, step_name(delivery.handler, event.id)
        delay = self._delays[tries - 1] if tries <= len(self._delays) else None
        name, place = type(error).__name__, traceback.extract_tb(error.__traceback__)[-1:]
        where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in place]  # not its text: it may name people
        log.warning(
            "a try failed",
            exc_info=log.isEnabledFor(logging.DEBUG),
            extra={"try": tries, "error": name, "where": where},
        )
        self._orders.record_failure(event, step, attempt, tries, name, None if delay is None else float(delay))
        if delay is None:
            return self._park(delivery, repr(error)[:200])
        self._forward(delivery, retry_queue(delivery.handler, delay), {"tries": tries})
        return "retried"

    def _park(self, delivery: Delivery, error: str) -> str:
        headers = {"error": error, "tries": delivery.tries + 1, "time": events.rfc3339(events.now())}
        self._forward(delivery, dead_queue(delivery.handler), headers)
        return "parked"

    def _come_again(self, delivery: Delivery) -> None:
        delivery.release()
        self._bus.rebuild()

    def _forward(self, delivery: Delivery, queue: str, headers: dict[str, Any]) -> None:
        # The copy first, the ack when it is confirmed: the other way round, a crash between them loses the message.
        def done(outcome: str) -> None:
            if outcome == "confirmed":
                return delivery.ack()
            log.error("not forwarded; trying again", extra={"queue": queue, "outcome": outcome})
            if outcome == "returned":  # the queue is gone: have it declared anew
                self._come_again(delivery)
            else:  # the broker is away or full, and the message as safe with us as anywhere
                again = threading.Timer(FORWARD_AGAIN, self._forward, [delivery, queue, headers])
                again.daemon = True
                again.start()

        self._bus.publish(Message(delivery.id, "", delivery.body, queue=queue, headers=headers), done)


# --- health ------------------------------------------------------------------------------------------------------


def serve_health(config: Settings, orders: Orders, bus: Bus) -> None:
    """Health and metrics on METRICS_PORT, on a thread that ends with the process."""

    def ready() -> dict[str, Any]:
        store, broker = orders.ping(), bus.consuming and bus.up
        words = {True: "up", False: "down"}
        return {"ready": store and broker, "store": words[store], "broker": words[broker]}

    app = bottle.Bottle()
    telemetry.add_health(app, ready)
    try:
        server = waitress.create_server(app, host=config.host, port=config.metrics_port, threads=2, ident=None)
    except OSError as error:
        raise BadSetting(
            f"METRICS_PORT: cannot listen on {config.host} {config.metrics_port}: {error.strerror}"
        ) from None
    threading.Thread(target=server.run, name="health", daemon=True).start()


# --- commands ----------------------------------------------------------------------------------------------------


def _show_map(config: Settings, words: argparse.Namespace) -> None:
    print("\n".join(describe(discover(config.handlers_dir, config.handlers))))


def _admin(config: Settings, handler: str) -> Admin:
    if config.amqp_url == "embedded":
        raise BusAway("this needs RabbitMQ; with the embedded bus a restart sends what was parked again")
    return Admin(config.amqp_url, handler, config.retry_delays)


def _dead(config: Settings, words: argparse.Namespace) -> None:
    for handler in [words.handler] if words.handler else discover(config.handlers_dir):
        parked = _admin(config, handler).dead()
        for body, said in parked:
            order, event = _named(body)
            error, tries, time = (said.get(name, "-") for name in ("error", "tries", "time"))
            print(f"{handler}  {order}  {event}  {error}  tries={tries}  {time}")
        if not parked or len(parked) == Admin.most_shown:
            print(f"{handler}  {'and maybe more: these are the oldest' if parked else 'nothing is parked'}")


def _named(body: bytes) -> tuple[str, str]:
    try:
        event = events.parse(body)
        return event.subject, event.type
    except Invalid:
        return "-", f"not an event: {body[:60]!r}"


def _redrive(config: Settings, words: argparse.Namespace) -> None:
    admin = _admin(config, words.handler)
    if words.dry_run:
        print(f"would send {len(admin.dead(words.limit))} parked messages to {main_queue(words.handler)} again")
    else:
        print(f"sent {admin.redrive(words.limit)} parked messages to {main_queue(words.handler)} again")


def _purge(config: Settings, words: argparse.Namespace) -> int:
    admin = _admin(config, words.handler)
    if not (words.yes or _agreed(f"Throw away what is parked for {words.handler}? Its orders stay as they are.")):
        return 1
    print(f"threw {admin.purge()} parked messages of {words.handler} away")
    return 0


def _retire(config: Settings, words: argparse.Namespace) -> int:
    if words.handler in discover(config.handlers_dir):
        raise BadHandler(
            f"{words.handler} is still in {config.handlers_dir}: remove its file and restart the consumers first"
        )
    admin = _admin(config, words.handler)
    if not (words.yes or _agreed(f"Delete all queues of {words.handler}, with what is in them?")):
        return 1
    print(f"deleted the queues of {words.handler}, and {admin.retire()} messages with them")
    return 0


def _agreed(question: str) -> bool:
    print(f"{question} [y/N] ", end="", flush=True)
    agreed = sys.stdin.readline().strip().lower() == "y"
    if not agreed:
        print("nothing was done")
    return agreed


COMMANDS: dict[str, Callable[[Settings, argparse.Namespace], int | None]] = {
    "run": _run, "check": _show_map, "dead": _dead, "redrive": _redrive, "purge": _purge, "retire": _retire,
}  # fmt: skip

if __name__ == "__main__":
    telemetry.leave(main())
