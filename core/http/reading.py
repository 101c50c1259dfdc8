"""What clients send, read strictly: JSON, orders with their prices, query strings, keys. Raises the problem."""

import json
import re
from decimal import Decimal
from typing import Any
from urllib.parse import parse_qsl

from core.base.ids import digest
from core.http.problems import invalid, problem
from core.order import money
from core.order.schemas import find_faults, schema
from core.order.state_machine import STATUSES

DEEPEST = 32  # levels of objects and arrays
SKU = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
ORDER_ID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
Parameters = dict[str, tuple[str, str]]  # of a query: name -> pattern, what it must be
LIMIT = ("[1-9][0-9]?|100", "a whole number from 1 to 100")
CURSOR = "what `next` was in the page before"  # which is the last entry of that page
LIST_STOCK: Parameters = {"limit": LIMIT, "cursor": (SKU, CURSOR)}
LIST_ORDERS: Parameters = {
    "status": ("|".join(STATUSES), f"one of {', '.join(STATUSES)}"),
    "customerId": (r"[^\x00-\x1f]{1,64}", "1 to 64 characters, none of them a control character"),
    "limit": LIMIT,
    "cursor": (ORDER_ID, CURSOR),
}


def parse_json(body: bytes) -> Any:
    """JSON as RFC 8259 has it: Python by itself takes NaN, UTF-16, a key twice, any depth."""
    hooks: dict[str, Any] = {"parse_int": _number, "parse_float": _number, "parse_constant": int}  # int("NaN") raises
    try:
        value = json.loads(body.decode(), object_pairs_hook=_object, **hooks)
        _check_depth(value, DEEPEST)
        return value
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise problem("malformed", f"it must be JSON in UTF-8, at most {DEEPEST} levels deep: {error!s:.200}") from None


def _number(text: str) -> int | Decimal:
    number = Decimal(text)  # exact, and an int where it is whole: 1.0 is 1; but 1e999999999 as an int takes a gigabyte
    return int(number) if number.adjusted() < 32 and number == number.to_integral_value() else number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice")
    return dict(pairs)


def _check_depth(value: Any, left: int) -> None:
    if isinstance(value, dict | list):
        if not left:
            raise ValueError("nested too deep")
        for child in value.values() if isinstance(value, dict) else value:
            _check_depth(child, left - 1)


def read_order(body: Any) -> dict[str, Any]:
    """The order in a body, in minor units; the problem has every fault by the schema and the money rules."""
    faults = dict(find_faults(schema("order"), body))
    order: dict[str, Any] = {"currency": "USD"} | (body if isinstance(body, dict) else {})
    if str(order["currency"]) not in money.currencies():
        faults.setdefault("/currency", "must be an ISO 4217 code, such as EUR")
    elif isinstance(order.get("items"), list):
        faults |= _price_faults(order["items"], order["currency"])
    if faults:
        raise invalid(*faults.items())
    items = [line | {"price": money.to_minor(line["price"], order["currency"])} for line in order["items"]]
    total = sum(line["quantity"] * line["price"] for line in items)
    if total > money.LARGEST_TOTAL:
        raise invalid(("/items", "must cost at most 15 digits in minor units together"))
    return order | {"items": items, "total": total}


def _price_faults(lines: list[Any], currency: str) -> dict[str, str]:
    found = {}
    for n, line in enumerate(lines):
        price = line.get("price") if isinstance(line, dict) else None
        try:
            if isinstance(price, int | Decimal) and 0 <= price <= 10**9:  # what else there is the schema refuses
                money.to_minor(price, currency)
        except ValueError as error:
            found[f"/items/{n}/price"] = str(error)
    return found


def fingerprint(body: Any) -> str:
    """The same for bodies that say the same: blanks, the order of keys, 1 or 1.00 make no difference."""
    return digest(json.dumps(body, sort_keys=True, default=float))


def read_available(sku: str, body: Any) -> int:
    """The units in the body of PUT /stock/<sku>."""
    faults = find_faults(schema("stock"), body)
    if not re.fullmatch(SKU, sku):
        faults.append(("/sku", "in the path: must be 1 to 64 of A-Z a-z 0-9 . _ - and begin with a letter or digit"))
    if faults:
        raise invalid(*faults)
    return body["available"]


def read_query(text: str, known: Parameters) -> dict[str, str]:
    """The parameters of a query string. An unknown or repeated one, or a bad value, is refused."""
    try:
        pairs = parse_qsl(text.encode("ascii").decode(), True, strict_parsing=True, errors="strict") if text else []
    except ValueError:
        raise problem("malformed", "the query must be name=value&name=value in UTF-8") from None
    query = dict(pairs)
    if not query.keys() <= known.keys() or len(query) < len(pairs):
        raise problem("malformed", f"query parameters here, each at most once: {', '.join(known) or 'none'}")
    for name, value in query.items():
        pattern, must_be = known[name]
        if not re.fullmatch(pattern, value):
            raise problem("malformed", f"{name} must be {must_be}")
    return query


def idempotency_key(header: str | None) -> str | None:
    """The key itself, from a string as structured fields have it (RFC 8941), or bare."""
    match = re.fullmatch(r'"((?:[ !#-\[\]-~]|\\["\\])*)"|([!#-~][ -~]*)', header or "")
    key = (match[2] or re.sub(r"\\(.)", r"\1", match[1])) if match else ""
    if header is not None and not 1 <= len(key) <= 255:
        raise problem("malformed", "Idempotency-Key must be 1 to 255 printable ASCII characters, quoted or bare")
    return key or None
