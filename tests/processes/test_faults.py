"""Things die, freeze and vanish at the worst moment; afterwards every order ends and nothing is doubled.

FAULT_SECONDS is how long outages last: short here, as long as you like for a soak.
"""

import http.client
import json
import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta

import pytest

from core.base.ids import now
from tests.support.servers import BrokerNode, delete_queues
from tools.chaos.system import SECRET, free_port, wait_for

OUTAGE = float(os.environ.get("FAULT_SECONDS", "8"))
STOCK = {"A1": 100_000}


def stocked(running):
    running.call("PUT", "/stock/A1", {"available": STOCK["A1"]})
    return running


@pytest.mark.parametrize("victim", ["api", "consumer"])
def test_kill_9_with_20_orders_underway_loses_and_doubles_nothing(system, victim):
    running = stocked(system())
    kill_under_load(running, victim)
    running.age_moves()
    running.wait_until_whole(STOCK)


def test_kill_9_of_the_embedded_process_loses_and_doubles_nothing(embedded):
    running = stocked(embedded())
    kill_under_load(running, "api")
    running.wait_until_whole(STOCK)


def kill_under_load(running, victim: str) -> None:
    with running.load(clients=16) as results:
        under_way = wait_for(lambda: _twenty_under_way(running, results), what="20 orders answered 201 are not final")
        running.kill(victim)
    running.start(victim)
    running.wait_ready()
    accepted = {result.id for result in results if result.status == 201}
    seconds = running.wait_until_final(90)
    print(f"{victim}: killed with {under_way} orders answered 201 and not final; all ended in {seconds:.1f} s")
    assert accepted <= {order["id"] for order in running.orders()}


def _twenty_under_way(running, results) -> int:
    accepted = {result.id for result in results if result.status == 201}
    under_way = len(accepted & running.pending())
    return under_way if under_way >= 20 else 0


@pytest.fixture
def broker(tmp_path):
    """A broker to be killed."""
    (tmp_path / "broker").mkdir()
    node = BrokerNode(tmp_path / "broker")
    try:
        node.start()
        yield node
    finally:
        node.kill()


def test_orders_accepted_without_the_broker_end_when_it_returns(broker, system):
    running = stocked(system(amqp_url=broker.url()))
    with running.load(clients=4, pause=0.05) as results:
        wait_for(lambda: len(results) > 20)
        broker.kill()
        time.sleep(OUTAGE)
        broker.start()
    assert {result.status for result in results} == {201}
    assert max(result.seconds for result in results) < 3
    seconds = running.wait_until_final(120)
    print(f"broker away for {OUTAGE} s: {len(results)} orders, all answered 201; all ended in {seconds:.1f} s")
    running.age_moves()
    running.wait_until_whole(STOCK)


def test_deleting_every_queue_loses_nothing(system, rabbit):
    running = stocked(system())
    running.post_many(100, clients=16)
    running.kill("consumer")
    running.post_many(100, clients=16)
    delete_queues(rabbit)
    # The messages are gone; what is unfinished stands in the orders. Age them: the sweep would wait a minute.
    with running.database() as database:
        long_ago = {"due": now() - timedelta(seconds=1), "touched": now() - timedelta(seconds=70)}
        database.orders.update_many({"due": {"$exists": True}}, {"$set": long_ago})
    running.start("consumer")
    running.wait_until_final(60)
    running.age_moves()
    running.wait_until_whole(STOCK)


def test_a_frozen_store_gives_503_within_3_seconds_without_parking(system, own_store_server):
    running = stocked(system(mongodb_url=own_store_server.url("frozen")))
    running.post_many(60, clients=16)
    own_store_server.process.send_signal(signal.SIGSTOP)
    alive = []
    with running.load(clients=48, pause=0.1) as results:
        for _ in range(int(OUTAGE)):
            started = time.monotonic()
            alive.append((running.call("GET", "/healthz")[0], time.monotonic() - started < 3))
            time.sleep(1)
    own_store_server.process.send_signal(signal.SIGCONT)
    slowest = max(result.seconds for result in results)
    print(f"store frozen for {OUTAGE} s: {len(results)} requests, all answered 503, the slowest in {slowest:.1f} s")
    assert set(alive) == {(200, True)}
    assert {result.status for result in results} == {503}
    assert slowest < 3
    wait_for(lambda: running.call("GET", "/readyz")[0] == 200)
    running.wait_until_final(90)
    running.age_moves()
    running.wait_until_whole(STOCK)
    assert not [line for order in running.orders() for line in order["timeline"] if "failed" in line]


def test_a_crowd_on_a_frozen_store_gets_503_in_time(system, own_store_server):
    running = stocked(system(mongodb_url=own_store_server.url("crowd")))
    own_store_server.process.send_signal(signal.SIGSTOP)
    try:
        answers = crowd(running, 100 * ["POST"] + 100 * ["GET"])
    finally:
        own_store_server.process.send_signal(signal.SIGCONT)
    slowest = max(seconds for _, seconds in answers)
    print(f"200 clients on a frozen store: {Counter(status for status, _ in answers)}, the slowest in {slowest:.2f} s")
    assert {status for status, _ in answers} == {503}
    assert slowest < 3.2
    running.wait_ready()


def crowd(running, methods: list[str]) -> list[tuple[int, float]]:
    """Call /orders on as many connections at once; gives (status, seconds from sending to the answer)."""
    together = threading.Barrier(len(methods))

    def client(method: str) -> tuple[int, float]:
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
        headers = {"Authorization": f"Bearer {SECRET}", "Content-Type": "application/json"}
        with closing(connection):
            connection.connect()
            together.wait()
            started = time.monotonic()
            connection.request(method, "/orders", json.dumps(running.order()) if method == "POST" else None, headers)
            response = connection.getresponse()
            response.read()
            return response.status, time.monotonic() - started

    with ThreadPoolExecutor(len(methods)) as pool:
        return list(pool.map(client, methods))


def test_the_health_port_answers_while_all_threads_wait(system, own_store_server):
    health = free_port()
    store = own_store_server.url("threads")
    running = stocked(system(mongodb_url=store, WEB_THREADS="4", API_METRICS_PORT=str(health)))
    assert running.call("GET", "/readyz", port=health) == (200, {"ready": True, "store": "up", "broker": "up"})
    own_store_server.process.send_signal(signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(9) as pool:
            waiting = [pool.submit(running.call, "POST", "/orders", running.order()) for _ in range(8)]
            time.sleep(0.3)
            beside = pool.submit(running.call, "GET", "/healthz")  # on the main port it waits with the others
            for path in ("/healthz", "/metrics") * 5:
                started = time.monotonic()
                assert running.call("GET", path, port=health)[0] == 200
                assert time.monotonic() - started < 0.5
            assert not any(each.done() for each in [*waiting, beside])
            assert running.metric("orderproc_request_queue_seconds_count", port=health) >= 1
            assert running.call("GET", "/orders", port=health)[0] == 404, "it serves nothing else"
            wait_for(lambda: running.call("GET", "/readyz", port=health)[0] == 503, 4, "not ready")
            assert {each.result()[0] for each in waiting} == {503} and beside.result()[0] == 200
        assert running.metric("orderproc_shed_total", port=health) >= 1
    finally:
        own_store_server.process.send_signal(signal.SIGCONT)
    wait_for(lambda: running.call("GET", "/readyz", port=health)[0] == 200, what="ready again")


def test_sigterm_under_load_answers_everything_accepted_and_exits_0(system):
    running = stocked(system())
    with running.load(clients=16) as results:
        wait_for(lambda: len(results) > 100)
        assert running.stop("api") == 0
    assert running.stop("consumer") == 0
    assert {result.status for result in results} <= {0, 201}
    running.start("api")
    running.start("consumer")
    running.wait_ready()
    running.wait_until_final(60)
    # A drain answers all it took: there is no order without a response.
    accepted = {result.id for result in results if result.status == 201}
    assert accepted <= {order["id"] for order in running.orders()} and len(running.orders()) == len(accepted)
    running.wait_until_whole(STOCK)
