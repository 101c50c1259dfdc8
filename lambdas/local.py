"""Answers the AWS Lambda Invoke API on this machine: `python -m lambdas.local --port 9001 [--host 127.0.0.1]`."""

import argparse
import json
import re
import sys
import threading
import traceback
from io import BytesIO
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

from bottle import Bottle, HTTPResponse, request

from core.http.serving import serve
from core.running.process import exit_code, stop_on_signal
from lambdas import make_label, send_email

FUNCTIONS = {"send_email": send_email.handler, "make_label": make_label.handler}
NAME = re.compile(r"(?:[\w:-]+:function:)?([\w-]+)(?::[\w$-]+)?")  # also as an ARN, also with a version
THREADS = 64  # functions at once


class Client:
    """Stands in for boto3's Lambda client and runs the functions here, so that nothing leaves the machine."""

    def invoke(self, FunctionName: str, Payload: bytes) -> dict[str, Any]:
        body, error = run(FunctionName, json.loads(Payload))
        return {"Payload": BytesIO(body.encode()), **error}


def make_app() -> Bottle:
    """The Invoke API as a WSGI app."""
    app = Bottle()
    app.get("/healthz", callback=lambda: "")
    app.post("/2015-03-31/functions/<name:path>/invocations", callback=invoke)
    return app


def invoke(name: str) -> HTTPResponse:
    """One call, by its invocation type: RequestResponse, Event or DryRun."""
    match = NAME.fullmatch(name)
    if not match or match[1] not in FUNCTIONS:
        return _refuse(404, "ResourceNotFoundException", f"Function not found: {name}")
    try:
        event = json.loads(request.body.read() or b"{}")
    except ValueError as error:
        return _refuse(400, "InvalidRequestContentException", f"Could not parse payload into json: {error}")
    kind = request.get_header("X-Amz-Invocation-Type", "RequestResponse")
    if kind == "Event":
        threading.Thread(target=run, args=[match[1], event]).start()
    if kind != "RequestResponse":
        return HTTPResponse(status=202 if kind == "Event" else 204)
    body, failure = run(match[1], event)
    return HTTPResponse(body, **({"X-Amz-Function-Error": failure["FunctionError"]} if failure else {}))


def run(name: str, event: dict) -> tuple[str, dict[str, str]]:
    """Call a function as Lambda does: its answer as JSON; {"FunctionError": ...} as well where it raised."""
    context = SimpleNamespace(function_name=name, aws_request_id=str(uuid4()))
    context.get_remaining_time_in_millis = lambda: 30_000  # nothing here stops a slow one
    try:
        return json.dumps(FUNCTIONS[name](event, context)), {}
    except Exception as error:
        what = {"errorMessage": str(error), "errorType": type(error).__name__, "requestId": context.aws_request_id}
        stack = traceback.format_tb(error.__traceback__)
        return json.dumps({**what, "stackTrace": stack}), {"FunctionError": "Unhandled"}


def _refuse(status: int, kind: str, message: str) -> HTTPResponse:
    return HTTPResponse(json.dumps({"Type": "User", "Message": message}), status, x_amzn_errortype=kind)


def main() -> None:
    """Serve until SIGTERM or SIGINT; what is in hand is finished."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=9001)
    parser.add_argument("--host", default="127.0.0.1")
    args = parser.parse_args()
    serve(make_app(), args.host, args.port, THREADS, stop_on_signal(), lambda at: print(f"lambdas on {at}", flush=True))


if __name__ == "__main__":
    sys.exit(exit_code(main))  # which waits for an Event that is running
