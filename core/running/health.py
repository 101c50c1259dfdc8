"""The three routes both processes have, `/healthz`, `/readyz` and `/metrics`, and a server for them alone."""

import threading
from collections.abc import Callable

from bottle import Bottle, HTTPResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from core.base.settings import Settings
from core.http.app import App
from core.http.serving import listen
from core.store.store import Store

WORDS = {True: "up", False: "down"}


def add_health(app: Bottle, store: Store, broker: Callable[[], bool], needs_broker: bool) -> None:
    """Add the routes; `broker` says whether it is up, and `/readyz` is 503 while what is needed is not."""

    def readyz() -> HTTPResponse:
        store_up, broker_up = store.ping(), broker()
        ready = store_up and (broker_up or not needs_broker)
        body = {"ready": ready, "store": WORDS[store_up], "broker": WORDS[broker_up]}
        return HTTPResponse(body, 200 if ready else 503)

    # Asks no dependency: an outage elsewhere must not get this process killed.
    app.get("/healthz", callback=lambda: {"alive": True})
    app.get("/readyz", callback=readyz)
    app.get("/metrics", callback=lambda: HTTPResponse(generate_latest(), content_type=CONTENT_TYPE_LATEST))


def serve_health(
    settings: Settings, variable: str, store: Store, broker: Callable[[], bool], needs_broker: bool
) -> None:
    """Serve the routes alone, on threads of their own that end with the process, on the port that a variable names,
    if it does: work in crowds must not keep probes waiting. Raises SettingInvalid.
    """
    port = getattr(settings, variable.lower())
    if port is None:
        return
    app = App()
    add_health(app, store, broker, needs_broker)
    server = listen(app, settings.host, port, threads=2, variables=variable)
    threading.Thread(target=server.run, name="health", daemon=True).start()
