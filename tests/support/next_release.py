"""A release that does not exist yet: today's program with the changes a next one may make, as small as they come."""

import json
import shutil
import sys
from pathlib import Path

from tools.chaos.system import ROOT, System

POINTS = '''"""Thank loyal customers: a handler, and an event type, that only this release knows."""

from core.events import Event


def order_confirmed(event, services):
    service = event.data["shipment"].get("service", "standard")
    services.log.info("confirmed", extra={"service": service, "release": event.release})
    return Event("points_awarded", points=int(event.order["total"]))


def points_awarded(event, services):
    services.log.info("awarded", extra={"points": event.data["points"]})
'''
SOLD = """


def order_confirmed(event, services):
    services.log.info("sold")
"""
PARSED = 'return make_event(envelope["type"], envelope["data"], traceparent=trace, **attributes)'
EDITS = {  # file: what is there, what it becomes
    "core/order/events.py": [  # an attribute of the envelope; events of today's release have none
        ('self.traceparent = ""', 'self.traceparent = ""\n        self.release = "next"'),
        ('"traceparent": self.traceparent,', '"traceparent": self.traceparent, "release": self.release,'),
        (PARSED, PARSED.replace("return", "event =") + """
    event.release = envelope.get("release", "")
    return event"""),
    ],
    "core/order/view.py": [('"shipment",', '"shipment", "greeting",')],  # an order's field
    "handlers/inventory.py": [("order_cancelled = order_failed", f"order_cancelled = order_failed{SOLD}")],  # one more
    "handlers/shipping.py": [  # a field of an event
        ('"trackingNumber": label["trackingNumber"]', '"trackingNumber": label["trackingNumber"], "service": "express"')
    ],
}  # fmt: skip


def make_next_release(folder: Path) -> Path:
    """Copy the program into `folder` and change it; gives the folder."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "tests", "tools", "docs", "data"))
    for name, edits in EDITS.items():
        text = (folder / name).read_text()
        for there, instead in edits:
            assert text.count(there) == 1, f"{name} has changed: {there}"
            text = text.replace(there, instead)
        (folder / name).write_text(text)
    (folder / "handlers/points.py").write_text(POINTS)
    _change_schemas(folder / "schemas")
    return folder


def _change_schemas(folder: Path) -> None:
    text = {"type": "string", "maxLength": 200, "description": "must be at most 200 characters"}
    order = json.loads((folder / "order.json").read_text())
    order["properties"]["greeting"] = text
    (folder / "order.json").write_text(json.dumps(order))
    schemas = {path: json.loads(path.read_text()) for path in (folder / "events").glob("*.json")}
    for path, schema in schemas.items():
        data = schema["properties"]["data"]["properties"]
        schema["properties"]["release"] = data["order"]["properties"]["greeting"] = text
        if path.stem == "order_confirmed":
            data["shipment"]["properties"]["service"] = text
            path.with_stem("points_awarded").write_text(json.dumps(_points_awarded(schema)))
        path.write_text(json.dumps(schema))


def _points_awarded(confirmed: dict) -> dict:
    data = {"required": ["order", "points"], "properties": {"points": {"type": "integer"}}}
    data["properties"]["order"] = confirmed["properties"]["data"]["properties"]["order"]
    properties = confirmed["properties"] | {"type": {"const": "points_awarded"}, "data": {"type": "object", **data}}
    return confirmed | {"$id": "urn:orderproc:event:points_awarded", "properties": properties}


class Beside(System):
    """API and consumer of another release, on the store, broker, functions, mails and labels of a system that runs."""

    def __init__(self, folder: Path, program: Path, other: System) -> None:
        super().__init__(folder, other.mongodb_url, other.environment["AMQP_URL"])
        for name in ("DATA_DIR", "AWS_ENDPOINT_URL_LAMBDA"):
            self.environment[name] = other.environment[name]
        (folder / "data").symlink_to(other.folder / "data")
        scripts = {"api": "orderproc.py", "consumer": "consumer.py"}
        self.commands = {name: [sys.executable, str(program / script)] for name, script in scripts.items()}

    def order(self, n: int = 0, sku: str = "A1", quantity: int = 1) -> dict:
        return super().order(n, sku, quantity) | {"greeting": "a present"}
