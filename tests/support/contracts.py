"""The contracts, as far as other files say what is in them. `python -m tests.support.contracts` writes them.

`openapi.json` is written by hand, but for the schemas that it has from `schemas/`. `asyncapi.json` follows from the
schemas of the events, from the handlers and from the topology of RabbitMQ as a whole.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.bus.topology import EXCHANGE, main_queue, queues_of, retry_queue
from core.order.view import SHOWN
from core.running import discovery

ROOT = Path(__file__).parents[2]
COLUMNS = 120
BINDING = {"bindingVersion": "0.3.0"}
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
DATA = {  # of the examples, beside the order
    "order_confirmed": {"shipment": {"carrier": "demo", "trackingNumber": "T-0001"}},
    "order_failed": {"reason": "out_of_stock"},
}


def main() -> None:
    """Write both files."""
    for name, contract in (("openapi.json", openapi()), ("asyncapi.json", asyncapi())):
        (ROOT / name).write_text(as_text(contract) + "\n")


def read(name: str) -> Any:
    """A JSON file of the repository."""
    return json.loads((ROOT / name).read_text())


def as_text(value: Any, indent: int = 0, before: int = 0) -> str:
    """JSON with as much on a line as it holds; `before`: the columns of the line that are taken."""
    line = json.dumps(value, ensure_ascii=False)
    if not value or not isinstance(value, dict | list) or indent + before + len(line) < COLUMNS:
        return line
    named = value.items() if isinstance(value, dict) else (("", each) for each in value)
    parts = []
    for name, each in named:
        key = f"{json.dumps(name)}: " if isinstance(value, dict) else ""
        parts.append(" " * (indent + 2) + key + as_text(each, indent + 2, len(key)))
    return line[0] + "\n" + ",\n".join(parts) + "\n" + " " * indent + line[-1]


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object in a value, itself included."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects(part)


def event_types() -> list[str]:
    """Every event type that has a schema."""
    return sorted(path.stem for path in (ROOT / "schemas/events").glob("*.json"))


# --- openapi.json


def openapi() -> dict[str, Any]:
    """The file as it is, with the schemas that are files of their own put in."""
    spec = read("openapi.json")
    schemas = spec["components"]["schemas"]
    schemas |= {"NewOrder": read("schemas/order.json"), "SetStock": read("schemas/stock.json")}
    schemas["StoredEvent"]["properties"] |= attributes()
    return spec


def attributes() -> dict[str, Any]:
    """The attributes of an event's envelope that are the same whatever its type."""
    every = [read(f"schemas/events/{type}.json")["properties"] for type in event_types()]
    return {name: schema for name, schema in every[0].items() if all(schema == each.get(name) for each in every)}


# --- asyncapi.json


def asyncapi() -> dict[str, Any]:
    """What travels through RabbitMQ, and how. AsyncAPI knows no arguments of a queue: they are in `x-arguments`."""
    handlers = discovery.discover(ROOT / "handlers")
    channels = {type: by_routing_key(type) for type in event_types()}
    for name, takes in handlers.items():
        channels |= queues(name, sorted(takes))
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "orderproc events",
            "version": "1.1.0",
            "description": "What happened to orders, as CloudEvents 1.0 in structured JSON. Each event is published, "
            "persistent, to the topic exchange `orders`, its type the routing key, its id the message_id. It may come "
            "more than once, with the same id, and out of order. To take events in another program, bind a queue of "
            "your own to the exchange. How orders are placed is in openapi.json.",
            "license": {"name": "MIT"},
        },
        "defaultContentType": "application/cloudevents+json",
        "channels": channels,
        "operations": {
            **{f"{type}_is_sent": operation("send", type, deliveryMode=2) for type in event_types()},
            **{f"{name}_receives": operation("receive", main_queue(name), ack=True) for name in handlers},
        },
        "components": {
            "messages": {type: message(type) for type in event_types()},
            "schemas": {type: read(f"schemas/events/{type}.json") for type in event_types()},
        },
    }


def by_routing_key(type: str) -> dict[str, Any]:
    """The exchange, for what is published with an event type as its routing key."""
    exchange = {"name": EXCHANGE, "type": "topic", "durable": True, "autoDelete": False}
    return channel(type, [type], {"is": "routingKey", "exchange": exchange})


def queues(handler: str, takes: list[str]) -> dict[str, Any]:
    """A handler's queues: where its events arrive, where a failed one waits for its next try, the dead letters."""
    retry = retry_queue(handler, 0)
    arguments = queues_of(handler, [0])
    del arguments[retry]["x-message-ttl"]
    arguments[retry.removesuffix("0") + "{seconds}"] = arguments.pop(retry)
    return {name: channel(name, takes, queue_binding(name, arguments[name])) for name in sorted(arguments)}


def queue_binding(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A quorum queue, as AMQP declares it."""
    queue = {"name": name, "durable": True, "exclusive": False, "autoDelete": False}
    return {"is": "queue", "queue": queue, "x-arguments": arguments}


def channel(address: str, types: list[str], binding: dict[str, Any]) -> dict[str, Any]:
    """Where events of these types pass."""
    seconds = {
        "seconds": {"description": "One of RETRY_DELAYS. The queue's x-message-ttl is the same in milliseconds."}
    }
    return {
        "address": address,
        "messages": {type: {"$ref": f"#/components/messages/{type}"} for type in types},
        **({"parameters": seconds} if "{" in address else {}),
        "bindings": {"amqp": binding | BINDING},
    }


def operation(action: str, channel: str, **binding: Any) -> dict[str, Any]:
    """What the program does with a channel."""
    return {"action": action, "channel": {"$ref": f"#/channels/{channel}"}, "bindings": {"amqp": binding | BINDING}}


def message(type: str) -> dict[str, Any]:
    """An event, as it travels."""
    schema = read(f"schemas/events/{type}.json")
    return {
        "name": type,
        "title": schema["title"],
        "summary": schema["description"],
        "correlationId": {"location": "$message.payload#/subject", "description": "the order's id"},
        "bindings": {"amqp": {"messageType": type} | BINDING},
        "payload": {"$ref": f"#/components/schemas/{type}"},
        "examples": [{"payload": example(type, schema["properties"])}],
    }


def example(type: str, properties: dict[str, Any]) -> dict[str, Any]:
    """An event of an order that openapi.json has as an example."""
    order = read("openapi.json")["components"]["examples"]["Pending"]["value"]
    status, source = properties["orderstatus"], properties["source"]
    shown = {name: order[name] for name in SHOWN[: SHOWN.index("parked")] if name in order}
    return {
        "specversion": "1.0",
        "id": order["timeline"][0]["id"],
        "source": source.get("const", "/orderproc/handlers/inventory"),
        "type": type,
        "subject": order["id"],
        "time": order["createdAt"],
        "datacontenttype": "application/json",
        "orderstatus": status.get("const", "pending"),
        "traceparent": TRACE,
        "data": {"order": shown | {"status": status.get("const", "pending")}, **DATA.get(type, {})},
    }


if __name__ == "__main__":
    main()
