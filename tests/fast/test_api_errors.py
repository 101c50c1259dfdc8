"""What the API refuses, how it says so, and in which order it looks. Every row of the design's table of statuses."""

import copy
import itertools
import json
import logging
import string
import uuid

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.store.connection import StoreBusy, StoreUnavailable
from tests.support.api import ORDER, Shop
from tests.support.samples import ADDRESS

NOWHERE = f"/orders/{uuid.uuid4()}"


@pytest.fixture
def shop():
    return Shop()


@pytest.fixture(scope="module")
def lasting_shop():
    return Shop()


def order(**changes):
    return {**copy.deepcopy(ORDER), **changes}


def line(**changes):
    return order(items=[{"sku": "A1", "quantity": 1, "price": 1, **changes}])


# --- 404, 405: the route


@pytest.mark.parametrize(
    "path",
    ["/nope", "/orders/", "/orders/x/y", "/stock/", "//orders", "/Orders", "/orders%00", "/orders%0A", "/%FF",
    "/orders/%C3",
     "/docs/", "/docs/nope.js", "/healthz/x", "/orders%2F"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_path_is_404_whoever_asks(shop, method, path):
    for client in (shop.nobody, shop.admin):
        answer = client(method, path)
        assert answer.status == 404 and answer.problem["type"] == "urn:orderproc:not-found"


@pytest.mark.parametrize("ending", ["%00", "%0A", "%FF", "%C3%28", "%1F", "%7F"])
def test_a_path_that_only_resembles_a_known_one_is_404(shop, ending):
    made = shop.client.create()
    for path in (f"/orders/{made['id']}{ending}", f"/orders/{made['id']}/cancel{ending}", f"/orders{ending}"):
        assert shop.client("POST" if "cancel" in path else "GET", path).status == 404
    assert shop.orders.get(made["id"])["status"] == "pending"


@pytest.mark.parametrize(
    "method, path, allowed",
    [
        ("DELETE", "/orders", "GET,POST"), ("PUT", "/orders", "GET,POST"), ("OPTIONS", "/orders", "GET,POST"),
        ("PATCH", "/orders/x", "GET"), ("GET", "/orders/x/cancel", "POST"), ("HEAD", "/orders/x/cancel", "POST"),
        ("POST", "/stock", "GET"), ("DELETE", "/stock/A1", "GET,PUT"), ("POST", "/healthz", "GET"), ("PUT", "/", "GET"),
        ("BREW", "/orders", "GET,POST"), ("get", "/nope", None),
    ],
)  # fmt: skip
def test_another_method_is_405_with_allow(shop, method, path, allowed):
    for client in (shop.nobody, shop.admin):
        answer = client(method, path)
        assert (answer.status, answer.headers.get("allow")) == (405 if allowed else 404, allowed)
        assert answer.headers["content-type"] == "application/problem+json"


# --- 401, 403: the key


@pytest.mark.parametrize(
    "header",
    [None, "", "shop-key", "Bearer", "Bearer ", "Bearer wrong", "Bearer shop-key x", "Basic c2hvcDprZXk=",
    "Bearer shop-ke",
     "Bearer shop-key, Bearer shop-key", "Bearer SHOP-KEY", "Bearer \xe9", "Bearer shop", "bearer\tshop-key"],
)  # fmt: skip
def test_without_a_known_key_it_is_401(shop, header):
    for method, path in [
        ("POST", "/orders"),
        ("GET", "/orders"),
        ("GET", "/stock/A1"),
        ("PUT", "/stock/A1"),
        ("GET", NOWHERE),
    ]:
        answer = shop.nobody(method, path, authorization=header)
        assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert answer.problem["type"] == "urn:orderproc:unauthorized"
        assert "shop-key" not in answer.body.decode()


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
def test_the_scheme_is_read_in_any_case(shop, scheme):
    assert shop.nobody("GET", "/orders", authorization=f"{scheme} shop-key").status == 200


@pytest.mark.parametrize(
    "who, method, path",
    [
        ("reader", "POST", "/orders"), ("reader", "POST", f"{NOWHERE}/cancel"), ("reader", "PUT", "/stock/A1"),
        ("client", "PUT", "/stock/A1"),
    ],
)  # fmt: skip
def test_a_role_that_may_not_is_403(shop, who, method, path):
    answer = getattr(shop, who)(method, path, {"available": 1})
    assert answer.status == 403 and answer.problem["type"] == "urn:orderproc:forbidden"
    assert shop.stock.get("A1") is None and not shop.outbox.documents


# --- 415, 413


@pytest.mark.parametrize(
    "headers",
    [
        {"content_type": None}, {"content_type": ""}, {"content_type": "text/plain"},
        {"content_type": "application/xml"},
        {"content_type": "application/problem+json"}, {"content_type": "application/jsonx"},
        {"content_type": "application/json; charset=latin-1"}, {"content_type": "application/json; charset=utf-16"},
        {"content_type": "application/json, application/json"}, {"content_type": "application/x-www-form-urlencoded"},
        {"content_encoding": "gzip"}, {"content_encoding": "identity, gzip"},
    ],
)  # fmt: skip
def test_another_media_type_is_415(shop, headers):
    for client, method, path, body in [(shop.client, "POST", "/orders", ORDER), (shop.admin, "PUT", "/stock/A1", {})]:
        answer = client(method, path, body, **headers)
        assert answer.status == 415 and answer.problem["type"] == "urn:orderproc:unsupported-media-type"


@pytest.mark.parametrize("length", [64 * 1024 + 1, 200_000, 1_000_000])
def test_a_body_over_64_kib_is_413(shop, length):
    body = json.dumps(ORDER).encode()
    answer = shop.client("POST", "/orders", body + b" " * (length - len(body)))
    assert answer.status == 413 and answer.problem["type"] == "urn:orderproc:too-large"


# --- 400: the body


DEEP = '{"customerId": "c", "items": %s}'


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"{", b"{]", b"nul", b"{} {}", b"'a'", b"{'a': 1}",
        b"[1,]", b'{"a": 01}', b'{"a": +1}',
        b'{"a": .5}',
        b'{"a": 0x10}', b'"\xff"', b'"\xc3"', b'"\xed\xa0\x80"', b"\xef\xbb\xbf{}",
        "{}".encode("utf-16"), "{}".encode("utf-32-le"),
        b'{"a": 1, "a": 1}', b'{"a": {"b": 1, "b": 2}}', b'{"a": 1, "\\u0061": 2}', b'{"a": NaN}', b'{"a": Infinity}',
        b'{"a": -Infinity}', b'{"a": 1e99999999999999999999}', b'{"a": 1e-99999999999999999999}', b'"\x00"', b'"\n"',
        b"\x00",
        b"[" * 33 + b"]" * 33, b'{"a":' * 33 + b"1" + b"}" * 33, b"[" * 60000, b"[" * 30000 + b"]" * 30000,
        b'{"a":' * 13000, b'{"a":' * 10000 + b"1" + b"}" * 10000, b"[" + b'"' * 65000, b"\\" * 60000,
    ],
)  # fmt: skip
def test_what_is_not_strict_json_is_400(shop, body):
    for client, method, path in [(shop.client, "POST", "/orders"), (shop.admin, "PUT", "/stock/A1")]:
        answer = client(method, path, body)
        assert answer.status == 400 and answer.problem["type"] == "urn:orderproc:malformed"
        assert len(answer.body) < 600, "it does not echo what it was sent"


def test_32_levels_are_read(shop):
    assert shop.client("POST", "/orders", b"[" * 32 + b"]" * 32).status == 422


# --- 400: the query


@pytest.mark.parametrize(
    "query",
    ["x=1", "limit", "limit=", "limit=0", "limit=101", "limit=-1", "limit=01", "limit=1.0", "limit=%D9%A1",
    "limit=1&limit=1",
     "limit=1&limit=2", "limit=1%0A", "Limit=1", "cursor=", "cursor=x%0A", "cursor=%FF", "cursor=" + "x" * 65,
     "&", "limit=1&", "=", "=1",
     "limit=%F",
     "limit=\xe9", "limit=10;cursor=1"],
)  # fmt: skip
def test_a_query_that_is_not_known_is_400(shop, query):
    for path in ("/orders", "/stock"):
        answer = shop.client("GET", f"{path}?{query}")
        assert answer.status == 400 and answer.problem["type"] == "urn:orderproc:malformed"


@pytest.mark.parametrize(
    "query",
    ["status=", "status=done", "status=PENDING", "status=pending&status=pending", "status=pending|failed",
    "customerId=", "cursor=x",
     "customerId=" + "x" * 65, "customerId=%00", "customerId=%FF", "customerId=a&customerId=b", "owner=rival",
     "offset=3"],
)  # fmt: skip
def test_a_filter_that_is_not_known_is_400(shop, query):
    assert shop.client("GET", f"/orders?{query}").problem["status"] == 400
    assert shop.client("GET", "/stock?status=pending").problem["status"] == 400


@pytest.mark.parametrize(
    "method, path", [("GET", "/orders/{id}"), ("POST", "/orders/{id}/cancel"), ("GET", "/stock/A1")]
)
def test_calls_without_parameters_take_none(shop, method, path):
    path = path.format(id=shop.client.create()["id"])
    assert shop.client(method, f"{path}?verbose=1").problem["status"] == 400
    assert shop.client("POST", "/orders?dry=1", ORDER).problem["status"] == 400
    assert shop.admin("PUT", "/stock/A1?x=1", {"available": 1}).problem["status"] == 400


def test_a_cursor_shows_nobody_more_than_the_list_does(shop):
    mine, theirs = ([client.create()["id"] for _ in range(2)] for client in (shop.client, shop.rival))
    shop.stock.fill({"A1": 1, "B2": 1})
    cursor = shop.client("GET", "/orders?limit=1").json["next"]
    assert shop.client("GET", f"/orders?limit=100&cursor={cursor}").status == 200, "the page may have another size"
    of_stock = shop.client("GET", "/stock?limit=1").json["next"]
    assert shop.client("GET", f"/orders?cursor={of_stock}").problem["status"] == 400

    def ids(client, cursor):
        return {each["id"] for each in client("GET", f"/orders?cursor={cursor}").json["orders"]}

    for cursor in (*mine, *theirs, "f" * 8 + "-ffff-ffff-ffff-" + "f" * 12):
        assert ids(shop.client, cursor) == {id for id in mine if id < cursor}
        assert ids(shop.rival, cursor) == {id for id in theirs if id < cursor}
        assert ids(shop.admin, cursor) == {id for id in mine + theirs if id < cursor}


def test_a_malformed_cursor_is_400(shop):
    shop.client.create()
    shop.client.create()
    cursor = shop.client("GET", "/orders?limit=1").json["next"]
    assert set(cursor) <= set(string.ascii_letters + string.digits + "-._~"), "it goes into a URL as it is"
    for n, old in enumerate(cursor):
        changed = cursor[:n] + ("0" if old == "-" else "g") + cursor[n + 1 :]
        assert shop.client("GET", f"/orders?cursor={changed}").status == 400
    for changed in (cursor[:-1], cursor + "0", cursor.upper(), cursor[:16]):
        assert shop.client("GET", f"/orders?cursor={changed}").status == 400


@pytest.mark.parametrize(
    "key", ["", '""', '"', '"abc', 'abc"'[::-1], "k" * 256, '"' + "k" * 256 + '"', "a\x00b", "a\tb",
    "\xe9", '"a"b"', r'"a\b"',
            '"abc"; x=1', '"a", "b"', '"a\x7f"']
)  # fmt: skip
def test_a_malformed_idempotency_key_is_400(shop, key):
    for client, method, path, body in [
        (shop.client, "POST", "/orders", ORDER),
        (shop.admin, "PUT", "/stock/A1", {"available": 1}),
    ]:
        answer = client(method, path, body, idempotency_key=key)
        assert answer.status == 400 and answer.problem["type"] == "urn:orderproc:malformed"
    assert not shop.outbox.documents and shop.stock.get("A1") is None


# --- 404: the order, the SKU


@pytest.mark.parametrize("form", ["{upper}", "{bare}", "{{{id}}}", "{short}", " {id}", "urn:uuid:{id}", "{id}.", "$ne"])
def test_an_order_id_in_another_spelling_is_404(shop, form):
    made = shop.client.create()["id"]
    other = form.format(id=made, upper=made.upper(), bare=made.replace("-", ""), short=made[:-1])
    path = f"/orders/{other}"
    if other != made:
        assert [shop.client("GET", path).status, shop.client("POST", f"{path}/cancel").status] == [404, 404]


@pytest.mark.parametrize("sku", ["A1", "-a", ".", "a b", "%C3%A4", "x" * 65, "a$b", "%D9%A1"])
def test_a_missing_or_malformed_sku_is_404_to_a_get(shop, sku):
    assert shop.client("GET", f"/stock/{sku}").problem["type"] == "urn:orderproc:not-found"


@pytest.mark.parametrize("sku", ["-a", ".", "a b", "%C3%A4", "x" * 65, "a$b", "%D9%A1"])
def test_a_sku_that_is_none_is_422_to_a_put(shop, sku):
    assert shop.admin("PUT", f"/stock/{sku}", {"available": 1}).pointers == ["/sku"]
    assert sorted(shop.admin("PUT", f"/stock/{sku}", {"available": -1}).pointers) == ["/available", "/sku"]
    assert shop.stock.page(None, 10) == []


# --- 422: the body breaks a rule


@pytest.mark.parametrize(
    "body, pointers",
    [
        ([], [""]), ("text", [""]), (None, [""]), (5, [""]), ({}, ["/customerId", "/items"]),
        (order(extra=1), ["/extra"]), (order(status="processed", id="x"), ["/id", "/status"]),
        (order(**{"a/b~c": 1}), ["/a~1b~0c"]),
        (order(customerId=""), ["/customerId"]), (order(customerId="x" * 65), ["/customerId"]),
        (order(customerId=" \t"), ["/customerId"]),
        (order(customerId="a\nb"), ["/customerId"]), (order(customerId="a\x00"), ["/customerId"]),
        (order(customerId=7), ["/customerId"]),
        (order(customerId="\ud800"), ["/customerId"]), (order(customerId="\udc00x"), ["/customerId"]),
        (order(customerId="a\n"), ["/customerId"]),
        (order(items=[]), ["/items"]), (order(items={}), ["/items"]), (order(items=None), ["/items"]),
        (order(items=[1]), ["/items/0"]),
        (order(items=ORDER["items"] * 101), ["/items"]), (order(items=[{}]), ["/items/0/price", "/items/0/quantity",
        "/items/0/sku"]),
        (line(extra=1), ["/items/0/extra"]), (line(sku=""), ["/items/0/sku"]), (line(sku="-a"), ["/items/0/sku"]),
        (line(sku="a" * 65), ["/items/0/sku"]), (line(sku="ä"), ["/items/0/sku"]), (line(sku="a\n"), ["/items/0/sku"]),
        (line(quantity=0), ["/items/0/quantity"]), (line(quantity=1000001), ["/items/0/quantity"]),
        (line(quantity=1.5), ["/items/0/quantity"]),
        (line(quantity="1"), ["/items/0/quantity"]), (line(quantity=True), ["/items/0/quantity"]),
        (line(quantity=None), ["/items/0/quantity"]),
        (line(price=-0.01), ["/items/0/price"]), (line(price=1000000000.01), ["/items/0/price"]),
        (line(price="1"), ["/items/0/price"]),
        (line(price=True), ["/items/0/price"]), (line(price=0.001), ["/items/0/price"]),
        (line(price=19.999), ["/items/0/price"]),
        (order(currency="usd"), ["/currency"]), (order(currency="XXY"), ["/currency"]),
        (order(currency=""), ["/currency"]),
        (order(currency=None), ["/currency"]), (order(currency=["USD"]), ["/currency"]),
        (order(currency={"USD": 2}), ["/currency"]),
        (order(currency="JPY"), ["/items/0/price"]), (order(currency="USD\n"), ["/currency"]),
        (order(email="a"), ["/email"]), (order(email="a@b"), ["/email"]), (order(email="a@b.c, d@e.f"), ["/email"]),
        (order(email="a@b.c\nBcc: x@y.z"), ["/email"]), (order(email="<a@b.cd>"), ["/email"]),
        (order(email="a@" + "b" * 250 + ".com"), ["/email"]),
        (order(shippingAddress={}), [f"/shippingAddress/{name}" for name in ("city", "country", "line1", "name",
        "postalCode")]),
        (order(shippingAddress=ADDRESS | {"country": "de"}), ["/shippingAddress/country"]),
        (order(shippingAddress=ADDRESS | {"name": "x" * 201}), ["/shippingAddress/name"]),
        (order(shippingAddress=ADDRESS | {"postalCode": "x" * 21}), ["/shippingAddress/postalCode"]),
        (order(shippingAddress=ADDRESS | {"planet": "Mars"}), ["/shippingAddress/planet"]),
        (order(shippingAddress=None), ["/shippingAddress"]),
    ],
)  # fmt: skip
def test_a_body_breaking_a_rule_is_422_naming_the_field(lasting_shop, body, pointers):
    answer = lasting_shop.client("POST", "/orders", json.dumps(body).encode())
    assert sorted(answer.pointers) == sorted(pointers), answer.body
    assert all(fault["message"] for fault in answer.json["errors"])
    assert lasting_shop.database["orders"].count_documents({}) == 0


@pytest.mark.parametrize(
    "number", ["1e999999999", "1e308", "1E+400", "9" * 30000, "0." + "0" * 30000 + "1", "1e-999999999"]
)
def test_enormous_numbers_cost_nothing(lasting_shop, number):
    body = '{"customerId": "c", "items": [{"sku": "A1", "quantity": %s, "price": %s}]}'
    answer = lasting_shop.client("POST", "/orders", (body % (number, number)).encode())
    assert sorted(answer.pointers) == ["/items/0/price", "/items/0/quantity"]
    assert len(answer.body) < 600


def test_all_faults_of_schema_and_money_are_reported_at_once(shop):
    lines = [
        {"sku": "A1", "quantity": 0, "price": 1},
        {"sku": "A1", "quantity": 1, "price": 0.001},
        {"sku": "?", "quantity": 1, "price": "x"},
    ]
    answer = shop.client("POST", "/orders", order(customerId="", email="x", items=lines))
    assert sorted(answer.pointers) == [
        "/customerId",
        "/email",
        "/items/0/quantity",
        "/items/1/price",
        "/items/2/price",
        "/items/2/sku",
    ]


def test_an_unknown_currency_is_reported_with_the_rest(shop):
    answer = shop.client("POST", "/orders", order(currency="ABC", items=[{"sku": "A1", "quantity": 1, "price": -1}]))
    assert sorted(answer.pointers) == ["/currency", "/items/0/price"]


@pytest.mark.parametrize("fault", [{"price": 0.001}, {"quantity": 0}, {"quantity": 1e50}, {"price": "x", "sku": 1}])
def test_at_most_20_faults_are_reported(shop, fault):
    items = [{"sku": "A1", "quantity": 1, "price": 1} | fault for _ in range(100)]
    pointers = shop.client("POST", "/orders", order(items=items)).pointers
    assert len(pointers) == len(set(pointers)) == 20


def test_twenty_faults_are_all_reported(shop):
    items = [{"sku": "A1", "quantity": 1, "price": 0.001} for _ in range(19)]
    assert len(shop.client("POST", "/orders", order(customerId="", items=items)).pointers) == 20


def test_a_total_of_more_than_15_digits_is_422(shop):
    items = [{"sku": "A1", "quantity": 9999, "price": 1000000000}, {"sku": "A1", "quantity": 1, "price": 1000000000}]
    assert shop.client("POST", "/orders", order(items=items)).pointers == ["/items"]
    assert shop.client("POST", "/orders", order(items=items, currency="JPY")).status == 201, "it is 13 digits there"


@pytest.mark.parametrize(
    "body, pointers",
    [
        ({}, ["/available"]), ({"available": -1}, ["/available"]), ({"available": 1000000001}, ["/available"]),
        ({"available": 1.5}, ["/available"]), ({"available": "1"}, ["/available"]),
        ({"available": True}, ["/available"]),
        ({"available": 1, "sku": "A1"}, ["/sku"]), ([], [""]), (None, [""]),
    ],
)  # fmt: skip
def test_stock_that_breaks_a_rule_is_422(shop, body, pointers):
    assert shop.admin("PUT", "/stock/A1", json.dumps(body).encode()).pointers == pointers
    assert shop.stock.get("A1") is None


# --- 503, 500


CALLS = [
    ("POST", "/orders", ORDER, "orders.create"), ("GET", "/orders", None, "orders.page"),
    ("GET", NOWHERE, None, "orders.get"), ("POST", f"{NOWHERE}/cancel", None, "orders.get"),
    ("GET", "/stock", None, "stock.page"), ("GET", "/stock/A1", None, "stock.get"),
    ("PUT", "/stock/A1", {"available": 1}, "stock.put"),
]  # fmt: skip


def break_it(shop, monkeypatch, what, error):
    def broken(*args):
        raise error

    part, method = what.split(".")
    monkeypatch.setattr(getattr(shop, part), method, broken)


@pytest.mark.parametrize("method, path, body, what", CALLS)
@pytest.mark.parametrize("error", [StoreUnavailable("db-7.internal refused"), StoreBusy("db-7.internal is busy")])
def test_without_the_store_it_is_503_with_retry_after(shop, monkeypatch, method, path, body, what, error):
    break_it(shop, monkeypatch, what, error)
    answer = shop.admin(method, path, body)
    assert (answer.status, answer.headers["retry-after"]) == (503, "2")
    assert answer.problem["type"] == "urn:orderproc:unavailable" and b"db-7" not in answer.body
    assert not shop.outbox.documents


@pytest.mark.parametrize("method, path, body, what", CALLS)
def test_a_surprise_is_500_in_the_log_and_leaks_nothing(shop, monkeypatch, caplog, method, path, body, what):
    break_it(shop, monkeypatch, what, RuntimeError("password=hunter2"))
    answer = shop.admin(method, path, body)
    assert answer.status == 500 and answer.json == {
        "type": "urn:orderproc:internal-error", "title": "Internal error", "status": 500
    }  # fmt: skip
    assert answer.headers["content-type"] == "application/problem+json"
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "hunter2" in str(record.exc_info[1]) and record.exc_info[2] is not None


def test_a_surprise_outside_the_checks_is_500_too(shop, caplog):
    shop.break_store(RuntimeError("password=hunter2"))
    answer = shop.nobody("GET", "/readyz")
    assert (
        answer.status == 500
        and answer.problem["type"] == "urn:orderproc:internal-error"
        and b"hunter2" not in answer.body
    )
    assert any(record.exc_info for record in caplog.records)


# --- the order of the checks


def test_of_several_faults_the_first_in_order_is_reported(shop, monkeypatch):
    """Each step puts right what the step before named; what is left comes next."""
    path, long = "/stock/-", b"{" + b" " * 70000
    steps = [
        (404, shop.nobody, "PUT", "/stock/-/x", long, {"content_type": "text/plain"}),
        (405, shop.nobody, "DELETE", path, long, {"content_type": "text/plain"}),
        (401, shop.nobody, "PUT", f"{path}?x=1", long, {"content_type": "text/plain"}),
        (403, shop.client, "PUT", f"{path}?x=1", long, {"content_type": "text/plain"}),
        (415, shop.admin, "PUT", f"{path}?x=1", long, {"content_type": "text/plain"}),
        (413, shop.admin, "PUT", f"{path}?x=1", long, {}),
        (400, shop.admin, "PUT", f"{path}?x=1", b"{}", {}),
        (400, shop.admin, "PUT", path, b"{", {}),
        (422, shop.admin, "PUT", path, b"{}", {"if_match": '"x"'}),
        (503, shop.admin, "PUT", "/stock/A1", b'{"available": 1}', {}),
    ]
    break_it(shop, monkeypatch, "stock.put", StoreUnavailable())
    for status, client, method, target, body, headers in steps:
        assert client(method, target, body, **headers).status == status


def test_the_order_of_the_checks_on_a_new_order(shop, monkeypatch):
    faults = {  # a request with all of these at once; taken away one by one
        401: {"authorization": "Bearer wrong"}, 403: {"authorization": "Bearer read-key"},
        415: {"content_type": "text/plain"},
        413: b" " * 70000, 400: {"idempotency_key": ""}, 422: b"{}",
    }  # fmt: skip
    shop.client.create(idempotency_key="used")
    for count in range(len(faults)):
        left = dict(itertools.islice(faults.items(), count, None))
        headers = {"idempotency_key": "used"}
        for fault in reversed(list(left.values())):
            headers |= fault if isinstance(fault, dict) else {}
        body = next((fault for fault in left.values() if isinstance(fault, bytes)), b"")
        assert shop.client("POST", "/orders", body, **headers).status == next(iter(left))
    break_it(shop, monkeypatch, "orders.create", StoreUnavailable())
    assert shop.client("POST", "/orders", {}, idempotency_key="used").status == 422, "422 beats 503"


def test_the_order_of_the_checks_on_an_existing_order(shop, monkeypatch):
    path = f"/orders/{shop.rival.create()['id']}"
    shop.database["orders"].update_many({}, {"$set": {"status": "processed"}})
    assert shop.reader("POST", f"{path}/cancel?x=1").status == 403
    assert shop.client("POST", f"{path}/cancel?x=1").status == 400, "400 beats 404"
    assert shop.client("POST", f"{path}/cancel").status == 404, "404 beats 409"
    assert shop.rival("POST", f"{path}/cancel").status == 409
    break_it(shop, monkeypatch, "orders.get", StoreUnavailable())
    assert shop.client("GET", "/orders/nonsense").status == 404, "what cannot be an id is not looked up"
    assert shop.client("GET", f"{path}?x=1").status == 400, "400 beats 503"


# --- whatever is sent


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["USD", "A1", "\ud800", 1e300]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
FIELDS = ["customerId", "items", "currency", "email", "shippingAddress", "sku", "quantity", "price", "name", "country"]
NEARLY = st.recursive(
    JSON,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=6),
    max_leaves=20,
)
LENIENT = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def mutated(spoil):
    body = order(email="a@b.cd", currency="EUR", shippingAddress=dict(ADDRESS))
    targets = {"": body, "line": body["items"][0], "address": body["shippingAddress"]}
    for (part, name), value in spoil:
        targets[part][name] = value
    return body


PLACES = st.sampled_from(
    [("", name) for name in FIELDS[:5]]
    + [("line", name) for name in FIELDS[5:8]]
    + [("address", name) for name in FIELDS[8:]]
)


def refused_properly(answer):
    return answer.status == 201 or (answer.status in (400, 422) and answer.problem)


@LENIENT
@given(
    st.binary(max_size=300)
    | JSON.map(lambda value: json.dumps(value).encode())
    | NEARLY.map(lambda v: json.dumps(v).encode())
)
def test_no_body_makes_a_500(lasting_shop, body):
    assert refused_properly(lasting_shop.client("POST", "/orders", body))


@LENIENT
@given(st.lists(st.tuples(PLACES, JSON), min_size=1, max_size=3))
def test_no_spoilt_order_makes_a_500(lasting_shop, spoil):
    assert refused_properly(lasting_shop.client("POST", "/orders", json.dumps(mutated(spoil)).encode()))


@LENIENT
@given(
    st.text(max_size=40),
    st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=40),
    st.text(max_size=30),
)
def test_no_query_header_or_path_makes_a_500(lasting_shop, query, header, path):
    for client in (lasting_shop.client, lasting_shop.nobody):
        answer = client("GET", f"/orders?{query.encode().decode('latin-1') if query.isprintable() else 'x'}")
        assert answer.status == 200 or answer.problem["status"] in (400, 401)
        for name in (
            "authorization",
            "idempotency_key",
            "content_type",
            "if_none_match",
            "traceparent",
            "content_encoding",
        ):
            answer = client("POST", "/orders", b"{}", **{name: header})
            assert answer.problem["status"] in (400, 401, 415, 422), (name, header)
        answer = client("GET", "/stock/" + path.encode("utf-8", "surrogatepass").hex(":"))
        assert answer.problem["status"] in (401, 404)
