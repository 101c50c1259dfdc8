"""What the files in `schemas/` accept and refuse."""

import copy
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.support.contracts import objects

ROOT = Path(__file__).parents[2]
OUR_EVENTS = {
    "order_created": ("/orderproc/api", "pending", {}),
    "inventory_reserved": ("/orderproc/handlers/inventory", "pending", {}),
    "order_confirmed": (
        "/orderproc/handlers/shipping",
        "processed",
        {"shipment": {"carrier": "demo", "trackingNumber": "T-0001"}},
    ),
    "order_failed": ("/orderproc/handlers/inventory", "failed", {"reason": "out_of_stock"}),
    "order_cancelled": ("/orderproc/api", "cancelled", {}),
}
ENVELOPE = ["specversion", "id", "source", "type", "subject", "time", "datacontenttype", "orderstatus", "data"]
ORDER = ["id", "status", "customerId", "currency", "items", "total", "createdAt", "updatedAt"]
EVENT_TYPES = list(OUR_EVENTS)
MISSING = object()


def read(name: str) -> Any:
    return json.loads((ROOT / name).read_text())


def accepts(name: str, value: Any) -> bool:
    return Draft202012Validator(read(f"schemas/{name}.json")).is_valid(value)


def changed(value: Any, path: str, new: Any) -> Any:
    """A copy in which the field at `path` (`items/0/sku`) is `new`, or gone."""
    value = copy.deepcopy(value)
    *parents, last = path.split("/")
    place = value
    for step in parents:
        place = place[int(step)] if step.isdigit() else place[step]
    if new is MISSING:
        del place[last]
    else:
        place[last] = new
    return value


def order() -> dict[str, Any]:
    """A body of POST /orders that has every field."""
    return {
        "customerId": "ann",
        "items": [{"sku": "A1", "quantity": 2, "price": 19.99}, {"sku": "A1", "quantity": 1, "price": 5}],
        "email": "ann@example.com",
        "currency": "EUR",
        "shippingAddress": {
            "name": "Zoë O'Brien-Łukasz 😀",
            "line1": "1 Harbour Road",
            "line2": "3rd floor",
            "city": "São Paulo",
            "postalCode": "20457",
            "country": "DE",
        },
    }


def event(type: str) -> dict[str, Any]:
    """An event as it travels."""
    source, status, data = OUR_EVENTS[type]
    shown = order() | {
        "id": "019b2f6e-7a10-7c3d-9e42-5b8f0c6d1a27",
        "status": "cancelled",  # an order may be further on than the event that is about it
        "total": 44.98,
        "createdAt": "2026-01-31T09:30:00.000Z",
        "updatedAt": "2026-01-31T09:30:01.250Z",
    }
    return {
        "specversion": "1.0",
        "id": "0e4f6f0a-1c55-5d6e-8f57-3f6a2f3b9c11",
        "source": source,
        "type": type,
        "subject": shown["id"],
        "time": "2026-01-31T09:30:00.045Z",
        "datacontenttype": "application/json",
        "orderstatus": status,
        "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "data": {"order": shown, **copy.deepcopy(data)},
    }


# --- the body of POST /orders --------------------------------------------------------------------------------------

TEXTS = {"customerId": 64} | {f"shippingAddress/{name}": 200 for name in ("name", "line1", "line2", "city")}
TEXTS |= {"shippingAddress/postalCode": 20}
BAD_TEXTS = {
    "empty": "",
    "only blanks": "   ",
    "only foreign blanks": "\u00a0\u2003\u3000",
    "only invisible blanks": "\u200b\ufeff",
    "a final newline": "ann\n",
    "a newline": "a\nb",
    "a tab": "a\tb",
    "a NUL": "a\x00b",
    "a NUL alone": "\x00",
    "DEL": "a\x7f",
    "a C1 control": "a\x85b",
    "the last C1 control": "\x9fa",
    "a high surrogate alone": "a\ud83d",
    "a low surrogate alone": "\udc00a",
    "a number": 7,
    "null": None,
    "a query": {"$ne": None},
    "a list": ["ann"],
}


def line(n: int) -> dict[str, Any]:
    return {"sku": f"S{n}", "quantity": 1, "price": 1}


GOOD = [
    ("items", [line(1)]),
    ("items", [line(n) for n in range(100)]),
    ("items/0/sku", "a"),
    ("items/0/sku", "9" + "._-aZ0"),
    ("items/0/sku", "x" * 64),
    ("items/0/quantity", 1),
    ("items/0/quantity", 1.0),  # JSON has one kind of number; the API reads it as 1
    ("items/0/quantity", 1_000_000),
    ("items/0/price", 0),
    ("items/0/price", 0.01),
    ("items/0/price", 1_000_000_000),
    ("email", MISSING),
    ("email", "a@b.c"),
    ("email", "first.last+tag_o'hara@mail.example.co.uk"),
    ("email", "zoë@bücher.example"),
    ("email", "a" * 248 + "@b.com"),
    ("currency", MISSING),
    ("currency", "JPY"),
    ("shippingAddress", MISSING),
    ("shippingAddress/line2", MISSING),
    ("shippingAddress/country", "US"),
]
BAD = [
    ("customerId", MISSING),
    ("customer_id", "ann"),
    ("id", "1"),
    ("items", MISSING),
    ("items", []),
    ("items", [line(n) for n in range(101)]),
    ("items", {"0": line(1)}),
    ("items", ["A1"]),
    ("items/0/sku", MISSING),
    ("items/0/sku", ""),
    ("items/0/sku", "x" * 65),
    ("items/0/sku", "A1\n"),
    ("items/0/sku", " A1"),
    ("items/0/sku", "A/1"),
    ("items/0/sku", "-A1"),
    ("items/0/sku", ".."),
    ("items/0/sku", "$A1"),
    ("items/0/sku", "é1"),
    ("items/0/sku", "A\u0661"),  # an Arabic digit
    ("items/0/sku", "A1\x00"),
    ("items/0/sku", 1),
    ("items/0/quantity", MISSING),
    ("items/0/quantity", 0),
    ("items/0/quantity", -1),
    ("items/0/quantity", 1_000_001),
    ("items/0/quantity", 1.5),
    ("items/0/quantity", True),
    ("items/0/quantity", "1"),
    ("items/0/quantity", "\u0661"),
    ("items/0/price", MISSING),
    ("items/0/price", -0.01),
    ("items/0/price", 1_000_000_000.01),
    ("items/0/price", float("inf")),
    ("items/0/price", False),
    ("items/0/price", "19.99"),
    ("items/0/discount", 1),
    ("email", "a" * 249 + "@b.com"),
    ("email", ""),
    ("email", "ann"),
    ("email", "ann@example"),
    ("email", "@example.com"),
    ("email", "ann@"),
    ("email", "ann@.com"),
    ("email", "ann@example..com"),
    ("email", "ann@example.com."),
    ("email", "ann@bob@example.com"),
    ("email", "ann@example.com\n"),
    ("email", "ann@example.com\r\nBcc: bob@example.com"),
    ("email", "ann@example.com\u2028"),
    ("email", "ann lee@example.com"),
    ("email", " ann@example.com"),
    ("email", "ann@example.com,bob@example.com"),
    ("email", "ann@example.com;bob@example.com"),
    ("email", "ann,bob@example.com"),
    ("email", "ann;bob@example.com"),
    ("email", "friends:ann@example.com"),
    ("email", "ann\\@example.com"),
    ("email", '"ann"@example.com'),
    ("email", "Ann <ann@example.com>"),
    ("email", "<ann@example.com>"),
    ("email", "ann(x)@example.com"),
    ("email", "ann@[127.0.0.1]"),
    ("email", "ann@{x}.com"),
    ("email", "a\x00@example.com"),
    ("email", "a\x85@example.com"),
    ("email", "a\ud800@example.com"),
    ("email", None),
    ("currency", "usd"),
    ("currency", "US"),
    ("currency", "USDT"),
    ("currency", "USD\n"),
    ("currency", "ÜSD"),
    ("currency", "US1"),
    ("currency", ""),
    ("currency", None),
    ("shippingAddress", None),
    ("shippingAddress", {}),
    ("shippingAddress/name", MISSING),
    ("shippingAddress/line1", MISSING),
    ("shippingAddress/city", MISSING),
    ("shippingAddress/postalCode", MISSING),
    ("shippingAddress/country", MISSING),
    ("shippingAddress/country", "de"),
    ("shippingAddress/country", "D"),
    ("shippingAddress/country", "DEU"),
    ("shippingAddress/country", "DE\n"),
    ("shippingAddress/country", "ДЕ"),
    ("shippingAddress/state", "HH"),
]


def test_an_order_with_every_field_is_good():
    assert accepts("order", order())


def test_a_customer_and_one_line_are_enough():
    assert accepts("order", {"customerId": "ann", "items": [line(1)]})


@pytest.mark.parametrize(("path", "value"), GOOD)
def test_an_order_may_have(path, value):
    assert accepts("order", changed(order(), path, value))


@pytest.mark.parametrize(("path", "value"), BAD)
def test_an_order_must_not_have(path, value):
    assert not accepts("order", changed(order(), path, value))


@pytest.mark.parametrize("body", [None, [], [order()], "order", 1, {}])
def test_a_body_that_is_no_order_is_refused(body):
    assert not accepts("order", body)


@pytest.mark.parametrize(("path", "most"), TEXTS.items())
@pytest.mark.parametrize("letter", ["x", "é", "😀"])
def test_a_text_is_accepted_up_to_its_greatest_length_only(path, most, letter):
    assert accepts("order", changed(order(), path, letter))
    assert accepts("order", changed(order(), path, letter * most))
    assert not accepts("order", changed(order(), path, letter * (most + 1)))


@pytest.mark.parametrize("path", TEXTS)
@pytest.mark.parametrize("text", BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_a_text_must_not_be(path, text):
    assert not accepts("order", changed(order(), path, text))


@pytest.mark.parametrize("path", TEXTS)
@pytest.mark.parametrize("text", [" ann ", "a b", "\u00a0x", "\u0661", "$ne", "<b>", '"', "\u200dx"])
def test_a_text_may_hold_anything_else(path, text):
    assert accepts("order", changed(order(), path, text))


# --- the body of PUT /stock/<sku> ----------------------------------------------------------------------------------


@pytest.mark.parametrize("available", [0, 1, 1.0, 1_000_000_000])
def test_stock_may_be(available):
    assert accepts("stock", {"available": available})


@pytest.mark.parametrize("available", [-1, 1_000_000_001, 0.5, True, "1", None, {"$inc": 1}])
def test_stock_must_not_be(available):
    assert not accepts("stock", {"available": available})


@pytest.mark.parametrize("body", [{}, {"available": 1, "sku": "A1"}, [], 1, None])
def test_a_body_that_is_no_stock_is_refused(body):
    assert not accepts("stock", body)


# --- events --------------------------------------------------------------------------------------------------------

REQUIRED = [(type, name) for type in OUR_EVENTS for name in ENVELOPE]
REQUIRED += [(type, "data/order") for type in OUR_EVENTS]
REQUIRED += [(type, f"data/order/{name}") for type in OUR_EVENTS for name in ORDER]
REQUIRED += [(type, f"data/order/items/0/{name}") for type in OUR_EVENTS for name in ("sku", "quantity", "price")]
REQUIRED += [("order_failed", "data/reason"), ("order_confirmed", "data/shipment")]
REQUIRED += [("order_confirmed", f"data/shipment/{name}") for name in ("carrier", "trackingNumber")]
WRONG = [
    ("specversion", "0.3"),
    ("id", ""),
    ("id", "x" * 256),
    ("id", "two words"),
    ("id", "a\n"),
    ("id", 7),
    ("source", ""),
    ("source", "/elsewhere"),
    ("source", "/orderproc/handlers/"),
    ("source", "/orderproc/handlers/a b"),
    ("source", "/orderproc/api\n"),
    ("source", "/orderproc/handlers/inventory\n"),
    ("type", "order_shipped"),
    ("subject", ""),
    ("subject", "1"),
    ("subject", "019b2f6e-7a10-7c3d-9e42-5b8f0c6d1a27\n"),
    ("subject", {"$ne": None}),
    ("time", "yesterday"),
    ("time", "2026-01-31"),
    ("time", "2026-01-31T09:30:00"),
    ("time", "2026-01-31T09:30:00Z\n"),
    ("time", "\u0662026-01-31T09:30:00Z"),
    ("datacontenttype", "text/plain"),
    ("orderstatus", "shipped"),
    ("traceparent", 7),
    ("data", None),
    ("data/order", "019b2f6e-7a10-7c3d-9e42-5b8f0c6d1a27"),
    ("data/order/status", 7),
    ("data/order/items", []),
    ("data/order/items/0/quantity", "2"),
    ("data/order/total", "44.98"),
]
UNKNOWN = ["partitionkey", "data/remark", "data/order/remark", "data/order/items/0/remark"]


@pytest.mark.parametrize("type", EVENT_TYPES)
def test_an_event_as_we_send_it_is_good(type):
    assert accepts(f"events/{type}", event(type))


@pytest.mark.parametrize(("type", "path"), REQUIRED)
def test_an_event_must_have(type, path):
    assert not accepts(f"events/{type}", changed(event(type), path, MISSING))


@pytest.mark.parametrize(("path", "value"), WRONG)
@pytest.mark.parametrize("type", EVENT_TYPES)
def test_an_event_must_not_have(type, path, value):
    assert not accepts(f"events/{type}", changed(event(type), path, value))


@pytest.mark.parametrize("path", UNKNOWN)
@pytest.mark.parametrize("type", EVENT_TYPES)
def test_what_an_event_has_besides_is_ignored(type, path):
    assert accepts(f"events/{type}", changed(event(type), path, {"any": ["thing"]}))


@pytest.mark.parametrize("traceparent", [MISSING, "", "nonsense"])
@pytest.mark.parametrize("type", EVENT_TYPES)
def test_a_bad_trace_is_no_reason_to_refuse_an_event(type, traceparent):
    assert accepts(f"events/{type}", changed(event(type), "traceparent", traceparent))


@pytest.mark.parametrize("moment", ["2026-01-31T09:30:00Z", "2026-01-31T09:30:00.123456+05:30"])
def test_a_time_is_any_rfc_3339(moment):
    assert accepts("events/order_created", changed(event("order_created"), "time", moment))


@pytest.mark.parametrize("other", EVENT_TYPES)
@pytest.mark.parametrize("type", EVENT_TYPES)
def test_an_event_passes_its_own_schema_only(type, other):
    assert accepts(f"events/{other}", event(type)) == (type == other)


@pytest.mark.parametrize("type", EVENT_TYPES)
def test_an_event_is_accepted_only_with_its_types_status(type):
    right = OUR_EVENTS[type][1]
    for status in ("pending", "processed", "failed", "cancelled"):
        assert accepts(f"events/{type}", changed(event(type), "orderstatus", status)) == (status == right)


def test_the_api_and_handlers_may_not_publish_each_others_events():
    assert not accepts("events/order_created", changed(event("order_created"), "source", "/orderproc/handlers/email"))
    assert not accepts("events/order_cancelled", changed(event("order_cancelled"), "source", "/orderproc/handlers/a"))
    assert not accepts("events/order_failed", changed(event("order_failed"), "source", "/orderproc/api"))


@pytest.mark.parametrize(
    ("type", "path"),
    [
        ("order_failed", "data/reason"),
        ("order_confirmed", "data/shipment/carrier"),
        ("order_confirmed", "data/shipment/trackingNumber"),
    ],
)
def test_a_text_entering_the_order_from_an_event_is_clean(type, path):
    assert accepts(f"events/{type}", changed(event(type), path, "x" * 200))
    for text in ("x" * 201, *BAD_TEXTS.values()):
        assert not accepts(f"events/{type}", changed(event(type), path, text))


# --- currencies ----------------------------------------------------------------------------------------------------


def test_currencies_have_three_capitals_and_allowed_decimals_in_sorted_order():
    table = read("schemas/currencies.json")
    assert all(re.fullmatch("[A-Z]{3}", code) for code in table)
    assert all(type(decimals) is int for decimals in table.values())
    assert set(table.values()) == {0, 2, 3, 4}
    assert list(table) == sorted(table)
    assert 150 < len(table) < 180


@pytest.mark.parametrize(
    ("decimals", "codes"),
    [
        (0, "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF"),
        (3, "BHD IQD JOD KWD LYD OMR TND"),
        (4, "CLF UYW"),
    ],
)
def test_these_currencies_and_no_others_have_other_decimals_than_two(decimals, codes):
    assert [code for code, count in read("schemas/currencies.json").items() if count == decimals] == codes.split()


def test_currencies_in_use_are_listed_without_metals_or_test_codes():
    table = read("schemas/currencies.json")
    assert all(
        code in table
        for code in ["USD", "EUR", "GBP", "CHF", "CNY", "INR", "BRL", "MRU", "MGA", "SLE", "VES", "XCG", "ZWG"]
    )
    assert not any(
        code in table
        for code in ["XAU", "XAG", "XPT", "XPD", "XTS", "XXX", "XDR", "XSU", "XUA", "DEM", "HRK", "BGN", "ANG"]
    )


# --- the schemas themselves ----------------------------------------------------------------------------------------

SCHEMAS = ["order", "stock", *sorted(f"events/{path.stem}" for path in (ROOT / "schemas/events").glob("*.json"))]
FILES = [*(f"schemas/{name}.json" for name in SCHEMAS), "openapi.json"]
NASTY = [
    "a",
    " ",
    "\u3000",
    ".",
    "@",
    "a.",
    "@.",
    "a@",
    "a@a.",
    ".a",
    "0",
    "-0",
    "0-",
    "/",
    "A",
    "\n",
    "\x00",
    "é",
    "😀",
]
MOST = 60_000  # a body has at most 64 KiB


def patterns() -> list[str]:
    return sorted({found["pattern"] for name in FILES for found in objects(read(name)) if "pattern" in found})


def fastest(pattern: re.Pattern[str], text: str) -> float:
    """Seconds of the best of three tries: what the pattern costs, not what the machine was busy with."""
    tries = []
    for _ in range(3):
        start = time.perf_counter()
        pattern.search(text)
        tries.append(time.perf_counter() - start)
    return min(tries)


@pytest.mark.parametrize("pattern", patterns())
def test_no_pattern_takes_long_on_a_nasty_text(pattern):
    compiled = re.compile(pattern)
    for bit in NASTY:
        text = (bit * MOST)[:MOST]
        for nasty in (text, text + "\n", text + "\x00", "a@b" + text, text + "@", "a" + text + "!"):
            assert fastest(compiled, nasty) < 0.05, f"{bit!r} repeated"


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_a_schema(name):
    schema = read(f"schemas/{name}.json")
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"] and schema["description"]


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_pattern_comes_with_words_for_whoever_breaks_it(name):
    for found in objects(read(f"schemas/{name}.json")):
        if isinstance(found.get("pattern"), str):
            assert found["description"].startswith("must be ")


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_stands_alone(name):
    assert not any("$ref" in found for found in objects(read(f"schemas/{name}.json")))


@pytest.mark.parametrize("name", ["order", "stock"])
def test_a_body_has_no_room_for_unknown_fields(name):
    for found in objects(read(f"schemas/{name}.json")):
        if found.get("type") == "object":
            assert found["additionalProperties"] is False
