"""Start a part of the program in this terminal, until Ctrl-C: `run [PART]`, once `. docs/lessons/words` was said.

    run              API, handlers and store in one process, as `make run`
    run on-broker    the same, but with RabbitMQ between them: the one of `run broker`, or the one AMQP_URL names
    run broker       a RabbitMQ of our own (needs the program rabbitmq-server)
    run servers      what two processes need beside them: that broker, a store and the functions, but for those that
                     AMQP_URL, MONGODB_URL and AWS_ENDPOINT_URL_LAMBDA name
    run api          only the API, on these servers
    run consumer     only the handlers, on these servers

`data/lessons/<part>.pid` has its process id.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tools.lessons import KEY, data, setting

BIN = Path(sys.executable).parent
STORE_PORT, FUNCTIONS_PORT, BROKER_PORT = (
    setting("STORE_PORT", 27117), setting("FUNCTIONS_PORT", 9001), setting("BROKER_PORT", 5673),
)  # fmt: skip
STORE = [str(BIN / "secantusd-py"), "--port", STORE_PORT, "--storage-path"]
FUNCTIONS = [sys.executable, "-m", "lambdas.local", "--port", FUNCTIONS_PORT]
# Debian's wrapper in the PATH drops to another user; the program behind it takes our folder and our user.
DEBIAN = "/usr/lib/rabbitmq/bin"


def environment(part: str) -> dict[str, str]:
    """What the process is told: what the terminal says, else what `make run` says, else our servers."""
    ours = os.environ | {"DATA_DIR": str(data()), "API_KEYS": setting("API_KEYS", f"demo:{KEY}:admin")}
    bundled = "embedded" if Path(STORE[0]).exists() else "memory"
    amqp_url = f"amqp://guest:guest@127.0.0.1:{BROKER_PORT}/%2F"
    if part in ("all", "on-broker"):
        return {"MONGODB_URL": bundled, "AMQP_URL": amqp_url if part == "on-broker" else "embedded"} | ours
    servers = {
        "MONGODB_URL": f"mongodb://127.0.0.1:{STORE_PORT}/lessons?retryWrites=false&directConnection=true",
        "AMQP_URL": amqp_url,
        "AWS_ENDPOINT_URL_LAMBDA": f"http://127.0.0.1:{FUNCTIONS_PORT}", "AWS_DEFAULT_REGION": "local",
        "AWS_ACCESS_KEY_ID": "local", "AWS_SECRET_ACCESS_KEY": "local",
    }  # fmt: skip
    return servers | ours


def become(part: str) -> None:
    """Be that part of the program: the process id stays."""
    script = "consumer.py" if part == "consumer" else "orderproc.py"
    os.execve(sys.executable, [sys.executable, script], environment(part))


def keep(servers: list[str]) -> None:
    """Start servers, say when each takes connections, and end them with this process."""
    running = [(name, *start(name)) for name in servers]
    try:
        for name, process, port in running:
            wait_for(name, process, port)
        print("Ctrl-C ends " + ", ".join(servers), flush=True)
        running[0][1].wait()
    except KeyboardInterrupt:
        print("ending " + ", ".join(servers), flush=True)
    finally:
        for _, process, _ in running:
            end(process)


def start(name: str) -> tuple["subprocess.Popen[bytes]", str]:
    """A server in a session of its own, so that Ctrl-C comes to us first; and the port it will be on."""
    folder = data() / "lessons" / name
    folder.mkdir(exist_ok=True)
    make = {"store": ([*STORE, str(folder)], STORE_PORT), "functions": (FUNCTIONS, FUNCTIONS_PORT)}
    command, port = make.get(name) or ([rabbitmq()], BROKER_PORT)
    told = environment("servers") | (broker_settings(folder) if name == "broker" else {})
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            command, env=told, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        ), port


def rabbitmq() -> str:
    """Where RabbitMQ is. Exits with one line where it is not."""
    found = shutil.which("rabbitmq-server", path=DEBIAN) or shutil.which("rabbitmq-server")
    return found or sys.exit("there is no rabbitmq-server: install RabbitMQ, or set AMQP_URL to one that runs")


def broker_settings(folder: Path) -> dict[str, str]:
    """A node with a name, ports, a folder and a home of its own, that knows nothing of any other."""
    folder, port = folder.absolute(), int(BROKER_PORT)
    (folder / "plugins").write_text("[].")
    (folder / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{port}\n")
    return {
        "HOME": str(folder), "RABBITMQ_NODENAME": f"lessons-{port}@localhost", "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(port + 20000), "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_LOG_BASE": str(folder / "log"), "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"), "RABBITMQ_PID_FILE": str(folder / "pid"),
    }  # fmt: skip


def wait_for(name: str, process: "subprocess.Popen[bytes]", port: str) -> None:
    """Until it takes connections. Exits where it ends instead."""
    while process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", int(port))):
            return print(f"{name} takes connections on port {port}", flush=True)
        time.sleep(0.1)
    sys.exit(f"{name} ended with {process.returncode}; {data()}/lessons/{name}.log says why")


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a server and what it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "part", nargs="?", default="all", choices=["all", "on-broker", "broker", "servers", "api", "consumer"]
    )
    part = parser.parse_args().part
    (data() / f"lessons/{part}.pid").write_text(f"{os.getpid()}\n")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if part == "broker":
        keep(["broker"])
    elif part == "servers":
        own = {"broker": "AMQP_URL", "store": "MONGODB_URL", "functions": "AWS_ENDPOINT_URL_LAMBDA"}
        keep([name for name, variable in own.items() if variable not in os.environ])
    else:
        become(part)


if __name__ == "__main__":
    main()
