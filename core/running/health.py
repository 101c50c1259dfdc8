"""The three routes both processes have, `/healthz`, `/readyz` and `/metrics`, and the consumer's server for them."""

import threading
from collections.abc import Callable
from typing import Any

import bottle
import waitress
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest

from core.http.serving import listen

WORDS = {True: "up", False: "down"}


def add_health(app: bottle.Bottle, store: Callable[[], bool], broker: Callable[[], bool], needs_broker: bool) -> None:
    """Add the routes; `store` and `broker` say whether each is up, and `/readyz` is 503 while what is needed is not."""

    # Asks no dependency: an outage elsewhere must not get this process killed.
    app.get("/healthz", callback=lambda: {"alive": True})

    @app.get("/readyz")
    def readyz() -> dict[str, Any]:
        store_up, broker_up = store(), broker()
        ready = store_up and (broker_up or not needs_broker)
        bottle.response.status = 200 if ready else 503
        return {"ready": ready, "store": WORDS[store_up], "broker": WORDS[broker_up]}

    @app.get("/metrics")
    def metrics() -> bytes:
        bottle.response.content_type = CONTENT_TYPE_LATEST
        return generate_latest(REGISTRY)


def serve_health(host: str, port: int, store: Callable[[], bool], broker: Callable[[], bool]) -> None:
    """Serve the routes alone, on a thread that ends with the process. Raises SettingInvalid."""
    app = bottle.Bottle()
    add_health(app, store, broker, needs_broker=True)
    server = waitress.create_server(app, sockets=[listen(host, port, "METRICS_PORT")], threads=2, ident=None)
    threading.Thread(target=server.run, name="health", daemon=True).start()
