"""The REST API: takes orders, shows them, cancels them, sets stock. `python orderproc.py` serves it.

What it promises is in `openapi.json`. It stores an order together with its event, hands the event to the outbox, and
knows no handler and no queue.
"""

import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.metadata import distribution
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from bottle import HTTPResponse

from core.base import ids, metrics
from core.base.settings import ROLES, ROOT, Settings
from core.bus.bus import Bus
from core.flow.outbox import Outbox
from core.http import reading
from core.http.app import App, Call, Request, add_log_fields, checked, header
from core.http.problems import problem, reply
from core.http.serving import serve
from core.order.events import Event, make_event
from core.order.state_machine import TRANSITIONS, OrderDocument
from core.order.view import view
from core.running import discovery, process, wiring
from core.running.health import add_health, serve_health
from core.store.store import Store

log = logging.getLogger("orderproc")
HTML, CSS, JAVASCRIPT = (f"text/{kind}; charset=utf-8" for kind in ("html", "css", "javascript"))
SWAGGER_UI = Path(str(distribution("offapi").locate_file("offapi")))  # to import it would read nine megabytes
FILES = (
    ("/", ROOT / "web/index.html", HTML),
    ("/page.css", ROOT / "web/page.css", CSS),
    ("/page.js", ROOT / "web/page.js", JAVASCRIPT),
    ("/docs", ROOT / "web/docs.html", HTML),
    ("/docs/docs.js", ROOT / "web/docs.js", JAVASCRIPT),
    ("/docs/swagger-ui.css", SWAGGER_UI / "swagger_style.css", CSS),
    ("/docs/swagger-ui-bundle.js", SWAGGER_UI / "swagger_bundle.js", JAVASCRIPT),
    ("/openapi.json", ROOT / "openapi.json", "application/json"),
    ("/asyncapi.json", ROOT / "asyncapi.json", "application/json"),
)


def make_app(settings: Settings, store: Store, outbox: Outbox, bus: Bus) -> App:
    """The API as a WSGI app. Of the bus it only asks whether it is `up`."""
    api, app = Api(store, outbox), App()

    def route(method: str, rule: str, call: Call, roles: Iterable[str] = ROLES, **takes: Any) -> None:
        app.route(rule, method, checked(call, settings.api_keys, roles, **takes))

    route("POST", "/orders", api.create_order, ("client", "admin"), body=True)
    route("GET", "/orders", api.list_orders, query=reading.LIST_ORDERS)
    route("GET", "/orders/<order_id>", api.show_order)
    route("POST", "/orders/<order_id>/cancel", api.cancel_order, ("client", "admin"))
    route("GET", "/orders/<order_id>/events", api.show_events)
    route("POST", "/orders/<order_id>/redrive", api.redrive_order, ("admin",))
    route("GET", "/handlers", api.list_handlers)
    route("GET", "/stock", api.list_stock, query=reading.LIST_STOCK)
    route("GET", "/stock/<sku>", api.show_stock)
    route("PUT", "/stock/<sku>", api.set_stock, ("admin",), body=True)
    for path, file, kind in FILES:
        app.serve_file(path, file, kind)
    # Ready without the broker: orders are accepted, and their events wait.
    add_health(app, store, lambda: bus.up, needs_broker=False)
    return app


class Api:
    """What each route does with a request that passed the checks."""

    def __init__(self, store: Store, outbox: Outbox) -> None:
        self.store, self.orders, self.stock, self.outbox = store, store.orders, store.stock, outbox

    def create_order(self, request: Request) -> HTTPResponse:
        key = reading.idempotency_key(header("IDEMPOTENCY_KEY"))
        order = {"_id": ids.new_order_id(), "owner": request.key.name} | reading.read_order(request.body)
        event = new_event("order_created", order["_id"])
        document = self.orders.create(order, event, key, reading.fingerprint(request.body))
        self.outbox.publish_pending(document)  # a replay's too: the first answer may have been lost with its event
        if document["_id"] != order["_id"]:
            return show(document, 201, location=f"/orders/{document['_id']}", idempotent_replayed="true")
        metrics.ORDERS.labels("pending").inc()
        return show(document, 201, location=f"/orders/{document['_id']}")

    def list_orders(self, request: Request) -> HTTPResponse:
        where = {name: value for name, value in request.query.items() if name in ("status", "customerId")}
        if request.key.role == "client":
            where["owner"] = request.key.name
        return list_page("orders", "id", request.query, lambda *page: map(view, self.orders.page(where, *page)))

    def show_order(self, request: Request, order_id: str) -> HTTPResponse:
        return tagged(show(self._find(request, order_id)))

    def show_events(self, request: Request, order_id: str) -> HTTPResponse:
        return tagged(reply({"events": self._find(request, order_id)["events"]}))

    def redrive_order(self, request: Request, order_id: str) -> HTTPResponse:
        return show(self.store.open_orders.redrive(self._find(request, order_id)))

    def cancel_order(self, request: Request, order_id: str) -> HTTPResponse:
        self._find(request, order_id)
        event = new_event("order_cancelled", order_id)
        document, cancelled = self.orders.cancel(event)
        if cancelled:
            metrics.ORDERS.labels("cancelled").inc()
            self.outbox.publish_pending(document, [event])
        return show(document)

    def list_handlers(self, request: Request) -> HTTPResponse:
        reports = self.store.reports.all()
        delays = [report.pop("retryDelays") for report in sorted(reports, key=itemgetter("seen"))]  # the newest counts
        return tagged(reply({"retryDelays": delays[-1] if delays else [], "handlers": reports}))

    def list_stock(self, request: Request) -> HTTPResponse:
        return list_page("stock", "sku", request.query, self.stock.page)

    def show_stock(self, request: Request, sku: str) -> HTTPResponse:
        entry = self.stock.get(sku) if re.fullmatch(reading.SKU, sku) else None
        return tagged(reply(entry)) if entry else problem("not-found", "there is no such SKU")

    def set_stock(self, request: Request, sku: str) -> HTTPResponse:
        key = reading.idempotency_key(header("IDEMPOTENCY_KEY"))
        name = f"{request.key.name}:{key}" if key else str(uuid.uuid4())
        conditional = (header("IF_MATCH"), header("IF_NONE_MATCH")) != (None, None)
        needs = as_the_client_knows_it if conditional else None
        entry, new = self.stock.put(sku, reading.read_available(sku, request.body), name, needs)
        response = reply(entry, 201 if new else 200)
        response.set_header("ETag", etag(response))
        return response

    def _find(self, request: Request, order_id: str) -> OrderDocument:
        document = self.orders.get(order_id) if re.fullmatch(reading.ORDER_ID, order_id) else None
        if not document or (request.key.role == "client" and document["owner"] != request.key.name):
            raise problem("not-found", "there is no such order")  # a 403 would tell that there is
        return document


def new_event(type: str, order_id: str) -> Event:
    """An event that the API announces, in the trace of the request in hand."""
    return make_event(
        type, {}, id=str(uuid.uuid4()), source="/orderproc/api", subject=order_id,
        orderstatus=TRANSITIONS[type].leaves, traceparent=header("TRACEPARENT"),
    )  # fmt: skip


def show(document: OrderDocument, status: int = 200, **headers: str) -> HTTPResponse:
    """The order as an answer."""
    add_log_fields(order=document["_id"])
    return reply(view(document), status, **headers)


def etag(response: HTTPResponse) -> str:
    """The entity tag of what an answer shows (RFC 9110, 8.8.3)."""
    return f'"{ids.digest(response.body)[:32]}"'


def matches(tags: str, tag: str, weak: str = "(?:W/)?") -> bool:
    """Whether a tag is among those of If-Match or If-None-Match; `*` means any."""
    return tags.strip() == "*" or tag in re.findall(f'(?:^|[, ]){weak}("[^"]*")', tags)


def tagged(response: HTTPResponse) -> HTTPResponse:
    """An answer with its ETag; 304 where the client has it already."""
    tag = etag(response)
    response.set_header("ETag", tag)
    if matches(header("IF_NONE_MATCH", ""), tag):
        response.status, response.body = 304, ""  # Bottle leaves out the headers that go with a body
    return response


def as_the_client_knows_it(entry: dict[str, Any] | None) -> bool:
    """Whether an entry of the stock, or None, is what If-Match and If-None-Match ask for."""
    if entry is None:
        return header("IF_MATCH") is None
    tag = etag(reply(entry))
    # If-Match asks for the very same (RFC 9110, 13.1.1), so a weak tag is none.
    return matches(header("IF_MATCH", "*"), tag, weak="") and not matches(header("IF_NONE_MATCH", ""), tag)


def list_page(name: str, id: str, query: dict[str, str], fetch: Callable[..., Iterable[Any]]) -> HTTPResponse:
    """One page of a list: keyset, so a page costs the same wherever it is and nothing comes twice.

    `fetch(after, limit)` gives what follows behind an entry; the cursor is the `id` of a page's last entry.
    """
    limit = int(query.get("limit", "20"))
    entries = list(fetch(query.get("cursor"), limit + 1))
    if len(entries) <= limit:
        return tagged(reply({name: entries, "next": None}))
    cursor = entries[limit - 1][id]  # there was one more than is shown
    link = f'</{name}?{urlencode(query | {"cursor": cursor})}>; rel="next"'
    return tagged(reply({name: entries[:limit], "next": cursor}, link=link))


# --- the process -----------------------------------------------------------------------------------------------------


def run(stop: threading.Event) -> None:
    """Serve until `stop`, for `make run` with the consumer beside. Raises a Refusal."""
    settings = process.read_settings(need=("MONGODB_URL", "AMQP_URL", "API_KEYS"))
    with ExitStack() as at_end:
        store, bus = wiring.connect_all(settings, wiring.start_bundled(settings, at_end))
        if settings.single_process:
            start_consumer(settings, store, bus, stop, at_end)
        else:
            bus.start_publishing()
            at_end.callback(bus.close)
        app = make_app(settings, store, Outbox(store, bus), bus)
        serve_health(settings, "API_METRICS_PORT", store, lambda: bus.up, needs_broker=False)
        serve(app, settings.host, settings.port, settings.web_threads, stop, lambda where: greet(settings, where))


def start_consumer(settings: Settings, store: Store, bus: Bus, stop: threading.Event, at_end: ExitStack) -> None:
    """The consumer beside the API, where one of the two servers is built in. Neither half goes on alone.

    Returns when the bus in memory knows every queue, as what is published before would come back.
    """
    import consumer
    from lambdas import local

    if settings.bundled_store:
        store.stock.fill(wiring.CATALOGUE)
    handlers = discovery.discover(settings.handlers_dir, settings.handlers)
    client = local.Client()  # nothing here may ever reach a cloud, unless it is asked to
    if settings.aws_endpoint_url_lambda:
        client = consumer.lambda_client(settings.concurrency * len(handlers))
    pool = at_end.enter_context(ThreadPoolExecutor(1, "consumer"))
    running = pool.submit(consumer.consume, settings, handlers, store, bus, client, stop)
    at_end.callback(running.result)  # raises what ended it
    at_end.callback(stop.set)
    running.add_done_callback(lambda _: stop.set())
    while settings.amqp_url == "embedded" and not (bus.consuming or running.done()):
        time.sleep(0.01)


def greet(settings: Settings, address: str) -> None:
    """Say where it is, and to a person who tries it how."""
    if not settings.single_process:
        return log.info("listening", extra={"address": address})
    secret = next(iter(settings.api_keys.values())).secret
    order = '{"customerId": "ada", "email": "ada@example.com", "items": [{"sku": "A1", "quantity": 2, "price": 19.99}]}'
    print(f"orderproc is at {address}/#key={secret}; Ctrl-C ends it. Open that, or try:\n")
    print(f"curl {address}/orders -H 'Authorization: Bearer {secret}' \\")
    print(f"  -H 'Content-Type: application/json' -d '{order}'\n", flush=True)


if __name__ == "__main__":
    process.leave(process.exit_code(lambda: run(process.stop_on_signal())))
