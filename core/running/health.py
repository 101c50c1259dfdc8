"""The three routes both processes have, `/healthz`, `/readyz` and `/metrics`, and the consumer's server for them."""

import threading
from collections.abc import Callable

from bottle import Bottle, HTTPResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from core.http.serving import listen

WORDS = {True: "up", False: "down"}


def add_health(app: Bottle, store: Callable[[], bool], broker: Callable[[], bool], needs_broker: bool) -> None:
    """Add the routes; `store` and `broker` say whether each is up, and `/readyz` is 503 while what is needed is not."""

    def readyz() -> HTTPResponse:
        store_up, broker_up = store(), broker()
        ready = store_up and (broker_up or not needs_broker)
        body = {"ready": ready, "store": WORDS[store_up], "broker": WORDS[broker_up]}
        return HTTPResponse(body, 200 if ready else 503)

    # Asks no dependency: an outage elsewhere must not get this process killed.
    app.get("/healthz", callback=lambda: {"alive": True})
    app.get("/readyz", callback=readyz)
    app.get("/metrics", callback=lambda: HTTPResponse(generate_latest(), content_type=CONTENT_TYPE_LATEST))


def serve_health(host: str, port: int, store: Callable[[], bool], broker: Callable[[], bool]) -> None:
    """Serve the routes alone, on a thread that ends with the process. Raises SettingInvalid."""
    app = Bottle()
    add_health(app, store, broker, needs_broker=True)
    server = listen(app, host, port, threads=2, variables="METRICS_PORT")
    threading.Thread(target=server.run, name="health", daemon=True).start()
