"""The local runtime, called by the client that calls AWS, boto3, and by the one that stands in for it in `make run`."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from queue import SimpleQueue

import pytest

from core.flow.services import FunctionFailed, Functions
from core.http.serving import serve
from lambdas import local
from tests.support.lambda_runtimes import connect, keep_to

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    keep_to(tmp_path, monkeypatch)
    return tmp_path


@contextmanager
def serving(port: int = 0):
    """The runtime on a thread, as `main` serves it; gives its address."""
    addresses, stop = SimpleQueue(), threading.Event()
    args = local.make_app(), "127.0.0.1", port, local.THREADS, stop, addresses.put
    thread = threading.Thread(target=serve, args=args)
    thread.start()
    try:
        yield addresses.get(timeout=10)
    finally:
        stop.set()
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def address():
    with serving() as address:
        yield address


@pytest.fixture
def talk(address):
    """A plain connection to the runtime."""
    with closing(http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)) as connection:
        yield connection


@pytest.fixture
def client(address):
    with_keys = connect(address)
    yield with_keys
    with_keys.close()


def invoke(client, name, payload, **more):
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    answer = client.invoke(FunctionName=name, Payload=body, **more)
    read = answer["Payload"].read()  # always: a connection goes back to the pool when its answer has been read
    return {**answer, "Payload": json.loads(read) if read else None}


def make(token):
    return {"action": "make", "token": token, "items": []}


def test_boto3_gets_the_answer_of_a_function(client, folder):
    answer = invoke(client, "make_label", make("order-1"))
    assert answer["StatusCode"] == 200 and "FunctionError" not in answer
    assert answer["Payload"]["carrier"] == "ACME Parcel"
    assert (folder / "labels/order-1.svg").exists()


@pytest.mark.parametrize(("city", "failures"), [("Jam", 2), ("Jam!", 9), ("Jamestown", 0), ("jam", 0)])
def test_the_label_of_a_test_value_fails(client, folder, city, failures):
    order = make(f"order-{uuid.uuid4()}") | {"shipTo": {"name": "Ada", "city": city}}
    answers = [invoke(each, "make_label", order) for each in [client, local.Client()] * 5]
    failed = ["FunctionError" in answer for answer in answers]
    assert failed == [True] * failures + [False] * (10 - failures) if failures < 9 else all(failed)
    if failures:
        assert f"orders to {city} are there to fail" in answers[0]["Payload"]["errorMessage"]
    assert invoke(client, "make_label", {"action": "void", "token": order["token"]})["Payload"] == {"voided": True}


def test_a_mail_can_be_sent_through_it(client, folder):
    order = {"id": "order-1", "currency": "EUR", "items": [], "total": 1}
    payload = {"token": "t-1", "to": "a@example.com", "template": "order_cancelled", "order": order}
    assert invoke(client, "send_email", payload)["Payload"]["messageId"] == "<t-1@orderproc>"
    assert len(list((folder / "mail/new").iterdir())) == 1


def test_a_raising_function_is_200_with_its_error_as_payload(client):
    invoke(client, "make_label", {"action": "void", "token": "order-1"})
    answer = invoke(client, "make_label", make("order-1"))
    error = answer["Payload"]
    assert (answer["StatusCode"], answer["FunctionError"]) == (200, "Unhandled")
    assert (error["errorType"], error["errorMessage"]) == ("LabelVoided", "the label of order order-1 is void")
    assert any("make_label.py" in line for line in error["stackTrace"])


def test_an_answer_that_is_no_json_is_a_function_error(client, monkeypatch):
    monkeypatch.setitem(local.FUNCTIONS, "make_label", lambda event, context: {1, 2})
    answer = invoke(client, "make_label", {})
    assert answer["FunctionError"] == "Unhandled" and answer["Payload"]["errorType"] == "TypeError"


def test_an_unknown_function_is_the_exception_boto3_knows(client):
    with pytest.raises(client.exceptions.ResourceNotFoundException, match="Function not found: .*make_coffee"):
        invoke(client, "make_coffee", {})


@pytest.mark.parametrize("payload", [b"{", b"\xff"])
def test_a_payload_that_is_no_json_is_a_function_error(client, payload):
    for answer in (invoke(each, "make_label", payload) for each in (client, local.Client())):
        assert answer["FunctionError"] == "Unhandled" and answer["Payload"]["errorType"].endswith("DecodeError")


def test_twenty_invocations_at_once_are_answered_each_with_its_own(client):
    with ThreadPoolExecutor(20) as pool:
        tokens = [f"order-{number}" for number in range(20)] * 3
        numbers = pool.map(lambda token: invoke(client, "make_label", make(token))["Payload"], tokens)
        found = {token: answer["trackingNumber"] for token, answer in zip(tokens, numbers, strict=True)}
    assert len(set(found.values())) == 20


def test_twenty_slow_functions_run_side_by_side(client, monkeypatch):
    together = threading.Barrier(20)
    monkeypatch.setitem(local.FUNCTIONS, "make_label", lambda event, context: together.wait(10) is None)
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: invoke(client, "make_label", {}), range(20)))
    assert not any("FunctionError" in answer for answer in answers)


def test_one_connection_serves_many_requests_without_waiting(talk):
    ports, started = set(), time.monotonic()
    for _ in range(50):
        talk.request("POST", "/2015-03-31/functions/make_label/invocations", b"{}")
        answer = talk.getresponse()
        assert (answer.status, b"KeyError" in answer.read(), answer.version) == (200, True, 11)
        ports.add(talk.sock.getsockname()[1])
    assert len(ports) == 1
    assert time.monotonic() - started < 1  # a delayed write would cost 40 ms each


def test_healthz_is_200(talk):
    talk.request("GET", "/healthz")
    assert talk.getresponse().status == 200


def test_other_paths_are_not_found(talk):
    for method, path in [("GET", "/"), ("POST", "/"), ("POST", "/2015-03-31/functions/make_label/invocations/x")]:
        talk.request(method, path)
        answer = talk.getresponse()
        answer.read()
        assert answer.status == 404


# --- without HTTP, as `make run` has it


def test_the_in_process_client_writes_where_boto3s_does(folder):
    assert invoke(local.Client(), "make_label", make("order-1"))["Payload"]["carrier"] == "ACME Parcel"
    assert (folder / "labels/order-1.svg").exists()


@pytest.mark.parametrize(
    "payload", [make("order-1"), {"action": "print", "token": "order-1"}, make("../order-1"), {}, None, b"null"]
)
def test_the_in_process_client_answers_as_boto3_does(client, payload):
    answers = [invoke(each, "make_label", payload) for each in (client, local.Client())]
    for answer in answers:
        if "FunctionError" in answer:
            assert answer["Payload"].pop("requestId")
            assert any("make_label.py" in line for line in answer["Payload"].pop("stackTrace"))
    one, two = ({name: answer.get(name) for name in ("Payload", "FunctionError")} for answer in answers)
    assert one == two


def test_what_handlers_invoke_in_process_fails_as_on_aws():
    functions = Functions(local.Client(), make_label="make_label", send_email="mail-of-another-name")
    assert functions.invoke("make_label", make("order-1"))["trackingNumber"]
    with pytest.raises(FunctionFailed, match="make_label: ValueError"):
        functions.invoke("make_label", make("../order-1"))
    with pytest.raises(FunctionFailed, match="send_email: KeyError"):
        functions.invoke("send_email", {})


# --- the process


def test_port_0_is_any_free_port():
    with serving(0) as one, serving(0) as two:
        assert one != two and not {one, two} & {"http://127.0.0.1:0"}


def test_importing_it_loads_no_boto3_and_starts_nothing():
    code = "import sys, threading, lambdas.local; print('boto3' in sys.modules, threading.active_count())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "1"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_is_in_hand_and_exits_0(folder, number):
    with socket.create_server(("127.0.0.1", 0)) as mail_server:
        url = f"smtp://127.0.0.1:{mail_server.getsockname()[1]}"
        command = [sys.executable, "-m", "lambdas.local", "--port", "0"]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "SMTP_URL": url},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        client = connect(process.stdout.readline().split()[-1])
        order = {"id": "order-1", "currency": "EUR", "items": [], "total": 1}
        mail = {"token": "t-1", "to": "a@example.com", "template": "order_cancelled", "order": order}
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(lambda: invoke(client, "send_email", mail)["Payload"])
            talk, _ = mail_server.accept()  # the function is running now and waits for our greeting
            process.send_signal(number)
            time.sleep(0.2)
            assert process.poll() is None
            talk.sendall(b"554 no\r\n")
            assert answer.result(10)["errorType"] == "SMTPConnectError"
            talk.close()
        client.close()
        assert process.wait(10) == 0 and process.stderr.read() == ""
        process.stdout.close()
        process.stderr.close()
