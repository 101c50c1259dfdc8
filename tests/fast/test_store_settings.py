"""The connection: what the program rests on whatever the URL says, which URLs never work, indexes, and readiness."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import mongomock
import pymongo
import pytest
from pymongo import IndexModel
from pymongo.errors import AutoReconnect, OperationFailure
from pymongo.read_preferences import ReadPreference

from core.base.settings import SettingInvalid, load
from core.running.wiring import connect_all
from core.store import connection
from core.store import store as store_module
from core.store.connection import DocumentExists, StoreUnavailable, connect, make_indexes, time_left, within
from core.store.orders import Orders
from core.store.store import Store
from tests.support.samples import an_order, api_event, stored_order
from tests.support.wire_store import WireStore, always, error, on, refuse
from tools.chaos.system import wait_for

ODD = (
    "readPreference=secondaryPreferred&readConcernLevel=linearizable&w=1&journal=false&wtimeoutMS=1&tz_aware=true"
    "&uuidRepresentation=standard&unicode_decode_error_handler=ignore&retryWrites=true&appName=theirs&maxPoolSize=3"
    "&timeoutMS=1&serverSelectionTimeoutMS=1&connectTimeoutMS=1"
)


@pytest.fixture(autouse=True)
def clients(monkeypatch):
    """The clients that were made; closed in the end, also those of a start that was refused."""
    made, make = [], pymongo.MongoClient
    monkeypatch.setattr(pymongo, "MongoClient", lambda *args, **named: (made.append(make(*args, **named)), made[-1])[1])
    yield made
    for client in made:
        client.close()


@pytest.fixture
def server():
    with WireStore() as server:
        yield server


# --- the URL


def test_what_the_program_rests_on_is_in_no_urls_hands(server):
    database = connect(f"{server.url}&{ODD}", connections=7)
    for part in (database, database["orders"], database["stock"], database["leases"]):
        assert part.read_preference == ReadPreference.PRIMARY and part.read_concern.level == "local"
        assert part.write_concern.document == {"w": "majority", "j": True}
        assert not part.codec_options.tz_aware and part.codec_options.unicode_decode_error_handler == "strict"
    options = database.client.options
    assert (options.retry_writes, options.pool_options.appname, options.pool_options.max_pool_size) == (
        False, "orderproc", 7
    )  # fmt: skip
    assert (options.timeout, options.server_selection_timeout, options.pool_options.connect_timeout) == (10, 2, 2)


def test_every_web_thread_has_a_connection(server, clients):
    connect_all(load({"WEB_THREADS": "123", "AMQP_URL": "embedded"}), server.url)
    assert clients[-1].options.pool_options.max_pool_size > 123


def test_what_is_sent_asks_for_it_whatever_the_url(server):
    store = Store(connect(f"{server.url}&{ODD}"))
    order = stored_order(store.orders)
    assert store.orders.page({}, None, 5) == [order] and order["createdAt"].tzinfo is None
    sent = {name: command for name, command in server.commands}
    assert sent["insert"]["writeConcern"] == {"w": "majority", "j": True} and "txnNumber" not in sent["insert"]
    assert sent["find"].get("$readPreference", {"mode": "primary"})["mode"] == "primary"
    assert sent["find"]["readConcern"] == {"level": "local"}


@pytest.mark.parametrize("command", ["insert", "find"])
def test_a_server_gives_up_in_time_as_well(server, command):
    """Or it waits for a majority for ever, and keeps the connection."""
    store = Store(connect(server.url))
    stored_order(store.orders)
    [sent, *_] = [document for name, document in server.commands if name == command]
    assert 0 < sent["maxTimeMS"] <= 2500


def test_the_database_is_the_urls_or_orderproc(server):
    assert connect(server.url.replace("/orderproc?", "/shop?")).name == "shop"
    assert connect(server.url.replace("/orderproc?", "/?")).name == "orderproc"


def test_a_store_that_is_away_does_not_stop_the_start(monkeypatch):
    monkeypatch.setitem(connection.OPTIONS, "serverSelectionTimeoutMS", 50)
    assert connect("mongodb://user:s3cret@127.0.0.1:9/shop").name == "shop"


def test_a_store_that_refuses_does_not_stop_the_start(server):
    server.fault = always(lambda name, _: name == "ping", refuse(13))
    assert connect(server.url).name == "orderproc"


@pytest.mark.parametrize(
    "url",
    [
        "mongodb://user:s3c@ret@host/shop",
        "mongodb://user:s3cret%zz@host/shop",
        "mongodb://user:s3c/ret@host/shop",
        "mongodb://user:s3c:ret@host/shop",
        "mongodb://us/er:s3cret@host/shop",
        "mongodb://us/er:s3cret@host",
        "mongodb://us?er:s3cret@host/shop",
        "mongodb://user:s3cret@host:port/shop",
        "mongodb://user:s3cret@host:99999/shop",
        "mongodb://user:s3cret@/shop",
        "mongodb://user:s3cret@host/shop?readPreference=s3cret",
        "mongodb://user:s3cret@host/shop?retryWriets=true",
        "mongodb://user:s3cret@host/shop?w=-1",
        "mongodb://user:s3cret@host/shop?tls=perhaps",
        "mongodb://user:s3cret@host/shop?tls=true&tlsCAFile=/no/such/file",
        "mongodb://user:s3cret@host/sh op.x?authMechanism=ROT13",
        "mongodb+srv://user:s3cret@host:27017/shop",
        "mongodb+srv://user:s3cret@localhost/shop",
        "mongodb:/host",
        "",
    ],
)
def test_a_url_that_never_works_is_refused_without_secrets(url):
    with pytest.raises(SettingInvalid, match=r"^MONGODB_URL: ") as refused:
        connect(url)
    text = str(refused.value)
    assert not any(secret in text for secret in ("s3c", "ret@", "user:s")) and "\n" not in text
    assert refused.value.__cause__ is None and refused.value.__suppress_context__


def test_a_name_that_no_srv_record_has_is_refused(monkeypatch):
    def fail(*_, **__):
        raise dns.resolver.NXDOMAIN

    import dns.resolver

    monkeypatch.setattr(dns.resolver, "resolve", fail)
    with pytest.raises(SettingInvalid, match="MONGODB_URL: .*name"):
        connect("mongodb+srv://user:s3cret@cluster.example.com/shop")


@pytest.mark.parametrize("code", [18, 8000])
def test_a_wrong_password_is_refused_at_the_start(server, code):
    server.fault = always(lambda name, _: name in ("saslStart", "ping"), refuse(code))
    with pytest.raises(SettingInvalid, match="MONGODB_URL: the store refuses this user or password") as refused:
        connect(server.url.replace("://", "://user:s3cret@"))
    assert "s3cret" not in str(refused.value)


def test_a_server_too_old_is_refused_at_the_start():
    with WireStore(wire_version=8) as server, pytest.raises(SettingInvalid, match="MONGODB_URL: .*wire version"):
        connect(server.url)


def test_memory_is_a_store_of_its_own_each_time():
    one, other = connect("memory"), connect("memory")
    one["orders"].insert_one({"_id": "a"})
    assert isinstance(one.client, mongomock.MongoClient) and other["orders"].find_one() is None


# --- deadlines


def test_a_deadline_inside_another_is_never_later():
    assert time_left(10) == 10
    with within(5):
        with within(1):
            assert 0.9 < time_left(10) <= 1 and time_left(0.5) == 0.5
        with within(60):
            assert 4 < time_left(10) <= 5
        with pytest.raises(KeyError), within(0):
            assert time_left(10) == 0
            raise KeyError
        assert 4 < time_left(10) <= 5
    assert time_left(10) == 10


def test_a_deadline_is_that_of_one_thread():
    with within(0.1), ThreadPoolExecutor(1) as pool:
        assert pool.submit(time_left, 10).result(5) == 10


# --- indexes


class Collection:
    """What the making of indexes sees of one. `plan` says how the next tries end (None: well); `hold` holds them up."""

    name = "fake"

    def __init__(self, *plan: Exception | None, there: dict | None = None) -> None:
        self.plan, self.made, self.there = list(plan), list[str](), there or {}
        self.hold = {}

    def create_indexes(self, indexes) -> None:
        [index] = indexes
        name = index.document["name"]
        if name in self.hold:
            assert self.hold[name].wait(10)
        if error := self.plan.pop(0) if self.plan else None:
            raise error
        self.made.append(name)

    def index_information(self) -> dict:
        return self.there


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(connection, "INDEX_PAUSE", 0.01)
    monkeypatch.setattr(connection, "INDEX_HEAD_START", 0.05)


ONE, TWO = IndexModel("a", unique=True), IndexModel("b")


def test_indexes_are_made_in_order_beside_the_service(impatient):
    collection = Collection()
    collection.hold = {"a_1": threading.Event(), "b_1": threading.Event()}
    started = time.monotonic()
    first = make_indexes(collection, ONE, TWO)
    assert not first.is_set() and time.monotonic() - started < 5
    collection.hold["a_1"].set()
    assert first.wait(5) and collection.made == ["a_1"], "the second is still being made"
    collection.hold["b_1"].set()
    wait_for(lambda: collection.made == ["a_1", "b_1"], 5)


@pytest.mark.parametrize(
    "error", [OperationFailure("conflict", 85), OperationFailure("another builds", 40333), AutoReconnect("away")],
    ids=["85", "40333", "away"],
)  # fmt: skip
def test_an_index_that_fails_is_logged_and_tried_again(error, impatient, caplog):
    collection = Collection(error, None, error)
    assert make_indexes(collection, ONE, TWO).wait(5)
    wait_for(lambda: collection.made == ["b_1", "a_1"], 5, "one that fails does not hold up the others")
    assert [(record.index, record.levelname) for record in caplog.records] == [("a_1", "WARNING")] * 2


def test_an_index_of_another_name_counts(impatient, caplog):
    by_hand = {"by_hand": {"key": [("a", 1)], "unique": True}}
    collection = Collection(OperationFailure("options", 85), OperationFailure("no right", 13), there=by_hand)
    assert make_indexes(collection, ONE).wait(5) and collection.made == [] and caplog.records == []


@pytest.mark.parametrize("index", [{"key": [("a", 1)]}, {"key": [("a", -1)], "unique": True}, {"key": [("b", 1)]}])
def test_an_index_that_promises_less_does_not_count(index, impatient):
    collection = Collection(OperationFailure("options", 85), there={"by_hand": index})
    assert make_indexes(collection, ONE).wait(5) and collection.made == ["a_1"]


def test_without_the_unique_index_only_creating_waits():
    database, there = connect("memory"), threading.Event()
    store = Store(database)
    order = stored_order(store.orders)
    orders = Orders(store._orders, there)
    with pytest.raises(StoreUnavailable, match="requestKey"), within(0.1):
        stored_order(orders, _id="another")
    assert orders.get(order["_id"]) == order and orders.page({}, None, 5) == [order]
    assert orders.cancel(api_event("order_cancelled", order["_id"]))[1]
    threading.Timer(0.1, there.set).start()
    assert stored_order(orders)["status"] == "pending"


def test_a_store_that_refuses_indexes_serves_all_but_creates(server, monkeypatch, impatient):
    server.fault = always(lambda name, _: name == "createIndexes", refuse(13))
    store = Store(connect(server.url))
    with pytest.raises(StoreUnavailable), within(0.1):
        stored_order(store.orders)
    assert store.stock.put("A1", 5, "p")[0] == {"sku": "A1", "available": 5} and store.ping()
    server.fault = None
    wait_for(store.orders._keys_are_unique.is_set, 5)
    order = an_order()
    assert store.orders.create(order, api_event("order_created", order["_id"]), "k", "f")["_id"] == order["_id"]


def test_the_indexes_are_those_that_the_queries_need():
    database = connect("memory")
    Store(database)
    wait_for(lambda: len(database["orders"].index_information()) == 9, 5)
    indexes = database["orders"].index_information()
    assert {name for name, index in indexes.items() if index.get("sparse")} == {"due_sparse", "outboxSince_1"}
    assert {name for name, index in indexes.items() if index.get("unique") and name != "_id_"} == {"requestKey_1"}
    pages = {tuple(field for field, _ in index["key"]) for index in indexes.values()}
    filters = [("owner",), ("status",), ("customerId",), ("owner", "status"), ("owner", "customerId")]
    assert {(*fields, "_id") for fields in filters} <= pages
    wait_for(lambda: "moves.mark_1" in database["stock"].index_information(), 5)


# --- readiness


@pytest.fixture
def store(monkeypatch):
    """A store that counts how often it is tried, in `tried`."""
    store, tried = Store(connect("memory")), []
    store.tried = tried
    once = store._try
    monkeypatch.setattr(store, "_try", lambda: (tried.append(1), once())[1])
    return store


def test_a_crowd_of_pings_asks_once(store):
    with ThreadPoolExecutor(50) as crowd:
        assert [ping.result(5) for ping in [crowd.submit(store.ping) for _ in range(50)]] == [True] * 50
    assert len(store.tried) == 1


def test_a_ping_asks_again_after_a_second(store, monkeypatch):
    assert store.ping()
    monkeypatch.setattr(store, "_try", lambda: False)
    assert store.ping(), "the answer of a moment ago"
    monkeypatch.setattr("core.store.store.PING_EVERY", 0)
    assert not store.ping()


@pytest.mark.parametrize(("name", "collection"), [("update", "orders"), ("update", "leases"), ("find", "orders")])
def test_a_store_that_only_reads_or_only_writes_is_down(server, name, collection, monkeypatch):
    monkeypatch.setattr(store_module, "PING_WITHIN", 0.3)
    monkeypatch.setattr(store_module, "PING_EVERY", 0)
    store = Store(connect(server.url))
    assert store.ping()
    server.fault = always(on(collection, name), refuse(14031))
    assert not store.ping()
    server.fault = None
    wait_for(store.ping, 5, "up again, without help")


def test_two_processes_that_ping_first_at_once_are_no_failure(monkeypatch):
    """Of two upserts of one document a server may refuse the second as a duplicate."""

    def both(writes, read=()):
        raise DocumentExists("E11000")

    store = Store(connect("memory"))
    monkeypatch.setattr(store._leases, "do", both)
    assert store.ping() in (True, False)


def test_a_ping_is_answered_though_the_store_hangs(server, monkeypatch):
    monkeypatch.setattr(store_module, "PING_WITHIN", 0.3)
    store, go_on = Store(connect(server.url)), threading.Event()
    server.fault = lambda *_: go_on.wait(10) and error(91)
    started = time.monotonic()
    assert not store.ping() and time.monotonic() - started < 1
    go_on.set()
