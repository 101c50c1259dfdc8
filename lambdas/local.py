"""Answers the AWS Lambda Invoke API on this machine: `python -m lambdas.local --port 9001 [--host 127.0.0.1]`."""

import argparse
import json
import re
import signal
import traceback
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote
from uuid import uuid4

from lambdas import make_label, send_email

FUNCTIONS = {"send_email": send_email.handler, "make_label": make_label.handler}
PATH = re.compile(r"/2015-03-31/functions/(?:[\w:-]+:function:)?([\w-]+)(?::[\w$-]+)?/invocations(?:\?.*)?")


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # with the default of 5 a burst of connections waits a second
    daemon_threads = False  # server_close() waits for what is in hand


class Invocation(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave in one write
    disable_nagle_algorithm = True
    timeout = 3  # seconds a connection may idle, hence the longest that server_close() waits for one

    def do_GET(self) -> None:
        self._answer(200 if self.path == "/healthz" else 404)

    def do_POST(self) -> None:
        body, path = self.rfile.read(int(self.headers.get("Content-Length", 0))), PATH.fullmatch(unquote(self.path))
        if not path or path[1] not in FUNCTIONS:
            return self._refuse(404, "ResourceNotFoundException", f"Function not found: {self.path}")
        try:
            event = json.loads(body or "{}")
        except ValueError as error:
            return self._refuse(400, "InvalidRequestContentException", f"Could not parse payload into json: {error}")
        kind = self.headers.get("X-Amz-Invocation-Type", "RequestResponse")
        if kind == "DryRun":
            self._answer(204)
        elif kind == "Event":
            self._answer(202, "", "Connection", "close")  # this thread has work to do now
            run(path[1], event)
        else:
            self._answer(200, *run(path[1], event))

    def _refuse(self, status: int, kind: str, text: str) -> None:
        self._answer(status, json.dumps({"Type": "User", "Message": text}), "x-amzn-errortype", kind)

    def _answer(self, status: int, body: str = "", *header: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body.encode())))
        if header:
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body.encode())
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: who invokes logs what came of it."""


def run(name: str, event: dict) -> tuple[str, ...]:
    """Call a function as Lambda does: its answer, or its error and the header that tells."""
    context = SimpleNamespace(function_name=name, aws_request_id=str(uuid4()))
    context.get_remaining_time_in_millis = lambda: 30_000  # nothing here stops a slow one
    try:
        return (json.dumps(FUNCTIONS[name](event, context)),)
    except Exception as error:
        told = {"errorMessage": str(error), "errorType": type(error).__name__, "requestId": context.aws_request_id}
        trace = traceback.format_tb(error.__traceback__)
        return json.dumps({**told, "stackTrace": trace}), "X-Amz-Function-Error", "Unhandled"


def serve(host: str, port: int) -> ThreadingHTTPServer:
    """A listening server: run serve_forever() in a thread; shutdown() and server_close() end it and what is in hand."""
    return Server((host, port), Invocation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=9001)
    parser.add_argument("--host", default="127.0.0.1")
    for number in (signal.SIGTERM, signal.SIGINT):  # a shell starts what runs in the background with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    options = parser.parse_args()
    with serve(options.host, options.port) as server, suppress(KeyboardInterrupt):
        print(f"lambdas on http://{options.host}:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
