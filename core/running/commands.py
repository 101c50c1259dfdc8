"""The commands of consumer.py that look at handlers and their dead letters. Each is given settings and arguments."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence

from core.base.settings import Settings
from core.bus.bus import BrokerUnavailable
from core.bus.dead_letters import MOST_SHOWN, DeadLetters, QueueMissing
from core.bus.topology import main_queue
from core.order import events
from core.order.schemas import add_event_schemas
from core.running.discovery import HandlerInvalid, aligned, describe, discover


def parse_arguments(usage: str, commands: Sequence[str], argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; the first of the commands is the default. Exits with 2 where it is wrong."""
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=commands, default=commands[0])
    parser.add_argument("handler", nargs="?", default="")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--limit", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--yes", action="store_true")
    args = parser.parse_args(argv)
    given = {"redrive": args.handler or args.all, "purge": args.handler, "retire": args.handler}
    if not given.get(args.command, True):
        parser.error(f"{args.command} needs the name of a handler{', or --all' * (args.command == 'redrive')}")
    if args.limit < 1:
        parser.error("--limit must be at least 1")
    return args


def check(settings: Settings, args: argparse.Namespace) -> None:
    """Print which handler takes what; needs no server."""
    print("\n".join(describe(discover(settings.handlers_dir, settings.handlers))))


def dead(settings: Settings, args: argparse.Namespace) -> None:
    """List what was parked, and why."""
    add_event_schemas(settings.handlers_dir / "events")
    rows, notes = [["HANDLER", "ORDER", "EVENT", "TRIES", "TIME", "ERROR"]], list[str]()
    for handler, letters in _each(settings, args):
        parked = letters.show()
        for body, headers in parked:
            rows.append([handler, *_describe(body), *(str(headers.get(of, "-")) for of in ("tries", "time", "error"))])
        if not parked or len(parked) == MOST_SHOWN:
            notes.append(
                f"{handler}: {'maybe there are more; these are the oldest' if parked else 'nothing is parked'}"
            )
    print(*(aligned(rows) if rows[1:] else []), *notes, sep="\n")


def _describe(body: bytes) -> tuple[str, str]:
    try:
        event = events.parse(body)
        return event.subject, event.type
    except events.EventInvalid:
        return "-", f"none: {body[:60]!r}"


def redrive(settings: Settings, args: argparse.Namespace) -> None:
    """Send dead letters round again."""
    for handler, letters in _each(settings, args):
        queue, sent = main_queue(handler), 0
        if args.dry_run:
            print(f"would send {min(letters.count(), args.limit)} parked messages to {queue} again")
            continue
        for sent in letters.redrive(args.limit):
            if sent % 100 == 0 and sys.stderr.isatty():
                print(f"\r{sent} ", end="", file=sys.stderr, flush=True)
        print(f"sent {sent} parked messages to {queue} again")


def purge(settings: Settings, args: argparse.Namespace) -> None:
    """Throw dead letters away, after asking."""
    letters = _dead_letters(settings, args.handler)
    _ask(args, f"Throw away what is parked for {args.handler}? Its orders stay as they are.")
    print(f"threw {letters.purge()} parked messages of {args.handler} away")


def retire(settings: Settings, args: argparse.Namespace) -> None:
    """Delete the queues of a handler that is gone, after asking."""
    if args.handler in discover(settings.handlers_dir):
        where = f"{args.handler} is still in {settings.handlers_dir}"
        raise HandlerInvalid(f"{where}: remove its file and restart the consumers first")
    letters = _dead_letters(settings, args.handler)
    _ask(args, f"Delete all queues of {args.handler}, with what is in them?")
    print(f"deleted the queues of {args.handler}, and {letters.retire(settings.retry_delays)} messages with them")


def _each(settings: Settings, args: argparse.Namespace) -> Iterator[tuple[str, DeadLetters]]:
    """The handler that is named, or else all that have run once."""
    for handler in [args.handler] if args.handler else discover(settings.handlers_dir):
        letters = _dead_letters(settings, handler)
        try:
            letters.count()
        except QueueMissing as missing:
            if args.handler:
                raise
            print(missing)
        else:
            yield handler, letters


def _dead_letters(settings: Settings, handler: str) -> DeadLetters:
    if settings.amqp_url == "embedded":
        raise BrokerUnavailable(
            "this needs RabbitMQ; else POST /orders/<id>/redrive, or a restart, tries parked steps again"
        )
    return DeadLetters(settings.amqp_url, handler)


def _ask(args: argparse.Namespace, question: str) -> None:
    """Go on with --yes or a y; anything else ends the program with 1."""
    if not args.yes:
        print(f"{question} [y/N] ", end="", flush=True)
        if sys.stdin.readline().strip().lower() != "y":
            print("nothing was done; where nobody can answer, --yes does it unasked")
            sys.exit(1)


# And the variables that each needs.
COMMANDS: dict[str, tuple[Callable[[Settings, argparse.Namespace], None], tuple[str, ...]]] = {
    "check": (check, ()), "dead": (dead, ("AMQP_URL",)), "redrive": (redrive, ("AMQP_URL",)),
    "purge": (purge, ("AMQP_URL",)), "retire": (retire, ("AMQP_URL",)),
}  # fmt: skip
