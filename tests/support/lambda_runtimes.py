"""The two runtimes of the contract test, each a process: AWS's own runtime client, and `python -m lambdas.local`."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import boto3
from botocore.config import Config

from core.base.settings import ROOT

# Resource -> handler, as deployed.
TEMPLATE = dict(
    re.findall(r"(?m)^  (\w+):\n    Type: AWS::Serverless::Function\n(?:(?:   .*)?\n)*?      Handler: (\S+)$",
               (ROOT / "lambdas/template.yaml").read_text())
)  # fmt: skip


class Result(NamedTuple):
    failed: bool
    payload: Any


class NeverStarted(Exception):
    """The runtime could not load the function."""


Call = Callable[[Any], Result]


class RuntimeApi(ThreadingHTTPServer):
    """What Lambda shows to the runtime inside a function: it requests the next event and posts what came of it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Talk)
        self.events, self.results = SimpleQueue[bytes | None](), SimpleQueue[tuple[str, Any]]()

    def call(self, event: Any) -> Result:
        self.events.put(json.dumps(event, ensure_ascii=False).encode())
        about, payload = self.results.get(timeout=20)
        if about == "init/error":
            raise NeverStarted(payload)
        return Result(about.endswith("/error"), payload)


class Talk(BaseHTTPRequestHandler):
    server: RuntimeApi
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        assert self.path == "/2018-06-01/runtime/invocation/next"
        event = self.server.events.get()
        if event is None:  # the end
            self.close_connection = True
            return
        deadline = int((time.time() + 20) * 1000)
        arn = "arn:aws:lambda:eu-west-1:123456789012:function:under-test"
        headers = {"Aws-Request-Id": "request-1", "Deadline-Ms": deadline, "Invoked-Function-Arn": arn}
        self.send(200, event, **headers)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = re.fullmatch(r"/2018-06-01/runtime/(invocation/request-1/(?:response|error)|init/error)", self.path)
        assert known, self.path
        self.send(202, b"{}")
        self.server.results.put((known[1], body))

    def send(self, status: int, body: bytes, **headers: Any) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(f"Lambda-Runtime-{name}", str(value))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def environment(folder: Path) -> dict[str, str]:
    """Nothing of ours but the data folder: no MAKEFLAGS, no PYTHONPATH, no SMTP_URL, and nothing of AWS."""
    return {"PATH": os.environ["PATH"], "DATA_DIR": str(folder / "data")}


def package(function: str, folder: Path) -> tuple[Path, str]:
    """What `sam build` makes of a function of the template, and its handler."""
    [(resource, handler)] = [found for found in TEMPLATE.items() if found[1] == f"lambdas.{function}.handler"]
    make = ["make", "--silent", f"build-{resource}", f"ARTIFACTS_DIR={folder / 'package'}"]
    subprocess.run(make, cwd=ROOT / "lambdas", env=environment(folder), check=True)
    return folder / "package", handler


def keep_to(folder: Path, monkeypatch: Any) -> None:
    """The same for functions in this process: they write into `folder`, and none of the settings leads elsewhere."""
    for name in ("SMTP_URL", "TOKENS_TABLE", "AWS_LAMBDA_FUNCTION_NAME", "MAIL_FROM", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DATA_DIR", str(folder))


@contextmanager
def process(folder: Path, *args: str, cwd: Path, **more: str) -> Iterator[subprocess.Popen]:
    """`python -m ...`; if what is done with it fails, the error has what it printed."""
    command, output = [sys.executable, "-m", *args], folder / "output.log"
    with output.open("wb") as log:
        running = subprocess.Popen(
            command, cwd=cwd, env={**environment(folder), **more}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if "lambdas.local" in args else log, stderr=log, text=True,
        )  # fmt: skip
    with running:
        try:
            yield running
        except Empty:
            raise AssertionError(f"no answer from {command}: {output.read_text()}") from None
        finally:
            running.kill()


@contextmanager
def awslambdaric(function: str, folder: Path, without: str = "") -> Iterator[Call]:
    """The runtime client that AWS runs functions with, on the package made for AWS, `without` one of its modules."""
    code, handler = package(function, folder)
    if without:
        (code / "lambdas" / without).unlink()
    with RuntimeApi() as api:
        threading.Thread(target=api.serve_forever, kwargs={"poll_interval": 0.01}).start()
        # The version of Python decides how it writes results: as UTF-8, from 3.12 on.
        on_aws = {
            "AWS_LAMBDA_RUNTIME_API": f"127.0.0.1:{api.server_port}",
            "AWS_EXECUTION_ENV": "AWS_Lambda_python3.13",
        }
        try:
            with process(folder, "awslambdaric", handler, cwd=code, **on_aws):
                yield api.call
        finally:
            api.events.put(None)
            api.shutdown()


def connect(url: str) -> Any:
    """The client that calls AWS, calling the local runtime instead."""
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "eu-west-1"}
    once = Config(retries={"total_max_attempts": 1}, max_pool_connections=20, read_timeout=20)
    return boto3.client("lambda", endpoint_url=url, config=once, **keys)


@contextmanager
def local(function: str, folder: Path) -> Iterator[Call]:
    """The local runtime, called by the client that calls AWS."""
    with process(folder, "lambdas.local", "--port", "0", cwd=ROOT) as running:
        client = connect(running.stdout.readline().split()[-1])

        def call(event: Any) -> Result:
            response = client.invoke(FunctionName=function, Payload=json.dumps(event, ensure_ascii=False).encode())
            return Result("FunctionError" in response, json.loads(response["Payload"].read()))

        yield call
        client.close()


RUNTIMES = {"awslambdaric": awslambdaric, "local": local}
