"""Finding handlers: every module in a folder, every public function in it, checked before the first event arrives."""

import inspect
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from core.base.settings import SettingInvalid
from core.bus.topology import main_queue
from core.order.schemas import event_schemas, nearest

Handlers = dict[str, dict[str, Callable[..., Any]]]  # handler -> event type -> function


class HandlerInvalid(SettingInvalid):
    """A handler file that stops the start; the text names the file and the fix."""


def discover(folder: Path, wanted: Sequence[str] = ()) -> Handlers:
    """Every handler in the folder. Raises HandlerInvalid; SettingInvalid where HANDLERS names one that is missing."""
    handlers = {path.stem: _functions(path) for path in sorted(folder.glob("[!_]*.py"))}
    if not handlers:
        raise HandlerInvalid(f"{folder}: there is no handler; HANDLERS_DIR must name a folder with .py files")
    for name in wanted:
        if name not in handlers:
            raise SettingInvalid(f"HANDLERS: there is no {name} in {folder}; {nearest(name, handlers)}")
    return handlers


def subscribers_of(handlers: Handlers) -> dict[str, list[str]]:
    """Event type -> the handlers that take it."""
    return {type: [name for name in handlers if type in handlers[name]] for type in event_schemas()}


def describe(handlers: Handlers) -> list[str]:
    """A line for each event a handler takes."""
    return aligned([[type, "->", name, "->", main_queue(name)] for name in handlers for type in handlers[name]])


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a table, each column as wide as its widest entry."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _functions(path: Path) -> dict[str, Any]:
    if not path.stem.isidentifier():
        raise HandlerInvalid(f"{path}: the name must be letters, digits and underscores; it names queues")
    module = _run(path)
    own = {name: f for name, f in module.items() if inspect.isfunction(f) and f.__module__ == module["__name__"]}
    public = {name: function for name, function in own.items() if not name.startswith("_")}
    for name, function in public.items():
        _check(path, name, function)
    if not public:
        raise HandlerInvalid(f"{path}: no function is named after an event type; add one, for example order_created")
    return public


def _run(path: Path) -> dict[str, Any]:
    # Not imported: two folders may have files of one name, and only one module of a name can be.
    module = {"__name__": f"handlers.{path.stem}", "__package__": "handlers", "__file__": str(path.absolute())}
    try:
        exec(compile(path.read_bytes(), path, "exec"), module)
    except (Exception, SystemExit) as error:
        what = " ".join(str(error).split())
        raise HandlerInvalid(f"{path}: line {_line(path, error)}: {type(error).__name__}: {what}") from None
    return module


def _line(path: Path, error: BaseException) -> int | None:
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno
    return next((f.lineno for f in traceback.extract_tb(error.__traceback__)[::-1] if f.filename == str(path)), 1)


def _check(path: Path, name: str, function: Callable[..., Any]) -> None:
    if name not in event_schemas():
        hint = nearest(name, event_schemas())
        raise HandlerInvalid(f"{path}: {name} is no event type: {hint} (helpers start with _)")
    if inspect.iscoroutinefunction(function):
        raise HandlerInvalid(f"{path}: {name} is async: make it a plain def; handlers run on threads")
    try:
        inspect.signature(function).bind("event", "services")
    except TypeError:
        raise HandlerInvalid(f"{path}: {name} must take two arguments: (event, services)") from None
