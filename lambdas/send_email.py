"""Sends one mail about an order: to SMTP_URL, or on AWS by SES, or into the Maildir DATA_DIR/mail."""

import os
import smtplib
import ssl
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import default
from email.utils import formatdate
from functools import partial
from html import escape
from urllib.parse import unquote, urlsplit

from lambdas import tokens

TEMPLATES = {
    "order_confirmed": ("Your order is on its way", "Thank you. Your order is packed and handed to the carrier."),
    "order_failed": ("We could not fulfil your order", "We are sorry: your order did not go through."),
    "order_cancelled": ("Your order is cancelled", "Your order is cancelled, and nothing will be sent."),
}
ADDRESS = ("name", "line1", "line2", "city", "postalCode", "country")


def handler(event: dict, context: object) -> dict:
    token, order = tokens.safe("token", event["token"]), event["order"]
    subject, opening = TEMPLATES[event["template"]]
    message = EmailMessage(policy=default.clone(cte_type="7bit"))  # not every server takes eight bits
    message["Message-ID"] = f"<{token}@orderproc>"
    message["X-Order-Id"] = tokens.safe("order id", order["id"])
    message["Subject"] = f"{subject} ({order['id']})"
    message["Date"] = formatdate()
    message["From"] = os.environ.get("MAIL_FROM") or "orders@example.com"
    message["To"] = _address(event["to"])
    facts = _facts(order)
    message.set_content("\n".join([opening, "", *(f"{name}: {value}" for name, value in facts)]))
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in facts)
    message.add_alternative(f"<p>{opening}</p><table>{rows}</table>", subtype="html")
    return {"messageId": message["Message-ID"], "duplicate": not _deliver(token, message)}


def _address(text: str) -> Address:
    """One mailbox; ValueError for a line end, comma or bracket that could add a header or a recipient."""
    name, domain = tokens.safe("to", text, r"[\w.!#$%&'*+/=?^`{|}~-]+@[\w.-]+", "one plain mail address").split("@")
    return Address(username=name, domain=domain.encode("idna").decode())


def _facts(order: dict) -> list[tuple[str, str]]:
    """What there is to tell, name and value, either of them anybody's text."""
    money, ship, to = order["currency"], order.get("shipment") or {}, order.get("shippingAddress") or {}
    facts = [(item["sku"], f"{item['quantity']} x {item['price']} {money}") for item in order["items"]]
    facts += [("Total", f"{order['total']} {money}"), ("Reason", order.get("failureReason", "").replace("_", " "))]
    facts += [("Carrier", ship.get("carrier", "")), ("Tracking number", ship.get("trackingNumber", ""))]
    where = ", ".join(to[part] for part in ADDRESS if part in to)
    return [(name, value) for name, value in [*facts, ("Ship to", where)] if value]


def _deliver(token: str, message: EmailMessage) -> bool:
    """Hand the mail over unless that was done before; True if this call was the first."""
    url, sent, file = os.environ.get("SMTP_URL"), f"sent/{token}", f"{token}.orderproc"
    if not url and "AWS_LAMBDA_FUNCTION_NAME" not in os.environ:
        (seen := tokens.path("mail/cur")).mkdir(parents=True, exist_ok=True)  # where a reader moves what it has read
        return not any(seen.glob(f"{file}*")) and tokens.put_file(f"mail/new/{file}", message.as_string())
    if tokens.has(sent):
        return False
    if url:
        _smtp(url, message)
    else:
        tokens.client("sesv2").send_email(Content={"Raw": {"Data": message.as_bytes()}})  # sets its own Message-ID
    return tokens.put(sent, "sent")  # only now: whoever dies before this line sends twice, but no mail is lost


def _smtp(url: str, message: EmailMessage) -> None:
    at = urlsplit(url)
    connect = partial(smtplib.SMTP_SSL, context=ssl.create_default_context()) if at.scheme == "smtps" else smtplib.SMTP
    with connect(at.hostname or "", at.port or 0, timeout=10) as server:
        if at.username:
            server.login(unquote(at.username), unquote(at.password or ""))
        server.send_message(message)
