"""The examples: each is a whole folder of handlers, small, and does what it says; against fakes and a real receiver."""

import base64
import hmac
import importlib.util
import json
import os
from types import SimpleNamespace
from urllib.error import HTTPError

import pytest

from core.base.settings import ROOT
from core.order.answers import check_answers
from core.order.events import Event, EventInvalid
from core.order.schemas import event_schemas
from core.running.discovery import HandlerInvalid, discover, subscribers_of
from tests.fakes import ORDER, event, services
from tests.support.code_size import lines_of_code
from tests.support.servers import Receiver

EXAMPLES = ROOT / "examples"
FOLDERS = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir() and not path.name.startswith("_"))
SECRET = base64.b64encode(b"a secret of the receiver's own").decode()
OWN = [path for path in sorted(EXAMPLES.rglob("*.py")) if not path.is_symlink()]


@pytest.fixture
def handlers(monkeypatch):
    """A function that gives an example's handlers; the event types it brings along go with the test."""
    monkeypatch.setenv("WEBHOOK_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("WEBHOOK_SECRET", f"whsec_{SECRET}")
    known = dict(event_schemas())
    yield lambda name: discover(EXAMPLES / name)
    event_schemas().clear()
    event_schemas().update(known)


# --- all of them


def test_the_table_has_every_example():
    listed = [line.split("`")[1] for line in (EXAMPLES / "README.md").read_text().splitlines() if line[:3] == "| `"]
    assert sorted(listed) == sorted([*FOLDERS, "outside.py"]) and len(FOLDERS) == 6


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_the_whole_system(name, handlers):
    found = handlers(name)
    standard = discover(ROOT / "handlers")
    for each in standard:
        path = EXAMPLES / name / f"{each}.py"
        assert path.is_symlink() or (name, each) == ("payment", "shipping")
        assert path.resolve() == ROOT / "handlers" / path.name or not path.is_symlink()
    assert set(standard) < set(found)
    assert all(subscribers_of(found)[type] for type in subscribers_of(standard) if subscribers_of(standard)[type])


@pytest.mark.parametrize("name", [*FOLDERS, "outside.py"])
def test_an_example_is_at_most_40_lines_of_code(name):
    mine = [path for path in OWN if name in path.parts]
    assert 0 < sum(lines_of_code(path.read_text()) for path in mine) <= (20 if name == "outside.py" else 40)


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_of_what_is_ours_an_example_imports_core_events_only(path):
    ours = {"orderproc", "consumer", "core", "handlers", "lambdas", "tests", "tools"}
    lines = [line for line in path.read_text().splitlines() if line.split(" ")[0] in ("import", "from")]
    assert all(line.split()[1] == "core.events" for line in lines if line.split()[1].split(".")[0] in ours)


# --- points, flaky, slow, returns


def test_points_are_awarded(handlers, caplog):
    caplog.set_level("INFO")
    handlers("points")["points"]["order_confirmed"](event("order_confirmed"), services())
    assert caplog.records[-1].points == 39


def test_flaky_fails_twice_for_each_event_and_then_works(handlers):
    take = handlers("flaky")["flaky"]["order_confirmed"]
    for each in (event("order_confirmed"), event("order_confirmed")):
        for _ in range(2):
            with pytest.raises(ConnectionError):
                take(each, services())
        assert take(each, services()) is None


def test_slow_takes_as_long_as_it_is_told(handlers, monkeypatch):
    waits: list[float] = []
    take = handlers("slow")["slow"]["order_confirmed"]
    monkeypatch.setattr("time.sleep", waits.append)
    take(event("order_confirmed"), services())
    monkeypatch.setenv("SLOW_SECONDS", "0.5")
    take(event("order_confirmed"), services())
    assert waits == [3, 0.5]


def delivered(city: str) -> Event:
    shipment = {"carrier": "ACME", "trackingNumber": "123"}
    return event("order_confirmed", {"status": "processed", "shippingAddress": {"city": city}, "shipment": shipment})


def test_a_parcel_that_comes_back_is_announced_and_no_other(handlers):
    take, back = handlers("returns")["returns"]["order_confirmed"], delivered("Nowhere")
    [answer] = check_answers(back, "returns", take(back, services()))
    assert (answer.type, answer.data["trackingNumber"], answer.orderstatus) == ("parcel_returned", "123", "processed")
    assert take(delivered("Ulm"), services()) is None
    assert take(event("order_confirmed"), services()) is None


def test_a_parcel_that_comes_back_has_a_number(handlers):
    take, back = handlers("returns")["returns"]["order_confirmed"], delivered("Nowhere")
    back.order["shipment"]["trackingNumber"] = ""
    with pytest.raises(EventInvalid, match="trackingNumber', .must be the parcel's number"):
        check_answers(back, "returns", take(back, services()))


def test_what_came_back_is_for_sale_again(handlers):
    given = services(stock={"A1": 3}, holds={"A1": 2})
    handlers("returns")["returns"]["parcel_returned"](event("parcel_returned", trackingNumber="123"), given)
    assert given.stock.units == {"A1": 5}


# --- payment


@pytest.fixture
def payment(handlers, tmp_path, monkeypatch):
    """The handlers of that folder, and the notes of the provider that stands in."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    return SimpleNamespace(
        handlers=handlers("payment"), notes=lambda: sorted(path.suffix for path in tmp_path.glob("payments/*"))
    )


def test_a_payment_is_taken_once_and_announced(payment):
    take, reserved = payment.handlers["payment"]["inventory_reserved"], event("inventory_reserved")
    for _ in range(2):
        [answer] = check_answers(reserved, "payment", take(reserved, services()))
    assert (answer.type, answer.data["amount"]) == ("payment_taken", 39.98)
    assert payment.notes() == [".charge"]


def test_a_payment_above_the_limit_fails_the_order_and_takes_nothing(payment):
    answer = payment.handlers["payment"]["inventory_reserved"](event("inventory_reserved", {"total": 1000.01}), None)
    assert (answer.type, answer.data, payment.notes()) == ("order_failed", {"reason": "payment_refused"}, [])


@pytest.mark.parametrize("type", ["order_failed", "order_cancelled"])
def test_a_payment_is_given_back_once(payment, type):
    for _ in range(2):
        payment.handlers["payment"][type](event(type), services())
    assert payment.notes() == [".refund"]


def test_a_refund_that_comes_before_the_charge_stays(payment):
    payment.handlers["payment"]["order_cancelled"](event("order_cancelled"), services())
    payment.handlers["payment"]["inventory_reserved"](event("inventory_reserved"), services())
    assert payment.notes() == [".charge", ".refund"]


def test_shipping_waits_for_the_payment(payment):
    assert "inventory_reserved" not in payment.handlers["shipping"]
    given = services(answers={"make_label": {"carrier": "ACME", "trackingNumber": "1"}})
    assert payment.handlers["shipping"]["payment_taken"](event("payment_taken"), given).type == "order_confirmed"
    assert payment.handlers["shipping"]["order_failed"](event("order_failed"), given) is None
    assert [payload["action"] for _, payload in given.calls] == ["make", "void"]


# --- webhook


@pytest.mark.parametrize("type", ["order_confirmed", "order_failed", "order_cancelled"])
def test_a_webhook_is_signed_and_has_one_id_however_often_it_comes(handlers, monkeypatch, type):
    ended = event(type)
    with Receiver(503, 204) as receiver:
        monkeypatch.setenv("WEBHOOK_URL", receiver.url)
        post = handlers("webhook")["webhook"][type]
        with pytest.raises(HTTPError, match="503") as refused:
            post(ended, services())
        refused.value.close()
        post(ended, services())
    assert [headers["webhook-id"] for headers, _ in receiver.got] == [ended.id, ended.id]
    for headers, body in receiver.got:
        assert json.loads(body) == {"type": type, "timestamp": ended.time, "data": ended.order}
        signed = f"{ended.id}.{headers['webhook-timestamp']}.".encode() + body
        digest = hmac.digest(base64.b64decode(SECRET), signed, "sha256")
        assert headers["webhook-signature"] == "v1," + base64.b64encode(digest).decode()


@pytest.mark.parametrize("name", ["WEBHOOK_URL", "WEBHOOK_SECRET"])
def test_a_webhook_without_its_settings_stops_the_start(handlers, monkeypatch, name):
    monkeypatch.delenv(name)
    with pytest.raises(HandlerInvalid, match=f"webhook.py: line [0-9]+: KeyError: '{name}'"):
        handlers("webhook")


# --- outside.py


def test_outside_acks_after_its_work(monkeypatch, capsys):
    """The whole of it on a real broker is in tests/processes."""
    log: list = []
    channel = SimpleNamespace(
        queue_declare=lambda *a, **k: None, queue_bind=lambda queue, exchange, type: log.append(type),
        basic_qos=lambda **k: None, start_consuming=lambda: None, basic_ack=log.append,
        basic_consume=lambda queue, take: log.append(take),
    )  # fmt: skip
    connection = SimpleNamespace(channel=lambda: channel)
    monkeypatch.setattr("pika.BlockingConnection", lambda parameters: connection)
    monkeypatch.setitem(os.environ, "AMQP_URL", "amqp://127.0.0.1/")
    spec = importlib.util.spec_from_file_location("outside", EXAMPLES / "outside.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    *bound, take = log
    assert bound == ["order_confirmed", "order_cancelled"]
    sent = {"type": "order_confirmed", "subject": ORDER["id"], "data": {"order": ORDER}}
    take(channel, SimpleNamespace(delivery_tag=7), None, json.dumps(sent))
    assert capsys.readouterr().out == f"order_confirmed {ORDER['id']} 39.98\n" and log[-1] == 7
