"""A client of the API for tools that only need it: the standard library, one connection, JSON in and out."""

import http.client
import json
from typing import Any, NamedTuple
from urllib.parse import urlsplit


class Answer(NamedTuple):
    """Of one request; the body is empty where it was no JSON object, the entity tag where there is none."""

    status: int
    body: dict[str, Any]
    etag: str


class Client:
    """One client, for one thread. Raises OSError or HTTPException where no answer comes; the next call tries anew."""

    def __init__(self, url: str, key: str) -> None:
        self._address = urlsplit(url).netloc
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self._connection = http.client.HTTPConnection(self._address, timeout=20)

    def call(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        """Send one request and read its answer."""
        sent = self._headers | {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            self._connection.request(method, path, None if body is None else json.dumps(body), sent)
            response = self._connection.getresponse()
            text = response.read()
        except BaseException:
            self.close()
            raise
        return Answer(response.status, json.loads(text) if text[:1] == b"{" else {}, response.getheader("ETag", ""))

    def close(self) -> None:
        """Close the connection; a later call makes a new one."""
        self._connection.close()


def order(customer: str, sku: str = "A1", quantity: int = 1, city: str = "") -> dict[str, Any]:
    """The body of an order; with a city it is shipped there."""
    body: dict[str, Any] = {
        "customerId": customer, "email": f"{customer}@example.com",
        "items": [{"sku": sku, "quantity": quantity, "price": 19.99}],
    }  # fmt: skip
    if city:
        to = {"name": customer.title(), "line1": "1 Main Street", "city": city, "postalCode": "12345", "country": "US"}
        body["shippingAddress"] = to
    return body
