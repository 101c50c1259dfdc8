"""A RabbitMQ node of the tests' own: its own name, ports and data, to be killed, frozen and started again.

It never touches the broker that AMQP_URL names. Needs the program `rabbitmq-server` on this machine, and no rights.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pika

from tools.chaos.system import free_port, wait_for

# Debian's wrapper in the PATH drops to another user; the program behind it takes our folder and our user.
PROGRAMS = Path("/usr/lib/rabbitmq/bin")


def installed(name: str) -> str | None:
    """Where a program of RabbitMQ is; None where it is not installed."""
    return shutil.which(name, path=str(PROGRAMS)) or shutil.which(name)


class BrokerNode:
    """One node on a folder; what it stored survives `kill` and `start`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.port = folder, free_port()
        self._name = f"orderproc-{self.port}@localhost"
        folder.joinpath("plugins").write_text("[].")
        folder.joinpath("rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{self.port}\n")
        self._environment = {
            **os.environ, "HOME": str(folder), "RABBITMQ_NODENAME": self._name, "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()), "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "log"), "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"), "RABBITMQ_PID_FILE": str(folder / "pid"),
        }  # fmt: skip
        self._process: subprocess.Popen | None = None

    def url(self, **query: object) -> str:
        """Its AMQP URL; `heartbeat=4` and the like go into the query."""
        words = "&".join(f"{name}={value}" for name, value in query.items())
        return f"amqp://guest:guest@127.0.0.1:{self.port}/%2F" + (f"?{words}" if words else "")

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        with self._folder.joinpath("output").open("ab") as output:
            self._process = subprocess.Popen(
                [installed("rabbitmq-server")], env=self._environment, cwd=self._folder,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        wait_for(self._answers, 60, "the second broker answers")

    def _answers(self) -> bool:
        assert self._process.poll() is None, self._folder.joinpath("output").read_text()[-2000:]
        try:
            pika.BlockingConnection(pika.URLParameters(self.url(socket_timeout=2))).close()
            return True
        except (pika.exceptions.AMQPError, OSError):
            return False

    def kill(self) -> None:
        """kill -9: the node gets no chance to tidy up."""
        if self._process:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def let_queues_settle(self) -> None:
        """RabbitMQ 3.10 notes a new quorum queue on disk a moment late: one killed before it never comes back."""
        time.sleep(2)

    def freeze(self) -> None:
        """Stop every thread of it; its sockets stay open."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)  # its own group: the start script and the virtual machine below it

    def ctl(self, *words: str) -> str:
        """What rabbitmqctl prints."""
        command = [installed("rabbitmqctl"), "-n", self._name, "--quiet", *words]
        ran = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=60)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout
