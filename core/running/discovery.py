"""Finding handlers: every module in a folder, every public function in it, checked before the first event arrives."""

import ast
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from core.base.settings import SettingInvalid
from core.bus.topology import main_queue
from core.order.schemas import add_event_schemas, event_schemas, nearest

Handlers = dict[str, dict[str, Callable[..., Any]]]  # handler -> event type -> function


NAME = "[A-Za-z][A-Za-z0-9_]{0,59}"  # of a handler
ASYNC = (inspect.iscoroutinefunction, inspect.isasyncgenfunction)


class HandlerInvalid(SettingInvalid):
    """A handler file that stops the start; the text names the file and the fix."""


def discover(folder: Path, wanted: Sequence[str] = ()) -> Handlers:
    """Every handler in the folder, which may bring event types along in `events/`.

    Raises HandlerInvalid; SettingInvalid where HANDLERS names one that is missing, or an event type is no JSON.
    """
    add_event_schemas(folder / "events")
    handlers = {path.stem: _functions(path) for path in sorted(folder.glob("[!._]*.py"))}
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
    if not re.fullmatch(NAME, path.stem):
        raise HandlerInvalid(
            f"{path}: its name must be 1 to 60 of a-z A-Z 0-9 _ beginning with a letter: queues have it"
        )
    module, imported = _run(path)
    own = {name: value for name, value in module.items() if callable(value) and name not in imported}
    # An exception or a dataclass of its own is none; one that is named like an event is meant to be.
    wanted = {name for name in own if name in event_schemas() or not inspect.isclass(own[name])}
    public = {name: own[name] for name in own if name in wanted and not name.startswith("_")}
    for name, function in public.items():
        _check(path, name, function)
    if not public:
        raise HandlerInvalid(f"{path}: no function is named after an event type; add one, for example order_created")
    return public


def _run(path: Path) -> tuple[dict[str, Any], set[str]]:
    """What the file defines, and the names that it takes from elsewhere."""
    # Not imported: two folders may have files of one name, and only one module of a name can be. Known by its name only
    # while it runs, as dataclasses ask for their module.
    module = ModuleType(f"handlers.{path.stem}")
    module.__file__, module.__package__ = str(path.absolute()), "handlers"
    known = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module
    try:
        tree = ast.parse(path.read_bytes(), path)
        exec(compile(tree, path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        what = " ".join(str(error).split())
        raise HandlerInvalid(f"{path}: line {_line(path, error)}: {type(error).__name__}: {what}") from None
    finally:
        del sys.modules[module.__name__]
        sys.modules |= {module.__name__: known} if known else {}
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return module.__dict__, {alias.asname or alias.name for node in imports for alias in node.names}


def _line(path: Path, error: BaseException) -> int | None:
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno
    return next((f.lineno for f in traceback.extract_tb(error.__traceback__)[::-1] if f.filename == str(path)), 1)


def _check(path: Path, name: str, function: Callable[..., Any]) -> None:
    if name not in event_schemas():
        hint = nearest(name, event_schemas())
        raise HandlerInvalid(f"{path}: {name} is no event type: {hint} (helpers start with _)")
    if any(is_async(each) for is_async in ASYNC for each in (function, type(function).__call__)):
        raise HandlerInvalid(f"{path}: {name} is async: make it a plain def; handlers run on threads")
    if inspect.isclass(function):
        raise HandlerInvalid(f"{path}: {name} is a class: make it a function of (event, services)")
    try:
        inspect.signature(function).bind("event", "services")
    except (TypeError, ValueError):
        raise HandlerInvalid(f"{path}: {name} must take two arguments: (event, services)") from None
