"""Answers the AWS Lambda Invoke API on this machine: `python -m lambdas.local --port 9001 [--host 127.0.0.1]`.

Left out, as nobody here needs it: all but the type RequestResponse, names as ARN or with a version, the context.
"""

import argparse
import json
import sys
import traceback
from collections import Counter
from io import BytesIO
from typing import Any
from uuid import uuid4

from bottle import Bottle, HTTPResponse, request

from core.http.serving import serve
from core.running.process import exit_code, stop_on_signal
from lambdas import make_label, send_email

THREADS = 64  # functions at once
JAMS = {"Jam": 2, "Jam!": sys.maxsize}  # city -> how often the label of an order to it fails: to try retries with
jams = Counter[Any]()  # by token


def make_label_or_jam(event: dict[str, Any], context: object) -> dict[str, Any]:
    """The function `make_label`, but for the test values in `JAMS`."""
    asked = event or {}  # what is wrong with it is for the function to say
    token, city = asked.get("token"), (asked.get("shipTo") or {}).get("city", "")
    if jams[token] < JAMS.get(city, 0):
        jams[token] += 1
        raise OSError(f"the printer is jammed: orders to {city} are there to fail")
    return make_label.handler(event, context)


FUNCTIONS = {"send_email": send_email.handler, "make_label": make_label_or_jam}


class Client:
    """Stands in for boto3's Lambda client and runs the functions here, so that nothing leaves the machine."""

    def invoke(self, FunctionName: str, Payload: bytes) -> dict[str, Any]:
        """Call a function as Lambda does: its answer as JSON; `FunctionError` as well where it raised."""
        try:
            answer, failure = json.dumps(FUNCTIONS[FunctionName](json.loads(Payload), None)), {}
        except Exception as error:
            what = {"errorMessage": str(error), "errorType": type(error).__name__, "requestId": str(uuid4())}
            answer = json.dumps({**what, "stackTrace": traceback.format_tb(error.__traceback__)})
            failure = {"FunctionError": "Unhandled"}
        return {"Payload": BytesIO(answer.encode()), **failure}


def make_app() -> Bottle:
    """The Invoke API as a WSGI app."""
    app = Bottle()
    app.get("/healthz", callback=lambda: "")
    app.post("/2015-03-31/functions/<name>/invocations", callback=invoke)
    return app


def invoke(name: str) -> HTTPResponse:
    """One call, answered when the function has ended."""
    if name not in FUNCTIONS:
        return HTTPResponse(f"Function not found: {name}", 404, x_amzn_errortype="ResourceNotFoundException")
    answer = Client().invoke(name, request.body.read() or b"{}")
    failure = {"x_amz_function_error": answer["FunctionError"]} if "FunctionError" in answer else {}
    return HTTPResponse(answer["Payload"].read(), **failure)


def main() -> None:
    """Serve until SIGTERM or SIGINT; what is in hand is finished."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=9001)
    parser.add_argument("--host", default="127.0.0.1")
    args = parser.parse_args()
    serve(make_app(), args.host, args.port, THREADS, stop_on_signal(), lambda at: print(f"lambdas on {at}", flush=True))


if __name__ == "__main__":
    sys.exit(exit_code(main))
