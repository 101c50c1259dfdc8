"""How a process starts, is told to end, and ends."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from core.base.logs import set_up_logging
from core.base.settings import Refusal, Settings, load, warn_of_demo_values

log = logging.getLogger(__name__)


def read_settings(need: tuple[str, ...]) -> Settings:
    """The settings of this process, with its log set up by them. Raises SettingInvalid.

    From here on the process ends with the first of its threads that dies.
    """
    settings = load(os.environ, need)
    threading.excepthook = end_process
    set_up_logging(settings.log_level, settings.log_format)
    warn_of_demo_values(os.environ)
    return settings


def exit_code(run: Callable[[], None]) -> int:
    """Run it, and give 0; 2 and one line on stderr where it is refused."""
    try:
        run()
        return 0
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return 2


def end_process(death: threading.ExceptHookArgs) -> None:
    """A process of which a part is dead only looks alive: its supervisor starts it again."""
    name = death.thread.name if death.thread else "a thread"
    error: Any = death.exc_value
    log.critical(f"{name} died, and the process ends with it: {error}", exc_info=error)
    leave(1)


def stop_on_signal(within: float | None = None) -> threading.Event:
    """An event that SIGTERM and SIGINT set; with `within`, the process ends so many seconds later, whatever hangs."""
    stop = threading.Event()

    def ask(*_: object) -> None:
        stop.set()
        if within is not None:
            last = threading.Timer(within, os._exit, [0])
            last.daemon = True
            last.start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    return stop


def leave(code: int) -> None:
    """End the process now: a handler that hangs in its thread must not hold it, as it would hold `sys.exit`."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)
