"""What the API does when all is well, in the order of the table in the design."""

import copy
import json
import logging
import re
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urljoin

import pytest
from prometheus_client import REGISTRY
from pymongo.errors import AutoReconnect

from core.base import settings
from core.base.logs import Lines
from core.http.app import ANSWER_WITHIN
from core.store import group_commit
from core.store.connection import StoreUnavailable, time_left
from orderproc import make_app
from tests.support.api import ORDER, Client, Shop
from tests.support.samples import ADDRESS, a_reason, event_of
from tools.chaos.system import wait_for

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def shop():
    return Shop()


def order(**changes):
    return {**copy.deepcopy(ORDER), **changes}


def priced(price, quantity=1, currency="USD"):
    return order(currency=currency, items=[{"sku": "A1", "quantity": quantity, "price": price}])


def lasting(order):
    """What of an order does not change by itself: its outbox empties."""
    return {name: value for name, value in order.items() if name != "outbox"}


# --- POST /orders


def test_an_order_is_stored_and_shown(shop):
    answer = shop.client("POST", "/orders", order(email="ann@example.com", shippingAddress=ADDRESS))
    made = answer.json
    assert answer.status == 201 and answer.headers["location"] == f"/orders/{made['id']}"
    assert uuid.UUID(made["id"]).version == 7
    assert made["status"] == "pending" and made["currency"] == "USD" and made["total"] == 39.98
    assert made["items"] == ORDER["items"] and made["email"] == "ann@example.com" and made["shippingAddress"] == ADDRESS
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", made["createdAt"])
    [event] = shop.admin("GET", f"/orders/{made['id']}/events").json["events"]
    line = {"at": made["createdAt"], "event": "order_created", "id": event["id"], "by": "api"}
    assert made["timeline"] == [line] and made["outbox"] == ["order_created"]
    assert "idempotent-replayed" not in answer.headers
    assert lasting(shop.client("GET", answer.headers["location"]).json) == lasting(made)


def test_nothing_of_the_store_shows(shop):
    made = shop.client.create(idempotency_key="k1")
    always = {"id", "status", "customerId", "currency", "items", "total", "createdAt", "updatedAt", "timeline"}
    assert set(made) == always | {"outbox"}


def test_an_orders_event_carries_the_trace_of_its_request(shop):
    made = shop.client.create(traceparent=TRACE)
    [document] = shop.outbox.documents
    [envelope] = document["events"]
    assert (envelope["type"], envelope["subject"]) == ("order_created", made["id"])
    assert envelope["source"] == "/orderproc/api"
    assert envelope["traceparent"] == TRACE


def test_a_replay_publishes_events_that_still_wait_in_the_outbox(shop):
    shop.client.create(idempotency_key="k1")
    [envelope] = shop.outbox.documents[0]["events"]
    wait_for(lambda: not shop.database["orders"].find_one()["outbox"])
    shop.database["orders"].update_one({}, {"$set": {"outbox": [envelope["id"]]}})
    shop.client.create(idempotency_key="k1")
    assert shop.outbox.documents[1]["outbox"] == [envelope["id"]]


@pytest.mark.parametrize(
    "bad", ["", "nonsense", TRACE.upper(), "ff" + TRACE[2:], "00-" + "0" * 32 + "-b7ad6b7169203331-01"]
)
def test_a_bad_traceparent_starts_a_new_trace(shop, bad):
    shop.client.create(traceparent=bad)
    made = shop.outbox.documents[0]["events"][0]["traceparent"]
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-01", made) and made not in bad


@pytest.mark.parametrize(
    "lines, currency, total",
    [
        ([(1, "0.1"), (1, "0.2")], "USD", "0.3"),
        ([(3, "0.1")], "USD", "0.3"),
        ([(1000000, "0.07")], "USD", "70000"),
        ([(7, "1.10")], "EUR", "7.7"),
        ([(1, "500"), (2, "250.0")], "JPY", "1000"),
        ([(3, "0.001")], "BHD", "0.003"),
        ([(1, "19.990000000000000000000000000000000000000000")], "USD", "19.99"),
        ([(1, "1e2")], "USD", "100"),
        ([(1, "1999e-2")], "USD", "19.99"),
        ([(1, "0")], "USD", "0"),
        ([(1, "-0.0")], "USD", "0"),
        ([(9999, "1000000000"), (1, "999999999.99")], "USD", "9999999999999.99"),
    ],
)
def test_money_is_exact(shop, lines, currency, total):
    items = ",".join(f'{{"sku": "A1", "quantity": {n}, "price": {price}}}' for n, price in lines)
    answer = shop.client(
        "POST", "/orders", f'{{"customerId": "c", "currency": "{currency}", "items": [{items}]}}'.encode()
    )
    assert answer.status == 201, answer.body
    assert f'"total": {total}, ' in answer.body.decode()
    assert shop.orders.get(answer.json["id"])["total"] == round(
        float(total) * {"JPY": 1, "BHD": 1000}.get(currency, 100)
    )


def test_a_whole_number_may_be_written_with_a_point(shop):
    body = b'{"customerId": "c", "items": [{"sku": "A1", "quantity": 2.0, "price": 5.00}]}'
    assert shop.client.create(body)["items"] == [{"sku": "A1", "quantity": 2, "price": 5}]


def test_a_sku_may_come_twice(shop):
    line = {"sku": "A1", "quantity": 1, "price": 1.5}
    made = shop.client.create(order(items=[line, line]))
    assert made["total"] == 3 and made["items"] == [line, line]


@pytest.mark.parametrize(
    "fields",
    [
        {"customerId": "x" * 64}, {"customerId": "客户 ☃"}, {"customerId": "\U0001f600" * 64},
        {"items": [{"sku": "A" * 64, "quantity": 1000000, "price": 0}]}, {"items": ORDER["items"] * 100},
        {"items": [{"sku": "9.a_b-c", "quantity": 1, "price": 1000000000}]}, {"currency": "CLF"},
        {"email": "a" * 242 + "@example.com"},
        {"shippingAddress": ADDRESS | {"line2": "x" * 200, "postalCode": "p" * 20}},
    ],
)  # fmt: skip
def test_the_edge_of_each_limit_is_inside(shop, fields):
    assert shop.client("POST", "/orders", order(**fields)).status == 201


def test_a_body_of_64_kib_is_read(shop):
    body = json.dumps(ORDER).encode()
    assert shop.client("POST", "/orders", body + b" " * (64 * 1024 - len(body))).status == 201


@pytest.mark.parametrize(
    "kind",
    ["application/json", "Application/JSON", "application/json; charset=utf-8", 'application/json;charset="UTF-8"'],
)
def test_these_media_types_are_json(shop, kind):
    assert shop.client("POST", "/orders", ORDER, content_type=kind, content_encoding="identity").status == 201


# --- Idempotency-Key


def test_the_same_key_and_body_give_the_same_order(shop):
    first = shop.client("POST", "/orders", ORDER, idempotency_key="abc")
    again = shop.client("POST", "/orders", ORDER, idempotency_key="abc")
    assert (again.status, again.headers["location"]) == (201, first.headers["location"])
    assert lasting(again.json) == lasting(first.json)
    assert again.headers["idempotent-replayed"] == "true" and "idempotent-replayed" not in first.headers
    assert shop.database["orders"].count_documents({}) == 1


def test_a_replay_shows_the_order_as_it_is_now(shop):
    made = shop.client.create(idempotency_key="abc")
    shop.client("POST", f"/orders/{made['id']}/cancel")
    assert shop.client.create(idempotency_key="abc")["status"] == "cancelled"


@pytest.mark.parametrize("other", ['"abc"', "abc"])
def test_quoted_and_bare_are_the_same_key(shop, other):
    assert shop.client.create(idempotency_key="abc")["id"] == shop.client.create(idempotency_key=other)["id"]


@pytest.mark.parametrize("key", ["x", "k" * 255, '"' + "k" * 255 + '"', r'"a\"b\\c"', "a b~!,;", '"two words"', "a'b"])
def test_these_are_keys(shop, key):
    assert shop.client.create(idempotency_key=key)["id"] == shop.client.create(idempotency_key=key)["id"]


def test_escapes_in_a_quoted_key_stand_for_themselves(shop):
    assert shop.client.create(idempotency_key=r'"a\"b"')["id"] == shop.client.create(idempotency_key='a"b')["id"]


@pytest.mark.parametrize(
    "same",
    [
        b'{"customerId":"c-1","items":[{"sku":"A1","quantity":2,"price":19.99}]}',
        b' {"items": [ {"price": 19.990, "quantity": 2.0, "sku": "A1"} ],\n "customerId": "c-1"} ',
        b'{"customerId":"c\\u002d1","items":[{"sku":"A1","quantity":0.2e1,"price":1999E-2}]}',
    ],
)
def test_bodies_are_compared_by_value(shop, same):
    made = shop.client.create(idempotency_key="abc")
    assert shop.client.create(same, idempotency_key="abc")["id"] == made["id"]


@pytest.mark.parametrize("changes", [{"customerId": "c-2"}, {"email": "a@b.cd"}, {"items": ORDER["items"] * 2}])
def test_the_same_key_with_another_body_is_refused(shop, changes):
    shop.client.create(idempotency_key="abc")
    answer = shop.client("POST", "/orders", order(**changes), idempotency_key="abc")
    assert answer.status == 422 and answer.problem["type"] == "urn:orderproc:key-reused"
    assert shop.database["orders"].count_documents({}) == 1


def test_a_cent_is_another_body(shop):
    shop.client.create(priced(999999999.99), idempotency_key="abc")
    assert shop.client("POST", "/orders", priced(999999999.98), idempotency_key="abc").status == 422


def test_a_key_belongs_to_the_name_that_used_it(shop):
    assert shop.client.create(idempotency_key="abc")["id"] != shop.rival.create(idempotency_key="abc")["id"]


def test_a_key_that_was_refused_is_free(shop):
    assert shop.client("POST", "/orders", {}, idempotency_key="abc").status == 422
    assert shop.client("POST", "/orders", ORDER, idempotency_key="abc").status == 201


def test_forty_at_once_with_one_key_make_one_order(shop):
    answers, barrier = [], threading.Barrier(40)

    def post():
        barrier.wait()
        answers.append(shop.client("POST", "/orders", ORDER, idempotency_key="one"))

    threads = [threading.Thread(target=post) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(answer.status for answer in answers) == {201: 40}
    assert len({answer.json["id"] for answer in answers}) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    assert shop.database["orders"].count_documents({}) == 1


# --- GET /orders


def test_the_list_is_newest_first_with_whole_orders(shop):
    made = sorted((lasting(shop.client.create()) for _ in range(3)), key=lambda order: order["id"], reverse=True)
    answer = shop.client("GET", "/orders")
    assert [lasting(order) for order in answer.json["orders"]] == made
    assert answer.json["next"] is None and "link" not in answer.headers


@pytest.mark.parametrize("count, limit", [(0, 5), (5, 5), (6, 5), (10, 5), (11, 5), (7, 1), (25, 100)])
def test_walking_the_pages_gives_every_order_once(shop, count, limit):
    made = [shop.client.create()["id"] for _ in range(count)]
    seen, path, pages = [], f"/orders?limit={limit}&customerId=c-1", 0
    while path:
        answer = shop.client("GET", path)
        seen += [each["id"] for each in answer.json["orders"]]
        assert len(answer.json["orders"]) <= limit
        link = re.fullmatch('<([^>]*)>; rel="next"', answer.headers.get("link", ""))
        assert bool(link) == bool(answer.json["next"]) and (not link or f"cursor={answer.json['next']}" in link[1])
        path, pages = link and link[1], pages + 1
    assert seen == sorted(made, reverse=True) and pages == max(1, -(-count // limit))


def test_orders_made_while_walking_change_nothing_of_what_follows(shop):
    made = sorted(shop.client.create()["id"] for _ in range(4))
    first = shop.client("GET", "/orders?limit=2").json
    time.sleep(0.002)  # ids sort by the millisecond
    shop.client.create()
    second = shop.client("GET", f"/orders?limit=2&cursor={first['next']}").json
    assert [each["id"] for each in first["orders"] + second["orders"]] == made[::-1]


def test_twenty_is_the_limit_that_goes_without_saying(shop):
    for _ in range(21):
        shop.client.create()
    assert len(shop.client("GET", "/orders").json["orders"]) == 20


def test_filters_are_combined(shop):
    kept = shop.client.create(order(customerId="ü & co"))
    shop.client.create()
    gone = shop.client.create(order(customerId="ü & co"))
    shop.client("POST", f"/orders/{gone['id']}/cancel")

    def ids(query):
        return [each["id"] for each in shop.client("GET", f"/orders?{query}").json["orders"]]

    assert ids("customerId=%C3%BC+%26%20co&status=pending") == [kept["id"]]
    assert ids("status=cancelled") == [gone["id"]] and ids("status=failed") == [] and ids("customerId=nobody") == []


def test_a_client_lists_its_own_and_the_others_all(shop):
    mine, theirs = shop.client.create()["id"], shop.rival.create()["id"]

    def ids(client):
        return {each["id"] for each in client("GET", "/orders").json["orders"]}

    assert ids(shop.client) == {mine} and ids(shop.rival) == {theirs}
    assert ids(shop.reader) == ids(shop.admin) == {mine, theirs}


# --- GET /orders/<id>


def test_another_clients_order_is_not_there(shop):
    path = f"/orders/{shop.rival.create()['id']}"
    answers = [
        shop.client("GET", path),
        shop.client("POST", f"{path}/cancel"),
        shop.client("GET", f"/orders/{uuid.uuid4()}"),
    ]
    assert [answer.status for answer in answers] == [404] * 3
    assert len({answer.body for answer in answers}) == 1, "and it looks like one that never was"
    assert shop.reader("GET", path).status == shop.admin("GET", path).status == 200


def test_an_unchanged_order_is_304(shop):
    path = f"/orders/{shop.client.create()['id']}"
    etag = shop.client("GET", path).headers["etag"]
    assert re.fullmatch('"[0-9a-f]{32}"', etag)
    for known in (etag, f"W/{etag}", f'"other", {etag}', f'W/"x",{etag} , "y"', "*", " * "):
        answer = shop.client("GET", path, if_none_match=known)
        assert (answer.status, answer.body, answer.headers["etag"]) == (304, b"", etag), known
    for other in ('"other"', etag.strip('"'), "", f'"{etag[1:9]}"', '"*"'):
        assert shop.client("GET", path, if_none_match=other).status == 200, other


def test_a_changed_order_has_another_etag(shop):
    path = f"/orders/{shop.client.create()['id']}"
    before = shop.client("GET", path).headers["etag"]
    shop.client("POST", f"{path}/cancel")
    answer = shop.client("GET", path, if_none_match=before)
    assert answer.status == 200 and answer.headers["etag"] != before


@pytest.mark.parametrize("path", ["/orders", "/orders/{id}", "/stock", "/healthz", "/openapi.json", "/docs", "/"])
def test_head_is_get_without_the_body(shop, path):
    path = path.format(id=shop.client.create()["id"])
    get, head = shop.client("GET", path), shop.client("HEAD", path)
    assert head.body == b"" and (head.status, head.headers) == (get.status, get.headers)


# --- what becomes of an order: its events, the handlers, a redrive


def test_an_orders_events_are_shown_as_stored_to_who_may_see_it(shop):
    made = shop.client.create(traceparent=TRACE)
    path = f"/orders/{made['id']}/events"
    answer = shop.client("GET", path)
    [event] = answer.json["events"]
    assert (event["type"], event["subject"], event["orderstatus"]) == ("order_created", made["id"], "pending")
    assert event == shop.outbox.documents[0]["events"][0] and "order" not in event["data"]
    assert shop.reader("GET", path).json == shop.admin("GET", path).json == answer.json
    assert shop.client("GET", path, if_none_match=answer.headers["etag"]).status == 304
    assert shop.rival("GET", path).status == shop.client("GET", "/orders/x/events").status == 404


def test_handlers_are_shown_to_every_role_as_they_were_reported(shop):
    assert shop.client("GET", "/handlers").json == {"retryDelays": [], "handlers": []}
    told = {"takes": ["order_created"], "waiting": 3, "dead": 1}
    shop.store.reports.put({"inventory": {**told, "retryDelays": [9]}})
    time.sleep(0.002)  # as `seen` is in milliseconds
    shop.store.reports.put({"audit": {**told, "retryDelays": [1, 0.5]}})
    for client in (shop.client, shop.reader, shop.admin):
        answer = client("GET", "/handlers")
        assert answer.json["retryDelays"] == [1, 0.5], "the newest report's"
        audit, inventory = answer.json["handlers"]
        assert inventory.pop("seen") <= audit.pop("seen")
        assert (audit, inventory) == ({"name": "audit", **told}, {"name": "inventory", **told})
    assert shop.client("GET", "/handlers", if_none_match=answer.headers["etag"]).status == 304
    assert shop.nobody("GET", "/handlers").status == 401


def test_a_redrive_takes_an_admin_and_an_order(shop):
    path = f"/orders/{shop.client.create()['id']}/redrive"
    assert shop.client("POST", path).status == shop.reader("POST", path).status == 403
    assert shop.admin("POST", "/orders/00000000-0000-7000-8000-000000000000/redrive").status == 404


def test_a_redrive_empties_what_is_parked(shop):
    made = shop.client.create()
    path, [created] = f"/orders/{made['id']}", shop.outbox.documents[0]["events"]
    assert lasting(shop.admin("POST", f"{path}/redrive").json) == lasting(made), "nothing is parked"
    shop.orders.record_failure(event_of(shop.outbox.documents[0]), f"audit/{created['id']}", "a1", a_reason(4), None)
    assert shop.client("GET", path).json["parked"] == ["audit"]
    answer = shop.admin("POST", f"{path}/redrive")
    assert answer.status == 200 and "parked" not in answer.json
    assert shop.orders.get(made["id"])["redriven"] == [f"audit/{created['id']}"]


# --- POST /orders/<id>/cancel


def test_a_pending_order_is_cancelled_once(shop):
    made = shop.client.create()
    first = shop.client("POST", f"/orders/{made['id']}/cancel", traceparent=TRACE)
    again = shop.client("POST", f"/orders/{made['id']}/cancel")
    assert first.status == again.status == 200 and lasting(first.json) == lasting(again.json)
    assert first.json["status"] == "cancelled" and first.json["timeline"][-1]["event"] == "order_cancelled"
    _, cancelled = shop.outbox.documents
    assert cancelled["events"][-1]["type"] == "order_cancelled" and cancelled["events"][-1]["traceparent"] == TRACE
    assert shop.outbox.named == [None, ["order_cancelled"]], "the other may be on its way already"


def test_an_admin_cancels_anybodys_order(shop):
    assert shop.admin("POST", f"/orders/{shop.client.create()['id']}/cancel").json["status"] == "cancelled"


@pytest.mark.parametrize("status", ["processed", "failed"])
def test_a_final_order_is_not_cancelled(shop, status):
    made = shop.client.create()
    shop.database["orders"].update_one({"_id": made["id"]}, {"$set": {"status": status}})
    answer = shop.client("POST", f"/orders/{made['id']}/cancel")
    assert (
        answer.status == 409
        and answer.problem["type"] == "urn:orderproc:conflict"
        and status in answer.problem["detail"]
    )
    assert len(shop.outbox.documents) == 1


@pytest.mark.parametrize("body, kind", [(b"not json", "text/plain"), (b"x" * 70000, "application/json"), (b"{}", None)])
def test_a_body_of_a_cancel_is_ignored(shop, body, kind):
    path = f"/orders/{shop.client.create()['id']}/cancel"
    assert shop.client("POST", path, body, content_type=kind).status == 200


# --- stock


def test_stock_is_set_by_the_admin_and_read_by_all(shop):
    for n, sku in enumerate(["b.2", "A1", "c_3"]):
        answer = shop.admin("PUT", f"/stock/{sku}", {"available": n})
        assert (answer.status, answer.json) == (201, {"sku": sku, "available": n})
    assert shop.admin("PUT", "/stock/A1", b'{"available": 5.0}').json == {"sku": "A1", "available": 5}
    for client in (shop.client, shop.reader, shop.admin):
        assert client("GET", "/stock/A1").json == {"sku": "A1", "available": 5}
        assert [each["sku"] for each in client("GET", "/stock").json["stock"]] == ["A1", "b.2", "c_3"]


def put(shop, available, sku="A1", **headers):
    return shop.admin("PUT", f"/stock/{sku}", {"available": available}, **headers)


def sell(shop, units):
    assert shop.store.moves.take(str(uuid.uuid4()), "an order", {"A1": units}) == {}


def test_restocking_while_selling_needs_what_was_read(shop):
    put(shop, 10)
    read = shop.admin("GET", "/stock/A1")
    sell(shop, 10)
    assert put(shop, read.json["available"] + 5, if_match=read.headers["etag"]).status == 412
    read = shop.admin("GET", "/stock/A1")
    answer = put(shop, read.json["available"] + 5, if_match=f'"old", {read.headers["etag"]}')
    assert (answer.status, answer.json) == (200, {"sku": "A1", "available": 5})
    assert answer.headers["etag"] == shop.admin("GET", "/stock/A1").headers["etag"] != read.headers["etag"]


def test_a_put_may_ask_that_there_is_none_or_any(shop):
    assert put(shop, 1, if_match="*").status == 412
    assert put(shop, 2, if_none_match="*").status == 201
    assert put(shop, 3, if_none_match="*").status == 412
    assert put(shop, 4, if_match="*").json["available"] == 4


def test_a_weak_tag_is_no_match_for_a_put(shop):
    weak = f"W/{put(shop, 1).headers['etag']}"
    assert put(shop, 2, if_match=weak).status == 412
    assert shop.admin("GET", "/stock/A1", if_none_match=weak).status == 304


@pytest.mark.parametrize("tags", ["", " ", ",", "A1"])
def test_an_if_match_without_a_tag_matches_nothing(shop, tags):
    put(shop, 1)
    assert put(shop, 2, if_match=tags).status == 412
    assert put(shop, 3, if_none_match=tags).status == 200


def test_a_refused_precondition_says_which(shop):
    problem = put(shop, 1, if_match='"x"').json
    assert (problem["type"], problem["status"]) == ("urn:orderproc:precondition-failed", 412)
    assert put(shop, -1, if_match='"x"').status == 422, "what is wrong by itself comes first"


def test_a_repeated_put_changes_nothing_even_after_sales(shop):
    assert put(shop, 10, idempotency_key="k").status == 201
    sell(shop, 3)
    for headers in ({}, {"if_none_match": "*"}, {"if_match": '"old"'}):
        answer = put(shop, 10, idempotency_key="k", **headers)
        assert (answer.status, answer.json["available"]) == (200, 7)
    for headers in ({}, {"if_match": '"old"'}):  # a 422 comes before a 412
        assert put(shop, 11, idempotency_key="k", **headers).problem["type"] == "urn:orderproc:key-reused"
    assert put(shop, 9).status == 200 and put(shop, 10, idempotency_key="k").json["available"] == 10


def test_a_puts_key_belongs_to_the_name_that_used_it(shop):
    keys = settings.load({"API_KEYS": "chief:chief-key:admin"})
    chief = Client(make_app(keys, shop.store, shop.outbox, shop.bus), "chief-key")
    put(shop, 10, idempotency_key="k")
    answer = chief("PUT", "/stock/A1", {"available": 11}, idempotency_key="k")
    assert (answer.status, answer.json["available"]) == (200, 11)


def test_a_sale_between_reading_and_writing_is_a_412(shop, monkeypatch):
    tag = put(shop, 10).headers["etag"]
    do, sold = shop.stock._bulk.do, []

    def sell_first(writes=(), read=(), **more):
        if writes and not sold:
            sold.append(3)
            sell(shop, 3)
        return do(writes, read, **more)

    monkeypatch.setattr(shop.stock._bulk, "do", sell_first)
    assert put(shop, 15, if_match=tag).status == 412 and sold
    assert shop.stock.get("A1")["available"] == 7


def test_a_sale_never_stops_a_put_without_conditions(shop, monkeypatch):
    put(shop, 10)
    [document] = shop.database["stock"].find()
    sell(shop, 3)
    do, writes_sent = shop.stock._bulk.do, []

    def with_an_old_read(writes=(), read=(), **more):
        writes_sent.extend(writes)
        return do(writes, read, **more) if writes else {"A1": document}

    monkeypatch.setattr(shop.stock._bulk, "do", with_an_old_read)
    answer = put(shop, 15)
    assert (answer.status, answer.json["available"]) == (200, 15)
    assert len(writes_sent) == 1, "who only sets a number does not race with sales"


def test_a_late_copy_of_a_put_changes_nothing(shop, monkeypatch):
    put(shop, 1)
    sent, bulk_write = [], group_commit.bulk_write
    monkeypatch.setattr(group_commit, "bulk_write", lambda *args: sent.append(args) or bulk_write(*args))
    put(shop, 100)
    put(shop, 5)
    sell(shop, 3)
    bulk_write(*next(args for args in sent if args[1]))
    assert shop.stock.get("A1")["available"] == 2


def test_puts_at_once_each_count_once(shop):
    with ThreadPoolExecutor(8) as crowd:
        answers = list(crowd.map(lambda n: put(shop, n), range(16)))
    assert sorted(answer.status for answer in answers) == [200] * 15 + [201]
    [document] = shop.database["stock"].find()
    assert document["rev"] == 16 and document["available"] in range(16)


@pytest.mark.parametrize("done", [True, False])
def test_a_put_of_unknown_outcome_is_a_503(shop, monkeypatch, done):
    put(shop, 1)
    bulk_write, sent = group_commit.bulk_write, []

    def done_without_an_answer(collection, writes):
        sent.extend(writes)
        if done:
            bulk_write(collection, writes)
        raise AutoReconnect("gone")

    monkeypatch.setattr(group_commit, "bulk_write", done_without_an_answer)
    read = shop.admin("GET", "/stock/A1").headers["etag"]
    answer = put(shop, 7, if_match=read, idempotency_key="k")
    assert (answer.status, answer.headers["retry-after"]) == (503, "2")
    time.sleep(2 * group_commit.PAUSE)
    assert len(sent) == 1, "it is never sent again"
    monkeypatch.setattr(group_commit, "bulk_write", bulk_write)
    assert put(shop, 7, if_match=read, idempotency_key="k").json["available"] == 7


@pytest.mark.parametrize("path", ["/orders", "/stock", "/stock/A1"])
def test_what_is_known_already_is_not_sent_again(shop, path):
    put(shop, 1)
    shop.client.create()
    tag = shop.client("GET", path).headers["etag"]
    again = shop.client("GET", path, if_none_match=tag)
    assert (again.status, again.body, again.headers["etag"]) == (304, b"", tag)
    put(shop, 2)
    shop.client.create()
    assert shop.client("GET", path, if_none_match=tag).status == 200


# --- a crowd


def test_what_waited_too_long_for_a_thread_is_refused(shop, monkeypatch):
    before, calls = measured("orderproc_shed_total"), shop.break_store(StoreUnavailable())
    monkeypatch.setattr("core.http.app.seconds_waited", lambda: 1.1)
    for method, body in (("GET", None), ("POST", ORDER)):
        answer = shop.client(method, "/orders", body)
        assert (answer.status, answer.headers["retry-after"]) == (503, "2")
        assert answer.problem["type"] == "urn:orderproc:unavailable"
    assert not calls and not shop.outbox.documents, "nobody was asked"
    assert measured("orderproc_shed_total") == before + 2


@pytest.mark.parametrize("path", ["/healthz", "/metrics"])
def test_probes_are_answered_however_long_they_waited(shop, monkeypatch, path):
    monkeypatch.setattr("core.http.app.seconds_waited", lambda: 9.0)
    before = measured("orderproc_shed_total")
    assert shop.nobody("GET", path).status == 200
    assert measured("orderproc_shed_total") == before


def test_a_probe_that_waited_finds_the_store_as_it_is(shop, monkeypatch):
    monkeypatch.setattr("core.http.app.seconds_waited", lambda: 9.0)
    assert shop.nobody("GET", "/readyz").json["store"] == "up"


def test_the_wait_for_a_thread_is_measured(shop, monkeypatch):
    name = "orderproc_request_queue_seconds"
    before = measured(f"{name}_count"), measured(f"{name}_sum")
    monkeypatch.setattr("core.http.app.seconds_waited", lambda: 0.5)
    assert shop.client("GET", "/orders").status == 200
    assert (measured(f"{name}_count"), measured(f"{name}_sum")) == (before[0] + 1, before[1] + 0.5)


def test_who_waited_for_a_thread_waits_less_for_the_store(shop, monkeypatch):
    left = []
    monkeypatch.setattr("core.http.app.seconds_waited", lambda: 0.9)
    monkeypatch.setattr(shop.orders, "page", lambda *args: left.append(time_left(10)) or [])
    assert shop.client("GET", "/orders").status == 200
    assert 1.5 < left[0] <= ANSWER_WITHIN - 0.9


@pytest.mark.parametrize("available", [0, 1000000000])
def test_the_edges_of_available(shop, available):
    assert shop.admin("PUT", "/stock/A1", {"available": available}).json["available"] == available


def test_walking_the_stock_gives_every_sku_once(shop):
    skus = sorted(f"S{n}" for n in range(7))
    for sku in skus:
        shop.stock.fill({sku: 1})
    seen, cursor = [], ""
    while cursor is not None:
        page = shop.client("GET", f"/stock?limit=3{cursor and '&cursor='}{cursor}").json
        seen, cursor = seen + [each["sku"] for each in page["stock"]], page["next"]
    assert seen == skus


# --- operations


def test_health_needs_no_key(shop):
    assert shop.nobody("GET", "/healthz").status == 200
    assert shop.nobody("GET", "/readyz").json == {"ready": True, "store": "up", "broker": "up"}


def test_the_api_is_ready_without_the_broker(shop):
    shop.bus.up = False
    answer = shop.nobody("GET", "/readyz")
    assert (answer.status, answer.json) == (200, {"ready": True, "store": "up", "broker": "down"})


def test_readyz_fails_without_the_store_and_asks_once_a_second(shop):
    calls = shop.break_store(StoreUnavailable())
    answers = [shop.nobody("GET", "/readyz") for _ in range(20)]
    assert {(answer.status, answer.body) for answer in answers} == {
        (503, b'{"ready": false, "store": "down", "broker": "up"}')
    }
    assert 1 <= len(calls) <= 2
    assert shop.nobody("GET", "/healthz").status == 200, "an outage elsewhere must not get the process killed"


def test_the_spec_and_its_reader_are_served_from_here(shop):
    assert shop.nobody("GET", "/openapi.json").json["openapi"].startswith("3.")
    for path in ("/", "/docs"):
        page = shop.nobody("GET", path)
        assert page.status == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
        assert b"//" not in page.body, "nothing comes from elsewhere"
        for link in re.findall(r'(?:href|src)="(?!data:|#)([^"]*)"', page.body.decode()):
            assert shop.nobody("GET", urljoin(path, link)).status == 200, link
    assert "javascript" in shop.nobody("GET", "/docs/swagger-ui-bundle.js").headers["content-type"]


@pytest.mark.parametrize(
    "name", ["..%2Fopenapi.json", "../orderproc.py", "%2Fetc%2Fpasswd", "index.html", "swagger-ui.css%00"]
)
def test_no_other_file_is_served(shop, name):
    assert shop.nobody("GET", f"/docs/{name}").status == 404


def measured(name, **labels):
    return REGISTRY.get_sample_value(name, labels) or 0


def test_requests_are_measured_by_route_and_never_by_path(shop):
    made = shop.client.create()
    name = "orderproc_http_request_seconds_count"
    cases = [
        ("GET", f"/orders/{made['id']}", {"route": "/orders/<order_id>", "method": "GET", "status": "200"}),
        ("GET", "/made/up", {"route": "none", "method": "GET", "status": "404"}),
        ("BREW", "/orders", {"route": "none", "method": "other", "status": "405"}),
        ("POST", "/orders", {"route": "/orders", "method": "POST", "status": "415"}),
    ]
    for method, path, labels in cases:
        before = measured(name, **labels)
        shop.client(method, path)
        assert measured(name, **labels) == before + 1
    text = shop.nobody("GET", "/metrics").body.decode()
    assert made["id"] not in text and "/made/up" not in text and "BREW" not in text


def test_orders_are_counted_when_they_reach_a_status(shop):
    before = {status: measured("orderproc_orders_total", status=status) for status in ("pending", "cancelled")}
    made = shop.client.create(idempotency_key="k")
    shop.client.create(idempotency_key="k")
    for _ in range(2):
        shop.client("POST", f"/orders/{made['id']}/cancel")
    assert measured("orderproc_orders_total", status="pending") == before["pending"] + 1
    assert measured("orderproc_orders_total", status="cancelled") == before["cancelled"] + 1


def test_what_asks_all_the_time_and_learns_nothing_new_is_not_in_the_log(shop, caplog):
    tag = shop.client("GET", "/orders").headers["etag"]
    caplog.set_level(logging.INFO, logger="orderproc")
    assert shop.client("GET", "/orders", if_none_match=tag).status == 304
    for probe in ("/healthz", "/readyz", "/metrics"):
        assert shop.nobody("GET", probe).status == 200
    assert caplog.records == []
    assert shop.client("GET", "/orders").status == 200 and len(caplog.records) == 1


def test_one_log_line_per_request_without_personal_data(shop, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="orderproc")
    lines, form = [], Lines(as_json=True)
    monkeypatch.setattr(caplog.handler, "emit", lambda record: lines.append(json.loads(form.format(record))))
    body = order(customerId="the client", email="ann@example.com", shippingAddress=ADDRESS)
    made = shop.client.create(body, traceparent=TRACE)
    shop.client("GET", "/orders?customerId=secret-customer")
    shop.client("GET", "/somewhere/private")
    assert [(line["method"], line["route"], line["status"]) for line in lines] == [
        ("POST", "/orders", 201), ("GET", "/orders", 200), ("GET", "none", 404)
    ]  # fmt: skip
    assert lines[0]["order"] == made["id"] and lines[0]["trace"] == TRACE[3:35] and lines[0]["ms"] > 0
    assert all(line["level"] == "INFO" and re.fullmatch("[0-9a-f]{32}", line["trace"]) for line in lines)
    for personal in ("ann@", "Main St", "secret-customer", "private", "shop-key", "the client"):
        assert personal not in json.dumps(lines)
