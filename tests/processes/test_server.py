"""The API behind waitress, over real sockets: limits, keep-alive, and how it ends."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import closing, contextmanager

import pytest

from core.base.settings import ROOT
from orderproc import SWAGGER_UI
from tests.support.api import ORDER
from tests.support.wire_store import WireStore, always, on, refuse
from tools.chaos.system import free_port, wait_for

PROGRAM = """
    import logging, sys, time
    from core.http import serving
    from core.running.process import stop_on_signal
    from tests.support.api import Shop

    logging.basicConfig(level=logging.INFO)
    stop, shop = stop_on_signal(), Shop()
    slow = shop.orders.create
    def create(order, *rest):
        seconds = order["customerId"].removeprefix("sleep ")
        time.sleep(float(seconds) if seconds != order["customerId"] else 0)
        return slow(order, *rest)
    shop.orders.create = create
    serving.DRAIN_SECONDS = float(sys.argv[2])
    serving.serve(shop.app, "127.0.0.1", int(sys.argv[1]), 4, stop, listening=lambda address: None)
    print("served", shop.database["orders"].count_documents({}), flush=True)
"""
HEADERS = {"Authorization": "Bearer shop-key", "Content-Type": "application/json"}


class Server:
    def __init__(self, process, port):
        self.process, self.port, self.connections = process, port, []

    def connect(self):
        self.connections.append(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20))
        return self.connections[-1]

    def post(self, body=ORDER, connection=None, **headers):
        if connection is None:
            with closing(self.connect()) as own:
                return self.post(body, own, **headers)
        connection.request("POST", "/orders", body if isinstance(body, bytes) else json.dumps(body), HEADERS | headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()

    def timed(self, path):
        """GET it; gives the status, Retry-After, and the seconds that took."""
        with closing(self.connect()) as connection:
            began = time.monotonic()
            connection.request("GET", path, headers=HEADERS)
            response = connection.getresponse()
            response.read()
            return response.status, response.headers["Retry-After"], time.monotonic() - began

    def raw(self, data, seconds=5):
        """Send bytes, give everything that comes back until the other side hangs up or falls silent."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            connection.sendall(data)
            return read_all(connection)

    def refuses(self):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) != 0

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return time.monotonic()

    def wait(self, seconds=15):
        output, errors = self.process.communicate(timeout=seconds)
        return self.process.returncode, output, errors


def read_all(connection):
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except (TimeoutError, ConnectionResetError):  # a reset: it was refused before all of it was read
        pass
    return received


@contextmanager
def serving(drain=8):
    port = free_port()
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(port), str(drain)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    server = Server(process, port)
    try:
        wait_for(lambda: not server.refuses(), what="the server listens")
        yield server
    finally:
        for connection in server.connections:
            connection.close()
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


def background(function, *args):
    result = []

    def run():
        try:
            result.append(function(*args))
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, result


# --- limits


def test_an_order_over_http(server):
    status, headers, body = server.post()
    assert status == 201 and headers["Location"] == f"/orders/{json.loads(body)['id']}"
    assert headers["Server"] is None, "who we are is nobody's business"


def test_one_connection_takes_many_requests(server):
    connection = server.connect()
    server.post(connection=connection)
    first = connection.sock
    assert [server.post(b"{", connection)[0], server.post(ORDER, connection)[0]] == [400, 201]
    assert connection.sock is first


@pytest.mark.parametrize("size, expected", [(64 * 1024, 201), (64 * 1024 + 1, 413), (1024 * 1024 - 1, 413)])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_is_measured_however_it_is_sent(server, size, expected, chunked):
    body = json.dumps(ORDER).encode().ljust(size)
    if chunked:
        size_of_chunk = 60_000  # the framing counts too at waitress
        pieces = [body[n : n + size_of_chunk] for n in range(0, min(len(body), 900_000), size_of_chunk)]
        connection = server.connect()
        connection.request("POST", "/orders", iter(pieces), HEADERS, encode_chunked=True)
        response = connection.getresponse()
        status, headers, content = response.status, response.headers, response.read()
    else:
        status, headers, content = server.post(body)
    assert status == expected
    if expected == 413:
        assert headers["Content-Type"] == "application/problem+json" and json.loads(content)["status"] == 413


def head(**headers):
    lines = ["POST /orders HTTP/1.1", "Host: x", "Authorization: Bearer shop-key", "Content-Type: application/json"]
    return "\r\n".join(
        lines + [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()] + ["", ""]
    ).encode()


def test_a_body_far_too_large_is_refused_before_being_sent(server):
    assert server.raw(head(Content_Length=50_000_000)).startswith(b"HTTP/1.1 413")


def test_headers_over_32_kib_are_refused(server):
    assert server.raw(head(X="x" * 33_000))[:12] in (b"HTTP/1.0 431", b"")
    assert server.raw(head(X="x" * 31_000, Content_Length=2, Connection="close") + b"{}").startswith(b"HTTP/1.1 422")


@pytest.mark.parametrize(
    "data", [b"nonsense\r\n\r\n", b"GET\r\n\r\n", head(Content_Length="x"), head(Content_Length=-1),
             head(Transfer_Encoding="gzip"),
             b"GET / HTTP/1.1\r\nA\r\n\r\n", b"\x00\x01\x02\r\n\r\n", b"GET /%00 HTTP/1.1\r\nConnection: close\r\n\r\n"]
)  # fmt: skip
def test_malformed_http_is_refused_without_html_or_traceback(server, data):
    response = server.raw(data)
    assert response.split()[1] in (b"400", b"404", b"501") and b"<" not in response and b"Traceback" not in response
    assert server.post()[0] == 201, "and it lives on"


def test_bytes_that_are_not_utf8_anywhere_make_no_500(server):
    for data in (
        b"GET /orders/\xff HTTP/1.1\r\n\xffx: y\r\nConnection: close\r\n\r\n",
        b"GET /orders?limit=\xff HTTP/1.1\r\nAuthorization: Bearer shop-key\r\nConnection: close\r\n\r\n",
        b"GET /orders HTTP/1.1\r\nAuthorization: Bearer \xff\r\nConnection: close\r\n\r\n",
        head(Idempotency_Key="@", Content_Length=2, Connection="close").replace(b"@", b"\xff") + b"{}",
    ):
        assert server.raw(data).split()[1] in (b"400", b"401", b"404"), data


def test_a_client_that_goes_away_harms_nobody(server):
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head(Content_Length=1000) + b"{")
    assert server.post()[0] == 201


# --- a crowd


def test_who_waits_over_a_second_for_a_thread_is_refused(server):
    slow = [background(server.post, ORDER | {"customerId": "sleep 1.6"}) for _ in range(4)]  # all of its threads
    time.sleep(0.2)
    late = [background(server.timed, path) for path in ("/orders", "/stock", "/healthz", "/readyz")]
    for thread, _ in slow + late:
        thread.join()
    assert [result[0][0] for _, result in slow] == [201] * 4
    assert [result[0][0] for _, result in late] == [503, 503, 200, 200]
    for _, [(status, retry_after, seconds)] in late:
        assert retry_after == ("2" if status == 503 else None) and seconds < 2.5
    assert server.post()[0] == 201, "and it lives on"


# --- how it ends


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_accepted_is_answered_and_new_connections_are_refused(number):
    with serving() as server:
        waiting = [
            background(server.post, ORDER | {"customerId": "sleep 0.35"}) for _ in range(12)
        ]  # three rounds of 4 threads
        time.sleep(0.2)
        began = server.end(number)
        wait_for(server.refuses, 2, "new connections are refused")
        assert server.process.poll() is None
        for thread, _ in waiting:
            thread.join()
        code, output, errors = server.wait()
        assert [result[0][0] if isinstance(result[0], tuple) else result[0] for _, result in waiting] == [201] * 12
        assert all(result[0][1]["Connection"] == "close" for _, result in waiting), "so nobody sends more"
        assert (code, output) == (0, "served 12\n"), errors
        assert time.monotonic() - began < 6 and "Traceback" not in errors


def test_answers_larger_than_the_sockets_buffers_arrive_whole():
    with serving() as server:
        with socket.socket() as connection:
            connection.settimeout(10)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n" * 10)
            time.sleep(0.5)
            server.end()
            time.sleep(0.5)
            received = read_all(connection)
        script = (SWAGGER_UI / "swagger_bundle.js").read_bytes()
        assert received.count(b"HTTP/1.1 200 OK") == received.count(script) == 10
        assert server.wait()[0] == 0


def test_idle_connections_do_not_hold_the_end():
    with serving() as server:
        idle = [server.connect() for _ in range(20)]
        for connection in idle:
            assert server.post(connection=connection)[0] == 201
        silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(5)]
        time.sleep(0.1)
        began = server.end()
        code, _, errors = server.wait()
        assert code == 0 and time.monotonic() - began < 2, errors
        for connection in silent:
            assert connection.recv(10) == b""
            connection.close()
        for connection in idle:
            connection.close()


def test_a_request_that_is_still_arriving_is_waited_for():
    with serving() as server, socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        body = json.dumps(ORDER).encode()
        connection.sendall(head(Content_Length=len(body)) + body[:10])
        time.sleep(0.2)
        server.end()
        time.sleep(0.5)
        connection.sendall(body[10:])
        assert read_all(connection).startswith(b"HTTP/1.1 201")
        assert server.wait()[0] == 0


def test_the_end_is_not_waited_for_longer_than_the_bound():
    with serving(drain=1) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            slow.sendall(head(Content_Length=1000) + b"{")  # never the rest
            thread, result = background(server.post, ORDER | {"customerId": "sleep 30"})
            time.sleep(0.3)
            began = server.end()
            code, _, errors = server.wait()
            thread.join()
        assert code == 0 and 0.9 < time.monotonic() - began < 4, errors
        assert isinstance(result[0], Exception)


def test_clients_that_never_pause_lose_no_order():
    """Keep-alive clients that send without a break: each response they got is an order, and the end is not held up."""
    with serving() as server:
        made, doubtful = [], []

        def pump():
            connection = server.connect()
            while True:
                try:
                    made.append(server.post(connection=connection)[0])
                except (OSError, http.client.HTTPException) as error:
                    doubtful.append(error)
                    return
                if connection.sock is None:  # the server wants it closed
                    try:
                        connection.connect()
                    except OSError:
                        return

        threads = [threading.Thread(target=pump) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        began = server.end()
        code, output, errors = server.wait()
        for thread in threads:
            thread.join()
        assert code == 0 and time.monotonic() - began < 3, errors
        assert set(made) == {201}
        stored = int(output.split()[1])
        assert len(made) <= stored <= len(made) + len(doubtful)
        assert not [error for error in doubtful if stored > len(made)], "nothing was stored without a response"


# --- how it starts


def run_main(*program, **env):
    base = {"PATH": os.environ["PATH"], "MONGODB_URL": "memory", "AMQP_URL": "embedded", "API_KEYS": "a:secret-1"}
    return subprocess.run(
        [sys.executable, *(program or ["orderproc.py"])],
        cwd=ROOT,
        env=base | env,
        capture_output=True,
        text=True,
        timeout=20,
    )


@pytest.mark.parametrize(
    "env, named",
    [({"API_KEYS": ""}, "API_KEYS"), ({"MONGODB_URL": ""}, "MONGODB_URL"), ({"AMQP_URL": ""}, "AMQP_URL"),
     ({"PORT": "http"}, "PORT"), ({"API_KEYS": "a:hunter2:emperor"}, "API_KEYS")],
)  # fmt: skip
def test_a_wrong_setting_stops_the_start_with_one_line(env, named):
    ended = run_main(**env)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith(named) and ended.stderr.count("\n") == 1 and "hunter2" not in ended.stderr


SECRET = "hunter2"
BAD_STORES = (
    f"mongodb://user:p@{SECRET}@127.0.0.1:1/orderproc",  # an @ that is not escaped
    f"mongodb://user:p%{SECRET}@127.0.0.1:1/orderproc",
    f"mongo://user:{SECRET}@127.0.0.1:1/orderproc",
    f"http://user:{SECRET}@127.0.0.1:1/orderproc",
    f"user:{SECRET}@127.0.0.1",
    f"mongodb://user:{SECRET}@[127.0.0.1/orderproc",
    f"mongodb://user:{SECRET}@127.0.0.1:port/orderproc",
    f"mongodb://user:{SECRET}@127.0.0.1:99999/orderproc",
    f"mongodb://user:{SECRET}@127.0.0.1:1/orderproc?retryWrite=false",  # no such option
    f"mongodb://user:{SECRET}@127.0.0.1:1/orderproc?readPreference=whatever",
    f"mongodb://user:{SECRET}@127.0.0.1:1/orderproc?authMechanism=GUESS",
    f"mongodb://user:{SECRET}@127.0.0.1:1/order%20proc",
    f"mongodb+srv://user:{SECRET}@store.invalid/orderproc",
    f"mongodb://us/er:{SECRET}@store/orderproc",  # the driver takes the password for a part of the database's name
)


@pytest.mark.parametrize("program", ["orderproc.py", "consumer.py"])
@pytest.mark.parametrize("url", BAD_STORES)
def test_a_store_url_that_cannot_work_is_one_line(program, url):
    ended = run_main(program, MONGODB_URL=url, AMQP_URL="amqp://127.0.0.1:1", PORT="0", METRICS_PORT="0")
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("MONGODB_URL: ") and ended.stderr.count("\n") == 1 and not ended.stdout
    assert SECRET not in ended.stderr and url not in ended.stderr


@pytest.mark.parametrize("program", ["orderproc.py", "consumer.py"])
@pytest.mark.parametrize("url", ["amqp://user:hunter2@[::1/x", "http://user:hunter2@h", "amqp://user:hunter2#@h/"])
def test_a_broker_url_that_cannot_work_is_one_line(program, url):
    ended = run_main(program, MONGODB_URL="mongodb://127.0.0.1:1", AMQP_URL=url, PORT="0", METRICS_PORT="0")
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("AMQP_URL: ") and ended.stderr.count("\n") == 1 and SECRET not in ended.stderr


@pytest.mark.parametrize("program", ["orderproc.py", "consumer.py"])
def test_a_wrong_password_stops_the_start_with_one_line(program):
    with WireStore() as store:
        store.fault = always(on("*", "saslStart"), refuse(18))
        url = store.url.replace("mongodb://", f"mongodb://user:{SECRET}@")
        ended = run_main(program, MONGODB_URL=url, AMQP_URL="amqp://127.0.0.1:1", PORT="0", METRICS_PORT="0")
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("MONGODB_URL: the store refuses this user or password")
    assert ended.stderr.count("\n") == 1 and SECRET not in ended.stderr


# --- a part that dies


DYING = """
    import sys
    from core.flow import sweep
    from core.store import group_commit

    def die(*_):
        raise RuntimeError("its heart stopped")

    sys.argv[:] = ["%s"]
    %s = die
    exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))
"""


@pytest.mark.parametrize(
    "victim, name",
    [("group_commit.GroupCommit._try_all", "batch-"), ("sweep.Sweep.run", "sweep")],
)
def test_a_dead_thread_ends_the_process(tmp_path, victim, name):
    program = textwrap.dedent(DYING % ("orderproc.py", victim))
    ended = run_main("-c", program, DATA_DIR=str(tmp_path), PORT="0", LOG_FORMAT="json")
    lines = [json.loads(line) for line in ended.stderr.splitlines() if line.startswith("{")]
    assert ended.returncode == 1, ended.stderr
    [line] = [line for line in lines if line["level"] == "CRITICAL"]
    assert line["message"].startswith(name) and "its heart stopped" in line["message"]


def test_a_port_in_use_is_refused_as_a_bad_setting():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        program = textwrap.dedent(PROGRAM)
        command = [sys.executable, "-c", program, str(taken.getsockname()[1]), "8"]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert "SettingInvalid: HOST, PORT: cannot listen on 127.0.0.1" in ended.stderr


def test_importing_does_nothing():
    program = "import threading, orderproc; assert threading.active_count() == 1"
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={}, capture_output=True, text=True, timeout=20
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
