"""Log lines, metrics and the health routes."""

import contextvars
import io
import json
import logging
import socket
import threading
from types import SimpleNamespace

import bottle
import pytest

from core.base import metrics
from core.base.logs import Lines, context, set_up_logging
from core.base.settings import SettingInvalid, load
from core.http import serving
from core.running.health import add_health, serve_health


def written(as_json: bool, message: str = "sent", error: Exception | None = None, **extra) -> str:
    record = logging.makeLogRecord({"name": "core.bus", "levelname": "INFO", "msg": message, **extra})
    if error:
        record.exc_info = (type(error), error, error.__traceback__)
    return Lines(as_json).format(record)


def test_a_line_for_machines_is_one_json_object():
    with context(order="0193", trace="4bf9"):
        line = json.loads(written(True, "sent", queue="orders.email"))
    assert line.pop("at").endswith("Z")
    assert line.pop("level") == "INFO"
    assert line == {
        "logger": "core.bus", "message": "sent", "order": "0193", "trace": "4bf9", "queue": "orders.email"
    }  # fmt: skip


def test_a_line_for_people_has_the_fields_behind_the_message():
    with context(order="0193"):
        assert written(False, "sent", queue="orders.email").endswith("INFO    sent order=0193 queue=orders.email")


def test_what_json_cannot_hold_is_written_as_text():
    assert "Decimal" in written(True, number=__import__("decimal").Decimal)


def test_a_stack_stays_inside_its_one_line_of_json():
    line = written(True, "stumbled", ValueError("two\nlines"))
    assert "\n" not in line and "two\nlines" in json.loads(line)["stack"]


def test_a_stack_comes_below_a_line_for_people():
    assert written(False, "stumbled", ValueError("why")).splitlines()[-1] == "ValueError: why"


def test_a_context_ends_with_its_block_even_after_an_error():
    with pytest.raises(ValueError), context(order="outer"), context(order="inner", event="e"):
        raise ValueError
    assert "order" not in json.loads(written(True))


def test_logging_is_json_on_standard_error_without_a_terminal(monkeypatch):
    root, output = logging.getLogger(), io.StringIO()
    before = root.handlers[:], root.level
    monkeypatch.setattr("sys.stderr", output)
    try:
        set_up_logging("info", "")
        logging.getLogger("core.bus").info("hello")
        logging.getLogger("core.bus").debug("not this")
        logging.getLogger("urllib3").info("nor this")
    finally:
        root.handlers[:], root.level = before
    assert [json.loads(line)["message"] for line in output.getvalue().splitlines()] == ["hello"]


# --- health


def call(path: str, store: bool = True, broker: bool = True, needs_broker: bool = True) -> tuple[int, str, bytes]:
    app, answer = bottle.Bottle(), {}
    add_health(app, SimpleNamespace(ping=lambda: store), lambda: broker, needs_broker)
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "wsgi.input": io.BytesIO(), "wsgi.errors": io.StringIO()}
    body = b"".join(app(environ, lambda status, headers, _: answer.update(status=status, headers=dict(headers))))
    return int(answer["status"][:3]), answer["headers"]["Content-Type"], body


def test_healthz_asks_nobody():
    assert call("/healthz", store=False, broker=False)[0] == 200


@pytest.mark.parametrize(
    ("store", "broker", "needs_broker", "ready"),
    [
        (True, True, True, True), (True, True, False, True), (True, False, False, True), (True, False, True, False),
        (False, True, False, False), (False, True, True, False), (False, False, False, False),
        (False, False, True, False),
    ],
)  # fmt: skip
def test_readyz_is_503_while_what_is_needed_is_missing(store, broker, needs_broker, ready):
    status, _, body = call("/readyz", store, broker, needs_broker)
    words = {True: "up", False: "down"}
    assert status == (200 if ready else 503)
    assert json.loads(body) == {"ready": ready, "store": words[store], "broker": words[broker]}


def test_without_a_port_of_their_own_no_server_starts():
    before = threading.active_count()
    serve_health(load({}), "API_METRICS_PORT", SimpleNamespace(ping=lambda: True), lambda: True, needs_broker=False)
    assert threading.active_count() == before


@pytest.mark.parametrize("variable", ["API_METRICS_PORT", "METRICS_PORT"])
def test_a_health_port_in_use_is_named(variable):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = load({variable: str(taken.getsockname()[1])})
        with pytest.raises(SettingInvalid, match=f"^{variable}: cannot listen on 127.0.0.1"):
            serve_health(settings, variable, SimpleNamespace(ping=lambda: True), lambda: True, needs_broker=False)


def test_a_request_knows_how_long_it_waited():
    seen = []
    waiting = serving.Queued(SimpleNamespace(service=lambda: seen.append(serving.seconds_waited()), cancel=None))
    waiting._since -= 1.5
    contextvars.copy_context().run(waiting.service)
    assert 1.5 <= seen[0] < 2.5 and serving.seconds_waited() == 0, "outside of a request nobody waits"


def test_metrics_are_prometheus_text_with_the_names_of_the_design():
    metrics.ORDERS.labels("pending").inc()
    status, kind, body = call("/metrics")
    assert status == 200 and kind.startswith("text/plain")
    names = {line.split()[2] for line in body.decode().splitlines() if line.startswith("# TYPE orderproc_")}
    assert {
        "orderproc_http_request_seconds", "orderproc_orders_total", "orderproc_events_total", "orderproc_outbox_events",
        "orderproc_outbox_oldest_seconds", "orderproc_deliveries_total", "orderproc_handler_seconds",
        "orderproc_dead_messages", "orderproc_batch_size", "orderproc_store_commands_total",
        "orderproc_sweep_resent_total", "orderproc_request_queue_seconds", "orderproc_shed_total",
    } <= names  # fmt: skip
    assert 'orderproc_orders_total{status="pending"}' in body.decode()
