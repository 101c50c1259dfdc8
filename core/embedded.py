"""The bundled document store of `make run`: a program of its own, started on a folder and stopped with us.

It is SecantusDB (GPL-2.0), which speaks MongoDB's wire protocol on WiredTiger; it is never imported.
"""

import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.settings import BadSetting

log = logging.getLogger(__name__)
CATALOGUE = {"A1": 1000, "B2": 500, "C3": 100, "D4": 10, "E5": 0}  # units of the goods that `make run` sells


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises BadSetting where another process has it; a lock dies with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadSetting(f"DATA_DIR: {folder} is in use by another orderproc; stop it or take another") from None
        yield


@contextmanager
def store(folder: Path) -> Iterator[str]:
    """A running store on the folder; gives its URL. One that a killed process left there is ended first."""
    program = Path(sys.executable).parent / "secantusd-py"
    if not program.exists():
        raise BadSetting("MONGODB_URL: embedded needs the packages of requirements-embedded.txt; or set it to memory")
    pid_file, port = folder.with_suffix(".pid"), _free_port()
    recorded = pid_file.read_text() if pid_file.exists() else ""
    if recorded.isdecimal() and _end(int(recorded), folder):
        log.warning("ended the store that a killed process left")
    command = [str(program), "--port", str(port), "--storage-path", str(folder.absolute()), "--sync-on-commit"]
    with folder.with_suffix(".log").open("w") as output:
        # A session of its own: Ctrl-C in the terminal is ours to pass on, after the last write.
        child = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    pid_file.write_text(str(child.pid))
    try:
        _wait_for(port, child)
        # With retryable writes it scans its retry records on each write; ours are all repeatable by themselves.
        yield f"mongodb://127.0.0.1:{port}/orderproc?retryWrites=false&directConnection=true"
    finally:
        _end(child.pid, folder)
        child.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def _wait_for(port: int, child: "subprocess.Popen[bytes]") -> None:
    for _ in range(1500):
        if child.poll() is not None:
            raise BadSetting(f"MONGODB_URL: the embedded store ended with {child.returncode}; its log is in DATA_DIR")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise BadSetting("MONGODB_URL: the embedded store did not start within 30 s; its log is in DATA_DIR")


def _end(pid: int, folder: Path) -> bool:
    """End the store that runs on the folder, and wait for it: until then the folder is taken. Whether there was one."""
    found = _is_store(pid, folder)
    for number, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 5)):
        deadline = time.monotonic() + seconds
        if _is_store(pid, folder):
            os.kill(pid, number)
        while _is_store(pid, folder) and time.monotonic() < deadline:
            time.sleep(0.05)
    return found


def _is_store(pid: int, folder: Path) -> bool:
    """The recorded process may be gone, and its number somebody else's."""
    if Path("/proc/self").exists():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            return False
    else:  # macOS
        command = subprocess.run(["ps", "-ww", "-o", "args=", "-p", str(pid)], capture_output=True, text=True).stdout
    return "secantusd" in command and str(folder.absolute()) in command
