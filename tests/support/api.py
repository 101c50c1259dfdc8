"""The API without a server: the app over mongomock and the memory bus, and a client that calls it as a server would."""

import io
import json
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import unquote_to_bytes

import mongomock

from core.base import settings
from core.bus.memory import MemoryBus
from core.flow.outbox import Outbox
from core.order.events import Event
from core.order.state_machine import OrderDocument
from core.store.store import Store
from orderproc import make_app

KEYS = "shop:shop-key,rival:rival-key:client,auditor:read-key:read,boss:admin-key:admin"
ORDER = {"customerId": "c-1", "items": [{"sku": "A1", "quantity": 2, "price": 19.99}]}


class Response:
    """What came back. `json` parses it; `problem` also checks that it is a proper one."""

    def __init__(self, status: str, headers: list[tuple[str, str]], body: bytes) -> None:
        self.status, self.body = int(status.split(maxsplit=1)[0]), body
        self.headers = {name.lower(): value for name, value in headers}

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def problem(self) -> Any:
        assert self.headers["content-type"] == "application/problem+json", (self.status, self.body[:500])
        body = self.json
        assert body["status"] == self.status and body["type"].startswith("urn:orderproc:") and body["title"], body
        assert set(body) <= {"type", "title", "status", "detail", "errors"}, body
        return body

    @property
    def pointers(self) -> list[str]:
        assert self.status == 422, (self.status, self.body[:500])
        return [fault["pointer"] for fault in self.problem["errors"]]


class Client:
    """Calls an app; `seen` collects (method, path, status) of every call, for the test of openapi.json."""

    seen: set[tuple[str, str, int]] = set()

    def __init__(self, app: Callable[..., Any], key: str | None = "shop-key") -> None:
        self.app, self.key = app, key

    def __call__(self, method: str, path: str, body: Any = None, /, **headers: str | None) -> Response:
        """Header names as keywords: content_type="text/plain"; None leaves a default one out."""
        target, _, query = path.partition("?")
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        given: dict[str, str | None] = {"authorization": f"Bearer {self.key}" if self.key else None}
        given |= {"content_type": "application/json"} if body is not None else {}
        environ: dict[str, Any] = {
            "REQUEST_METHOD": method, "SCRIPT_NAME": "", "PATH_INFO": unquote_to_bytes(target).decode("latin-1"),
            "QUERY_STRING": query, "CONTENT_LENGTH": str(len(raw)), "SERVER_NAME": "localhost", "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1", "wsgi.version": (1, 0), "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(raw), "wsgi.errors": io.StringIO(), "wsgi.multithread": True,
            "wsgi.multiprocess": False, "wsgi.run_once": False,
        }  # fmt: skip
        for name, value in (given | headers).items():
            if value is not None:
                environ["CONTENT_TYPE" if name == "content_type" else f"HTTP_{name.upper()}"] = value
        started: list[Any] = []
        errors = environ["wsgi.errors"]
        chunks = self.app(environ, lambda *args: started.append(args))
        response = Response(started[-1][0], started[-1][1], b"".join(chunks))
        self.seen.add((method, target, response.status))
        assert errors.getvalue() == "", "a traceback belongs into the log"
        return response

    def create(self, body: Any = None, /, **headers: str) -> Any:
        """A stored order."""
        response = self("POST", "/orders", ORDER if body is None else body, **headers)
        assert response.status == 201, (response.status, response.body)
        return response.json


class Shop:
    """The app with its store (in mongomock, or in the database given) and bus, and a client for every role."""

    def __init__(self, database: Any = None) -> None:
        self.database = mongomock.MongoClient()["orderproc"] if database is None else database
        self.store, self.bus = Store(self.database), MemoryBus()
        self.orders, self.stock = self.store.orders, self.store.stock
        self.outbox = WatchedOutbox(self.store, self.bus)
        self.settings = settings.load({"API_KEYS": KEYS})
        self.app = make_app(self.settings, self.store, self.outbox, self.bus)
        self.client, self.rival = Client(self.app), Client(self.app, "rival-key")
        self.reader, self.admin = Client(self.app, "read-key"), Client(self.app, "admin-key")
        self.nobody = Client(self.app, None)

    def break_store(self, error: Exception) -> list[Any]:
        """Have the store raise whenever an order is to be written, or read by its id; gives the list of such calls."""
        calls: list[Any] = []

        def broken(*args: Any, **more: Any) -> None:
            calls.append((args, more))
            raise error

        self.orders._bulk.do = broken  # type: ignore[method-assign]
        return calls


class WatchedOutbox(Outbox):
    """An outbox that remembers which orders it was handed, and which of their events were named."""

    def __init__(self, store: Store, bus: MemoryBus) -> None:
        super().__init__(store, bus, subscribed=())
        self.documents: list[OrderDocument] = []
        self.named: list[list[str] | None] = []

    def publish_pending(self, order: OrderDocument, only: Sequence[Event] | None = None) -> None:
        self.documents.append(order)
        self.named.append(None if only is None else [event.type for event in only])
        super().publish_pending(order, only)
