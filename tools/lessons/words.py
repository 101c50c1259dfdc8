"""Words for a terminal: `. docs/lessons/words` makes them. Each sends what it says to the API, and says the answer.

order CUSTOMER SKU QUANTITY [--price P] [--city C] [--key K]      place an order, and remember it
show                                                              what happened to it
cancel | redrive                                                  what the API has calls for
stock SKU [UNITS]                                                 what is free to sell
buyers NUMBER SKU                                                 so many orders at once, and what became of them
guess LESSON WORDS                                                write it down
"""

import argparse
import http.client
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tools import client
from tools.demo import seconds
from tools.lessons import KEY, data, url


def order(customer: str, sku: str, quantity: int, price: float, city: str, key: str) -> None:
    body = client.order(customer, sku, quantity, city)
    body["items"][0]["price"] = price
    status, stored, _ = connect().call("POST", "/orders", body, **({"Idempotency_Key": key} if key else {}))
    with_key = f" (Idempotency-Key: {key})" if key else ""
    print(f"POST /orders, {quantity} x {sku} for {customer}{with_key}  ->  {status} {name(stored) or reason(stored)}")
    if status == 201:
        last().write_text(stored["id"])


def show() -> None:
    shown = connect().call("GET", f"/orders/{last().read_text()}").body
    print(f"{name(shown)} is {shown['status']}" + "".join(
        f"; {what}: {', '.join(shown[what])}" for what in ("parked", "outbox") if what in shown
    ))  # fmt: skip
    began = seconds(shown["createdAt"])
    for line in shown["timeline"]:
        print(f"{1000 * (seconds(line['at']) - began):8.0f} ms  {line['by']:<10} {told(line)}")


def told(line: dict[str, Any]) -> str:
    """A line of a timeline, in words."""
    if "event" in line:
        return line["event"]
    if "done" in line:
        return f"done with {line['done']}"
    if "sent" in line:
        return f"sent {line['sent']} again, to {line['to']}"
    what = next(each for each in ("failed", "parked", "lost") if each in line)
    return f"{line[what]} {what}" + (f", try {line['try']}: {line['error']}" if "try" in line else "")


def cancel() -> None:
    act("cancel")


def redrive() -> None:
    act("redrive")


def act(verb: str) -> None:
    status, shown, _ = connect().call("POST", f"/orders/{last().read_text()}/{verb}")
    print(f"POST /orders/<id>/{verb}  ->  {status} {shown.get('status', '') if status == 200 else reason(shown)}")


def stock(sku: str, units: int | None) -> None:
    if units is None:
        method, body = "GET", None
    else:
        method, body = "PUT", {"available": units}
    status, shown, _ = connect().call(method, f"/stock/{sku}", body)
    print(f"{method} /stock/{sku}  ->  {status} {shown.get('available', '') if status < 300 else reason(shown)}")


def buyers(number: int, sku: str) -> None:
    def buy(n: int) -> str:
        return connect().call("POST", "/orders", client.order("buyer", sku)).body["id"]

    with ThreadPoolExecutor(number) as pool:
        ids = list(pool.map(buy, range(number)))
    print(f"POST /orders, {number} times at once  ->  {len(set(ids))} orders")
    api, until = connect(), time.monotonic() + 60
    while (counts := Counter(api.call("GET", f"/orders/{id}").body["status"] for id in ids))["pending"]:
        if time.monotonic() > until:
            break
        time.sleep(0.2)
    print(", ".join(f"{count} {status}" for status, count in sorted(counts.items(), reverse=True)))


def guess(lesson: int, words: str) -> None:
    (data() / f"lessons/guess-{lesson}").write_text(words + "\n")
    print(f"noted for lesson {lesson}: {words}")


def connect() -> client.Client:
    return client.Client(url(), KEY)


def last() -> Any:
    """The file that has the id of the order placed last."""
    return data() / "lessons/order"


def name(shown: dict[str, Any]) -> str:
    """An order's name: the page calls it so too."""
    return f"order {shown['id'][-6:]}" if "id" in shown else ""


def reason(shown: dict[str, Any]) -> str:
    """Why the API refused, in its own words."""
    faults = [f"{fault['pointer']} {fault['message']}" for fault in shown.get("errors", [])]
    return "; ".join(faults) or shown.get("detail", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = parser.add_subparsers(dest="word", required=True)
    new = words.add_parser("order")
    for argument, kind in (("customer", str), ("sku", str), ("quantity", int)):
        new.add_argument(argument, type=kind)
    for option, kind, default in (("--price", float, 19.99), ("--city", str, ""), ("--key", str, "")):
        new.add_argument(option, type=kind, default=default)
    for word in ("show", "cancel", "redrive"):
        words.add_parser(word)
    shelf = words.add_parser("stock")
    shelf.add_argument("sku")
    shelf.add_argument("units", type=int, nargs="?")
    many = words.add_parser("buyers")
    many.add_argument("number", type=int)
    many.add_argument("sku")
    note = words.add_parser("guess")
    note.add_argument("lesson", type=int)
    note.add_argument("words")
    args = vars(parser.parse_args())
    try:
        globals()[args.pop("word")](**args)
    except FileNotFoundError:
        sys.exit("there is no order yet: place one with the word order")
    except (OSError, http.client.HTTPException):
        sys.exit(f"nobody answers at {url()}: does the program run?")


if __name__ == "__main__":
    main()
