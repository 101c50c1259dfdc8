"""The REST API: takes orders, shows them, cancels them, sets stock. `python orderproc.py` serves it.

It knows HTTP. What clients may send `core.reading` says; what is stored it asks of `core.store` and `core.stock`, what
is to be announced it hands to `core.outbox`; it knows no handler and no queue. What it promises is in `openapi.json`.
"""

import functools
import json
import logging
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http import HTTPMethod
from typing import Any, NamedTuple
from urllib.parse import urlencode

import bottle
import waitress
from swagger_ui_bundle import swagger_ui_path

from core import embedded, events, reading, telemetry
from core.bus import BadTopology, Rabbit
from core.localbus import LocalBus
from core.outbox import Outbox
from core.reading import Faulty, Malformed
from core.settings import ROLES, ROOT, ApiKey, BadSetting, Settings, digest, load
from core.stock import Stock
from core.store import Conflict, KeyReused, Orders, StoreAway, connect, view

log = logging.getLogger("orderproc")


def main() -> int:
    """Serve until SIGTERM or SIGINT: 0 after a clean end, 2 where a setting is wrong."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        settings = load(os.environ, need=("MONGODB_URL", "AMQP_URL", "API_KEYS"))
        telemetry.set_up_logging(settings.log_level, settings.log_format)
        with wire(settings, stop) as app:
            serve(app, settings, stop, greet if settings.single_process else log_address)
    except (BadSetting, BadTopology) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def log_address(address: str) -> None:
    log.info("listening", extra={"address": address})


def greet(address: str) -> None:
    """Say where it is and how to try it."""
    secret = os.environ["API_KEYS"].split(":")[1].split(",")[0]
    order = '{"customerId": "ada", "email": "ada@example.com", "items": [{"sku": "A1", "quantity": 2, "price": 19.99}]}'
    print(f"orderproc is at {address} with the key {secret}; Ctrl-C ends it. Try:\n", flush=True)
    print(f"curl {address}/orders -H 'Authorization: Bearer {secret}' \\", flush=True)
    print(f"  -H 'Content-Type: application/json' -d '{order}'\n", flush=True)


@contextmanager
def wire(settings: Settings, stop: threading.Event) -> Iterator[bottle.Bottle]:
    """The app with all it needs around it; what was started for it ends with the block."""
    with ExitStack() as stack:
        url = settings.mongodb_url
        if settings.single_process:
            stack.enter_context(embedded.only_one(settings.data_dir))
        if url == "embedded":
            url = stack.enter_context(embedded.store(settings.data_dir / "mongo"))
        database = connect(url)
        orders, stock = Orders(database), Stock(database)
        bus: Any = LocalBus() if settings.amqp_url == "embedded" else Rabbit(settings.amqp_url, settings.retry_delays)
        if settings.single_process:
            stack.enter_context(consuming(settings, orders, stock, bus, stop))
        else:
            bus.start_publishing()
            stack.callback(bus.close)
        yield make_app(settings, orders, stock, Outbox(orders, bus), bus)


@contextmanager
def consuming(settings: Settings, orders: Orders, stock: Stock, bus: Any, stop: threading.Event) -> Iterator[None]:
    """The consumer in this process, beside the API: for `make run`, where one of the two servers is built in."""
    import consumer
    from lambdas import local

    handlers, client = consumer.discover(settings.handlers_dir, settings.handlers), {}
    if settings.mongodb_url in ("embedded", "memory"):
        stock.fill(embedded.CATALOGUE)
    if "AWS_ENDPOINT_URL_LAMBDA" not in os.environ:  # nothing here may ever reach a cloud
        server = local.serve("127.0.0.1", 0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = {"endpoint_url": f"http://127.0.0.1:{server.server_port}", "region_name": "local"}
        client |= {"aws_access_key_id": "local", "aws_secret_access_key": "local"}
    with ThreadPoolExecutor(1, "consumer") as pool:
        running = pool.submit(consumer.consume, settings, handlers, orders, stock, bus, stop, **client)
        running.add_done_callback(lambda _: stop.set())  # neither half goes on without the other
        while settings.amqp_url == "embedded" and not (bus.consuming or running.done()):
            time.sleep(0.01)
        try:
            yield
        finally:
            stop.set()
        running.result()


def make_app(settings: Settings, orders: Orders, stock: Stock, outbox: Outbox, bus: Any) -> bottle.Bottle:
    """The API as a WSGI app. Of the bus it only asks whether it is `up`."""
    api, app = Api(orders, stock, outbox), App()
    ping = functools.lru_cache(1)(lambda second: orders.ping())  # probes come in crowds; once a second is enough

    def route(
        method: str, rule: str, handler: Callable[..., Any], roles: tuple[str, ...] = ROLES, **reads: Any
    ) -> None:
        app.route(rule, method, guarded(handler, settings.api_keys, roles, **reads))

    def ready() -> dict[str, Any]:
        up = ping(int(time.monotonic()))  # ready without the broker: orders are accepted and their events wait
        return {"ready": up, "store": "up" if up else "down", "broker": "up" if bus.up else "down"}

    route("POST", "/orders", api.create_order, ("client", "admin"), body=True)
    route("GET", "/orders", api.list_orders, query=("status", "customerId", "limit", "cursor"))
    route("GET", "/orders/<order_id>", api.show_order)
    route("POST", "/orders/<order_id>/cancel", api.cancel_order, ("client", "admin"))
    route("GET", "/stock", api.list_stock, query=("limit", "cursor"))
    route("GET", "/stock/<sku>", api.show_stock)
    route("PUT", "/stock/<sku>", api.set_stock, ("admin",), body=True)
    for path, file, kind in FILES:
        app.get(path, callback=lambda file=file, kind=kind: reply(file.read_bytes(), kind=kind))
    telemetry.add_health(app, ready)
    return app


FILES = (  # served as they are; nothing that a client sends becomes part of a file's name
    ("/", ROOT / "web/index.html", "text/html; charset=utf-8"),
    ("/docs", ROOT / "web/docs.html", "text/html; charset=utf-8"),
    ("/docs/swagger-ui.css", swagger_ui_path / "swagger-ui.css", "text/css; charset=utf-8"),
    ("/docs/swagger-ui-bundle.js", swagger_ui_path / "swagger-ui-bundle.js", "text/javascript; charset=utf-8"),
    ("/openapi.json", ROOT / "openapi.json", "application/json"),
)


class App(bottle.Bottle):
    """Bottle with a trace, a log line and a measurement around each request, whether a route takes it or not."""

    def __init__(self) -> None:
        super().__init__()
        self.add_hook("before_request", refuse_odd_path)
        self.default_error_handler = in_our_words

    def wsgi(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        started = time.perf_counter()
        environ["orderproc.trace"] = trace = events.new_traceparent(environ.get("HTTP_TRACEPARENT", ""))
        with telemetry.about(trace=trace[3:35]):
            body = super().wsgi(environ, start_response)
            note(environ, bottle.response.status_code, time.perf_counter() - started)
        return body


def note(environ: dict[str, Any], status: int, seconds: float) -> None:
    # The rule, not the path: a client can make up any number of paths, and each would be a time series for ever.
    rule = environ["bottle.route"].rule if "bottle.route" in environ else "none"
    method = environ["REQUEST_METHOD"] if environ["REQUEST_METHOD"] in HTTPMethod.__members__ else "other"
    telemetry.HTTP_SECONDS.labels(rule, method, status).observe(seconds)
    about = {"method": method, "route": rule, "status": status, "ms": round(seconds * 1000, 1)}
    log.info("request", extra=about | environ.get("orderproc.about", {}))


def refuse_odd_path() -> None:
    # Bottle drops bytes that are not UTF-8, and its rules match before a last line end: not the path asked for.
    path = bottle.request.environ["bottle.raw_path"].encode("latin-1").decode(errors="surrogateescape")
    if not path.isprintable():
        raise bottle.HTTPError(404)


# --- what goes wrong is told as RFC 9457 says ----------------------------------------------------------------------

PROBLEMS = {
    "malformed": 400, "unauthorized": 401, "forbidden": 403, "not-found": 404, "method-not-allowed": 405,
    "conflict": 409, "too-large": 413, "unsupported-media-type": 415, "invalid": 422, "key-reused": 422,
    "internal-error": 500, "unavailable": 503,
}  # fmt: skip
EXCEPTIONS = {
    Malformed: "malformed", Faulty: "invalid", KeyReused: "key-reused", Conflict: "conflict", StoreAway: "unavailable",
    Exception: "internal-error",
}  # fmt: skip
HEADERS = {"unauthorized": {"WWW-Authenticate": "Bearer"}, "unavailable": {"Retry-After": "2"}}


def problem(slug: str, detail: str = "", **more: Any) -> bottle.HTTPResponse:
    """The answer that says what is wrong; raise it or return it."""
    said = {"type": f"urn:orderproc:{slug}", "title": slug.replace("-", " ").capitalize(), "status": PROBLEMS[slug]}
    body = json.dumps(said | ({"detail": detail} if detail else {}) | more)
    return reply(body, PROBLEMS[slug], HEADERS.get(slug), "application/problem+json")


def of_exception(error: Exception) -> bottle.HTTPResponse:
    """What the table says. The reason of a 5xx is for the log: it may name hosts and files."""
    slug = next(slug for kind, slug in EXCEPTIONS.items() if isinstance(error, kind))
    if slug == "internal-error":
        log.error("unexpected error", exc_info=error)
    errors = [{"pointer": pointer, "message": message} for pointer, message in getattr(error, "faults", ())]
    return problem(slug, str(error) if PROBLEMS[slug] < 500 else "", **({"errors": errors} if errors else {}))


def in_our_words(error: bottle.HTTPError) -> str:
    """What Bottle answers by itself: 404, 405 (with Allow), and 500 for what broke outside a guarded handler."""
    slug = {404: "not-found", 405: "method-not-allowed"}.get(error.status_code)
    said = problem(slug) if slug else of_exception(error.exception or error)
    bottle.response.content_type = said.content_type
    return said.body


def reply(
    body: str | bytes, status: int = 200, headers: dict[str, str] | None = None, kind: str = "application/json"
) -> bottle.HTTPResponse:
    text = body if isinstance(body, bytes) else f"{body}\n"  # a line of its own where curl prints it
    return bottle.HTTPResponse(text, status, {"Content-Type": kind} | (headers or {}))


# --- the checks before a handler, in the order in which they are made ----------------------------------------------

LARGEST_BODY = 64 * 1024  # bytes
JSON_IN_UTF8 = re.compile(r'application/json\s*(;\s*charset=("?)utf-8\2\s*)?')


class Asked(NamedTuple):
    """A request that passed the checks."""

    key: ApiKey
    query: dict[str, str]
    body: Any


def guarded(
    handler: Callable[..., Any], keys: Any, roles: Any, body: bool = False, query: tuple[str, ...] = ()
) -> Callable[..., bottle.HTTPResponse]:
    """The handler behind the checks. What any of them raises becomes a problem."""

    def answer(**path: str) -> bottle.HTTPResponse:
        try:
            key = authenticate(keys, roles)
            raw = read_body() if body else b"null"
            given = reading.read_query(bottle.request.query_string, query)
            return handler(Asked(key, given, reading.parse_json(raw)), **path)
        except bottle.HTTPResponse as said:
            return said
        except Exception as error:
            return of_exception(error)

    return answer


def authenticate(keys: dict[bytes, ApiKey], roles: tuple[str, ...]) -> ApiKey:
    match = re.fullmatch("(?i:bearer) +([!-~]+)", _header("AUTHORIZATION", ""))
    key = keys.get(digest(match[1])) if match else None
    if key is None:
        raise problem("unauthorized", "send Authorization: Bearer <secret>")
    if key.role not in roles:
        raise problem("forbidden", f"this takes the role {' or '.join(roles)}")
    return key


def read_body() -> bytes:
    if _header("CONTENT_ENCODING", "identity") != "identity" or not JSON_IN_UTF8.fullmatch(bottle.request.content_type):
        raise problem("unsupported-media-type", "send application/json in UTF-8, unencoded")
    body = bottle.request.environ["wsgi.input"].read(LARGEST_BODY + 1)  # waitress joins chunks and marks the end
    if len(body) > LARGEST_BODY:
        raise problem("too-large", f"at most {LARGEST_BODY} bytes")
    return body


def _header(name: str, default: Any = None) -> Any:
    return bottle.request.environ.get(f"HTTP_{name}", default)  # Bottle's own way raises on bytes that are not UTF-8


# --- the calls -----------------------------------------------------------------------------------------------------


class Api:
    """What each route does with a request that passed the checks."""

    def __init__(self, orders: Orders, stock: Stock, outbox: Outbox) -> None:
        self.orders, self.stock, self.outbox = orders, stock, outbox

    def create_order(self, asked: Asked) -> bottle.HTTPResponse:
        key = reading.idempotency_key(_header("IDEMPOTENCY_KEY"))
        order = {"id": events.new_order_id(), "owner": asked.key.name} | reading.read_order(asked.body)
        event = _event("order_created", order["id"])
        document, replayed = self.orders.create(order, event, key, reading.fingerprint(asked.body))
        if not replayed:
            telemetry.ORDERS.labels("pending").inc()
        self.outbox.announce(document)  # a replay too: the first answer may have been lost together with its event
        headers = {"Location": f"/orders/{document['_id']}"} | ({"Idempotent-Replayed": "true"} if replayed else {})
        return _show(document, 201, headers)

    def list_orders(self, asked: Asked) -> bottle.HTTPResponse:
        where = {name: value for name, value in asked.query.items() if name in ("status", "customerId")}
        where |= {"owner": asked.key.name} if asked.key.role == "client" else {}
        return list_page("orders", "id", asked.query, where, lambda *page: map(view, self.orders.page(where, *page)))

    def show_order(self, asked: Asked, order_id: str) -> bottle.HTTPResponse:
        said = _show(self._find(asked, order_id))
        etag = f'"{reading.sha256(said.body)[:32]}"'
        known = _header("IF_NONE_MATCH", "")
        if known.strip() == "*" or etag in re.findall('"[^"]*"', known):
            return bottle.HTTPResponse("", 304, {"ETag": etag})
        said.set_header("ETag", etag)
        return said

    def cancel_order(self, asked: Asked, order_id: str) -> bottle.HTTPResponse:
        self._find(asked, order_id)
        document, cancelled = self.orders.cancel(order_id, _event("order_cancelled", order_id))
        if cancelled:
            self._announce(document)
        return _show(document)

    def list_stock(self, asked: Asked) -> bottle.HTTPResponse:
        return list_page("stock", "sku", asked.query, {}, self.stock.page)

    def show_stock(self, asked: Asked, sku: str) -> bottle.HTTPResponse:
        entry = self.stock.get(sku) if reading.SKU.fullmatch(sku) else None
        return reply(json.dumps(entry)) if entry else problem("not-found", "there is no such SKU")

    def set_stock(self, asked: Asked, sku: str) -> bottle.HTTPResponse:
        return reply(json.dumps(self.stock.put(sku, reading.read_available(sku, asked.body))))

    def _find(self, asked: Asked, order_id: str) -> dict[str, Any]:
        document = self.orders.get(order_id) if reading.ORDER_ID.fullmatch(order_id) else None
        if not document or (asked.key.role == "client" and document["owner"] != asked.key.name):
            raise problem("not-found", "there is no such order")  # a 403 would tell that there is
        return document

    def _announce(self, document: dict[str, Any]) -> None:
        telemetry.ORDERS.labels(document["status"]).inc()
        self.outbox.announce(document)


def _event(type: str, order_id: str) -> events.Event:
    return events.created_by_api(type, order_id, bottle.request.environ["orderproc.trace"])


def _show(document: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> bottle.HTTPResponse:
    bottle.request.environ["orderproc.about"] = {"order": document["_id"]}
    return reply(json.dumps(view(document)), status, headers)


def list_page(name: str, id: str, query: dict[str, str], where: dict[str, str], fetch: Any) -> bottle.HTTPResponse:
    """One page of a list: keyset, so a page costs the same wherever it is and nothing comes twice."""
    limit = int(query.get("limit", "20"))
    found = list(fetch(reading.open_cursor(name, where, query.get("cursor")), limit + 1))
    shown, next, headers = found[:limit], None, {}
    if len(found) > limit:  # one more than is shown: there is a next page
        next = reading.cursor(name, where, shown[-1][id])
        headers["Link"] = f'</{name}?{urlencode(query | {"cursor": next})}>; rel="next"'
    return reply(json.dumps({name: shown, "next": next}), headers=headers)


# --- serving -------------------------------------------------------------------------------------------------------

DRAIN_SECONDS = 8  # whoever sends SIGTERM waits ten at least
LIMITS = {
    "max_request_header_size": 32 * 1024, "max_request_body_size": 1024 * 1024, "connection_limit": 1000,
    "channel_timeout": 60, "asyncore_use_poll": True, "log_socket_errors": False, "ident": None,
}  # fmt: skip


def serve(
    app: bottle.Bottle, settings: Settings, stop: threading.Event, ready: Callable[[str], None] = log_address
) -> None:
    """Answer until `stop` is set; then what was accepted is answered, new connections are refused, and this returns."""
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        raise BadSetting(f"HOST, PORT: cannot listen on {settings.host} {settings.port}: {error.strerror}") from None
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it has a line for each request that waits
    sockets: dict[int, Any] = {}
    server = waitress.create_server(app, sockets, sockets=[listener], threads=settings.web_threads, **LIMITS)
    ready(f"http://{settings.host}:{server.effective_port}")
    turn = functools.partial(server.asyncore.loop, use_poll=True, map=sockets, count=1)
    while not stop.is_set():  # its own loop could not be left without cutting off whoever waits for an answer
        turn(timeout=0.2)
    drain(server, turn)


def drain(server: Any, turn: Callable[..., None]) -> None:
    """Answer what was accepted, for some seconds at most."""
    while select.select([server.socket], [], [], 0)[0]:
        server.handle_accept()  # who connected before now is answered
    server.del_channel()
    server.socket.close()
    end = time.monotonic() + DRAIN_SECONDS
    while server.active_channels and time.monotonic() < end:
        turn(timeout=0.05)
        for channel in server.active_channels.values():
            for request in channel.requests[-1:]:
                request.headers["CONNECTION"] = "close"  # so the answer says it, and the client sends no more here
            channel.will_close |= not (channel.requests or channel.request or channel.total_outbufs_len)
    server.task_dispatcher.shutdown(timeout=1)
    server.close()


if __name__ == "__main__":
    telemetry.leave(main())
