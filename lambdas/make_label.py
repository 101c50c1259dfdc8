"""Makes or voids the label of an order. Its id is the token: asked again, the same answer and never a second label."""

from hashlib import sha256
from html import escape

from lambdas import tokens


class LabelVoided(Exception):
    """The order's label is void, perhaps since before it was made; there will be no other."""


def handler(event: dict, context: object) -> dict:
    token = tokens.safe("token", event["token"])
    label, mark = f"labels/{token}.svg", f"labels/{token}.void"
    if event["action"] == "void":
        tokens.put(mark, "void")  # before the removal: a label written later is taken back by the second look below
        tokens.drop(label)
        return {"voided": True}
    if event["action"] != "make":
        raise ValueError(f"action must be make or void, not {event['action']!r}")
    number = tracking_number(token)
    if not tokens.has(mark):
        tokens.put(label, _draw(token, number, event.get("shipTo") or {}))
    if tokens.has(mark):
        tokens.drop(label)
        raise LabelVoided(f"the label of order {token} is void")
    return {"carrier": "ACME Parcel", "trackingNumber": number}


def tracking_number(token: str) -> str:
    """Sixteen digits of the token's hash, and two that catch a wrong or swapped digit (mod 97, as in an IBAN)."""
    body = int(sha256(token.encode()).hexdigest(), 16) % 10**16
    return f"{body:016}{98 - body * 100 % 97:02}"


def _draw(token: str, number: str, to: dict[str, str]) -> str:
    """The label as SVG, 4 by 3 inches."""
    town = f"{to.get('postalCode', '')} {to.get('city', '')}".strip()
    lines = [to.get("name"), to.get("line1"), to.get("line2"), town, to.get("country"), f"Order {token}", number]
    rows = enumerate(filter(None, lines), start=1)
    text = "".join(f'<text x="20" y="{18 * row}">{escape(line)}</text>' for row, line in rows)
    look = 'width="4in" height="3in" viewBox="0 0 300 225" font-family="monospace" font-size="11"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {look}>{text}</svg>\n'
