"""What a handler is given beside the event: stock moves, Lambda functions, a log."""

import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from core.base.settings import SettingInvalid
from core.order.state_machine import Move, OrderDocument, holdings
from core.store.connection import StoreUnavailable
from core.store.moves import Moves


class StockInDoubt(Exception):
    """Units that others hold in pending moves may come back: not to be decided now. The step is run again each second
    until it is, which the sweep sees to; that spends no try.
    """


class FunctionFailed(Exception):
    """A Lambda function answered with an error of its own."""


class StockMoves:
    """`services.stock`: the stock moves of one attempt, pending until the order records the attempt."""

    def __init__(self, moves: Moves, order: OrderDocument, attempt: str) -> None:
        self._pending, self._order, self._in_doubt = moves, order, False
        self._moves: dict[str, dict[str, int]] = {}  # id -> {sku: units}, negative where given back
        self._ids = (f"{attempt}.{number}" for number in itertools.count())  # no id twice, also not a rolled-back one
        self._outcome_unknown = False

    def take(self, items: list[dict[str, Any]]) -> dict[str, str]:
        """Hold all lines or none; gives {sku: "unknown_sku" or "out_of_stock"} of what is short; empty: held."""
        lines: Counter[str] = Counter()
        for item in items:
            lines[item["sku"]] += int(item["quantity"])
        move, short = self._begin(self._pending.take, lines)
        if short:
            self._ask(self._pending.roll_back, move, self._moves.pop(move))
        if "in_doubt" in short.values():
            self._in_doubt = True
            raise StockInDoubt("units that others hold in pending moves may come back")
        return short

    def give_back(self) -> None:
        """Return what the order's recorded steps hold; nothing if they hold nothing."""
        held = holdings(self._order)
        if held and not any(move["quantity"] < 0 for move in self.made()):  # asked twice, it gives once
            self._begin(self._pending.give_back, {sku: -units for sku, units in held.items()})

    def _begin(self, verb: Callable[..., Any], lines: dict[str, int]) -> tuple[str, Any]:
        move = next(self._ids)
        self._moves[move] = lines
        return move, self._ask(verb, move, self._order["_id"], lines)

    def _ask(self, verb: Callable[..., Any], *args: Any) -> Any:
        try:
            return verb(*args)
        except Exception:
            self._outcome_unknown = True
            raise

    def made(self) -> list[Move]:
        """What the order is to record. Raises StoreUnavailable where nobody knows, StockInDoubt where it is open."""
        if self._outcome_unknown:  # a handler may have swallowed it
            raise StoreUnavailable("whether a stock move was made is not known")
        if self._in_doubt:
            raise StockInDoubt("a shortage is not decided yet")
        moves = self._moves.items()
        return [Move(move=move, sku=sku, quantity=units) for move, lines in moves for sku, units in lines.items()]

    def commit(self) -> None:
        """The order recorded the attempt: the moves are final."""
        for move, lines in self._moves.items():
            self._pending.commit(move, lines)

    def roll_back(self) -> None:
        """The order will never record the attempt: undo its moves."""
        for move, lines in self._moves.items():
            self._pending.roll_back(move, lines)


class Functions:
    """Lambda functions, through boto3's client or anything with its `invoke`.

    `names` maps what handlers call them to what they are deployed as.
    """

    def __init__(self, client: Any, **names: str) -> None:
        self._client, self._names = client, names

    def invoke(self, function: str, payload: dict[str, Any]) -> Any:
        """The function's parsed answer. Raises FunctionFailed, or what the client raises."""
        name, body = self._names.get(function, function), json.dumps(payload).encode()
        response = self._client.invoke(FunctionName=name, Payload=body)
        result = json.loads(response["Payload"].read() or b"null")
        if "FunctionError" in response:  # the status is 200 all the same
            raise FunctionFailed(f"{function}: {(result or {}).get('errorType', response['FunctionError'])}")
        return result


def lambda_client(connections: int) -> Any:
    """AWS Lambda through boto3, as its own variables say. Raises SettingInvalid."""
    import boto3  # here, because importing it takes longer than everything else together
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    # One attempt: retrying is the queue's business, and boto3's own retries run a slow function three times.
    once: Any = {"retries": {"total_max_attempts": 1}, "max_pool_connections": connections}
    try:
        return boto3.client("lambda", config=Config(**once, connect_timeout=3, read_timeout=30))
    except BotoCoreError as error:
        raise SettingInvalid(f"AWS_*: {error}") from None


class Services:
    """`stock`, `invoke` and `log`, for one attempt."""

    def __init__(self, stock: StockMoves, functions: Functions, traceparent: str, log: logging.Logger) -> None:
        self.stock, self._functions, self._traceparent, self.log = stock, functions, traceparent, log

    def invoke(self, function: str, payload: dict[str, Any]) -> Any:
        """Call a Lambda function and give its parsed answer; raises where it fails."""
        return self._functions.invoke(function, {**payload, "traceparent": self._traceparent})
