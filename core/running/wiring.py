"""Which store and which bus a process works with, what runs beside a worker, and what `make run` brings along: a store,
a catalogue, a lock.

The store is SecantusDB (GPL-2.0), which speaks MongoDB's wire protocol on WiredTiger: a program of its own, started and
never imported.
"""

import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from core.base.settings import SettingInvalid, Settings
from core.bus.bus import Bus, Deliver
from core.bus.memory import MemoryBus
from core.bus.rabbit import Rabbit
from core.flow.outbox import Outbox
from core.flow.report import start_reporting
from core.flow.sweep import Sweep
from core.running.discovery import Handlers, describe, subscribers_of
from core.store.connection import connect
from core.store.store import Store

log = logging.getLogger("consumer")
CATALOGUE = {"A1": 1000, "B2": 500, "C3": 100, "D4": 10, "E5": 0}  # units of the goods that `make run` sells
START_WITHIN, STOP_WITHIN = 30.0, 10.0  # seconds that the bundled store gets
SWEEP_ENDS_WITHIN = 1.0  # seconds
MORE_CONNECTIONS = 10  # than web threads: for batching, sweeping and making indexes
# Runs a program until it ends, or until the pipe on standard input closes: when our process is gone, however it went.
KEEPER = """exec 3<&0; "$@" & program=$!
(cat <&3 >/dev/null; kill $program; sleep 5; kill -9 $program) &
wait $program; code=$?; trap '' TERM; kill 0; exit $code"""


def connect_all(settings: Settings, store_url: str) -> tuple[Store, Bus]:
    """The store, and the carrier that AMQP_URL names. Raises SettingInvalid."""
    bus: Bus = MemoryBus() if settings.amqp_url == "embedded" else Rabbit(settings.amqp_url, settings.retry_delays)
    return Store(connect(store_url, settings.web_threads + MORE_CONNECTIONS)), bus


def keep_consuming(
    settings: Settings, handlers: Handlers, store: Store, bus: Bus, outbox: Outbox, deliver: Deliver,
    stop: threading.Event,
) -> None:  # fmt: skip
    """Have what arrives for the handlers that HANDLERS names, of all in `handlers`, delivered until `stop`; beside it
    the sweep, and a report on them. Returns when what was in hand is over.
    """
    for line in describe(handlers):
        log.info(line)
    sweep = Sweep(store, bus, outbox, subscribers_of(handlers), stop, forgetful=settings.amqp_url == "embedded")
    sweep.start()
    takes = {name: list(types) for name, types in handlers.items()}
    names = settings.handlers or tuple(handlers)
    start_reporting(store.reports, bus, {name: takes[name] for name in names}, settings.retry_delays, stop)
    bus.consume(takes, names, settings.concurrency, deliver, stop)
    sweep.join(SWEEP_ENDS_WITHIN)  # it frees the lease
    bus.close()


def start_bundled(settings: Settings, at_end: ExitStack) -> str:
    """Start what lives inside this process, until `at_end`; gives the store's URL. Raises SettingInvalid."""
    folder = settings.data_dir
    if settings.single_process:
        folder.mkdir(parents=True, exist_ok=True)
        in_use = f"DATA_DIR: {folder} is in use by another orderproc; stop it or take another"
        at_end.enter_context(locked(folder / "lock", 0, in_use))
    if settings.mongodb_url == "embedded":
        return at_end.enter_context(bundled_store(folder / "mongo"))
    return settings.mongodb_url


@contextmanager
def locked(path: Path, within: float, otherwise: str) -> Iterator[IO[str]]:
    """Hold a file's lock, which dies with all processes that have it. Raises SettingInvalid(otherwise) in the end."""
    deadline = time.monotonic() + within
    with path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise SettingInvalid(otherwise) from None
                time.sleep(0.02)
        yield lock


@contextmanager
def bundled_store(folder: Path) -> Iterator[str]:
    """A running store on the folder; gives its URL. However this process ends, the store ends with it."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    ended = threading.Event()
    left_behind = f"DATA_DIR: a store that was left behind still runs on {folder}; end it"
    with locked(folder.with_suffix(".lock"), START_WITHIN, left_behind) as lock:
        # It inherits the lock: that of a killed process may still be closing its files.
        keeper = _start(folder, port, lock)
    try:
        _wait_for(port, keeper)
        threading.Thread(target=_watch, args=(keeper, ended), name="store", daemon=True).start()
        yield f"mongodb://127.0.0.1:{port}/orderproc?directConnection=true"
    finally:
        ended.set()
        with suppress(subprocess.TimeoutExpired):
            keeper.communicate(timeout=STOP_WITHIN)  # closes the pipe
        with suppress(ProcessLookupError):
            os.killpg(keeper.pid, signal.SIGKILL)


def _watch(keeper: "subprocess.Popen[bytes]", ended: threading.Event) -> None:
    code = keeper.wait()
    if not ended.is_set():
        raise RuntimeError(f"the embedded store ended with {code}; its log is in DATA_DIR")


def _start(folder: Path, port: int, lock: IO[str]) -> "subprocess.Popen[bytes]":
    program = Path(sys.executable).parent / "secantusd-py"
    if not program.exists():
        raise SettingInvalid("MONGODB_URL: embedded needs what requirements-embedded.txt names; or set it to memory")
    command = ["sh", "-c", KEEPER, "sh", str(program), "--port", str(port), "--sync-on-commit"]
    with folder.with_suffix(".log").open("w") as output:
        # A session of its own: Ctrl-C in the terminal is ours to pass on, after the last write.
        return subprocess.Popen(
            [*command, "--storage-path", str(folder.absolute())], stdin=subprocess.PIPE, stdout=output, stderr=output,
            pass_fds=[lock.fileno()], start_new_session=True,
        )  # fmt: skip


def _wait_for(port: int, keeper: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_WITHIN
    while time.monotonic() < deadline and keeper.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.02)
    end = "did not start in time" if keeper.poll() is None else f"ended with {keeper.returncode}"
    raise SettingInvalid(f"MONGODB_URL: the embedded store {end}; its log is in DATA_DIR")
