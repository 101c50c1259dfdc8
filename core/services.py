"""What a handler is given beside the event: stock moves, Lambda functions, a log."""

import json
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from core.settings import BadSetting
from core.stock import Stock
from core.store import Document, StoreAway, holdings


class TryAgain(Exception):
    """Not to be decided now; the step is tried again later."""


class FunctionFailed(Exception):
    """A Lambda function answered with an error of its own."""


class StockMoves:
    """The stock moves of one attempt at one step: provisional until the order records the attempt."""

    def __init__(self, stock: Stock, order: Document, attempt: str, last_try: bool) -> None:
        self._stock, self._order, self._attempt, self._last_try = stock, order, attempt, last_try
        self._notes: dict[str, dict[str, int]] = {}
        self._unsure = 0  # notes of which nobody knows whether they are there

    def take(self, items: list[dict[str, Any]]) -> dict[str, str]:
        """Hold all lines or none; gives {sku: "unknown_sku" or "out_of_stock"} of what is short; empty: held."""
        lines: Counter[str] = Counter()
        for item in items:
            lines[item["sku"]] += int(item["quantity"])
        note = self._note(lines)
        short = self._stock.take(note, self._order["_id"], lines)
        if short:
            self._stock.revert(note, self._notes.pop(note))
        self._unsure -= 1
        if "in_doubt" in short.values() and not self._last_try:
            raise TryAgain("units that others hold provisionally may come back")
        return {sku: reason.replace("in_doubt", "out_of_stock") for sku, reason in short.items()}

    def give_back(self) -> None:
        """Return what the order's recorded steps hold; nothing if they hold nothing."""
        held = holdings(self._order)
        if held and not any(move["quantity"] < 0 for move in self.moves()):  # asked twice, it gives once
            note = self._note({sku: -units for sku, units in held.items()})
            self._stock.give(note, self._order["_id"], held)
            self._unsure -= 1

    def _note(self, moves: dict[str, int]) -> str:
        self._unsure += 1
        note = f"{self._attempt}.{len(self._notes)}"
        self._notes[note] = moves
        return note

    def moves(self) -> list[Document]:
        """What the order is to record: units held, negative where given back. Raises StoreAway where nobody knows."""
        if self._unsure:  # a handler may have swallowed it
            raise StoreAway("whether a stock move was made is not known")
        noted = self._notes.items()
        return [{"note": note, "sku": sku, "quantity": n} for note, lines in noted for sku, n in lines.items()]

    def settle(self) -> None:
        """The order recorded the attempt: the moves are final."""
        for note, lines in self._notes.items():
            self._stock.settle(note, lines)

    def revert(self) -> None:
        """The order will never record the attempt: undo it."""
        for note, lines in self._notes.items():
            self._stock.revert(note, lines)


class Functions:
    """Lambda functions, called through boto3. `names` maps what handlers call them to what they are deployed as."""

    def __init__(self, names: Mapping[str, str], connections: int, **client: Any) -> None:
        import boto3  # here, because importing it takes longer than everything else together
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        # One attempt: retrying is the queue's business, and boto3's own retries run a slow function three times.
        once: Any = {"retries": {"total_max_attempts": 1}, "max_pool_connections": connections}
        config = Config(**once, connect_timeout=3, read_timeout=30)
        try:
            self._client, self._names = boto3.client("lambda", config=config, **client), names
        except BotoCoreError as error:
            raise BadSetting(f"AWS_*: {error}") from None

    def invoke(self, function: str, payload: dict[str, Any]) -> Any:
        """The function's parsed answer. Raises FunctionFailed, or what boto3 raises."""
        body = json.dumps(payload).encode()
        answer = self._client.invoke(FunctionName=self._names.get(function, function), Payload=body)
        result = json.loads(answer["Payload"].read() or b"null")
        if "FunctionError" in answer:  # the status is 200 all the same
            raise FunctionFailed(f"{function}: {(result or {}).get('errorType', answer['FunctionError'])}")
        return result


class Services:
    """`stock`, `invoke` and `log`, for one attempt."""

    def __init__(self, stock: StockMoves, functions: Any, traceparent: str, log: logging.Logger) -> None:
        self.stock, self._functions, self._traceparent, self.log = stock, functions, traceparent, log

    def invoke(self, function: str, payload: dict[str, Any]) -> Any:
        """Call a Lambda function and give its parsed answer; raises where it fails."""
        return self._functions.invoke(function, {**payload, "traceparent": self._traceparent})
