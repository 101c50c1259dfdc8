"""Orders from the first request to the last mail, on two processes with real servers. ORDERS says how many."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from tools.chaos.system import wait_for

ORDERS = int(os.environ.get("ORDERS", "300"))


def test_every_order_ends_processed_with_one_label_and_one_mail(system):
    running = system()
    running.call("PUT", "/stock/A1", {"available": 10_000})
    results = running.post_many(ORDERS, clients=32)
    assert Counter(result.status for result in results) == {201: ORDERS}
    seconds = running.wait_until_final(300)
    print(f"{ORDERS} orders from 32 clients: all final {seconds:.1f} s after the last 201")
    assert Counter(order["status"] for order in running.orders()) == {"processed": ORDERS}
    assert running.check({"A1": 10_000}) == []


def test_of_200_orders_for_50_units_exactly_50_are_processed(system):
    running = system()
    running.call("PUT", "/stock/A1", {"available": 50})
    running.post_many(200, clients=32)
    running.wait_until_final()
    orders = running.orders()
    assert Counter(order["status"] for order in orders) == {"processed": 50, "failed": 150}
    assert {order["failureReason"] for order in orders if order["status"] == "failed"} == {"out_of_stock"}
    assert running.check({"A1": 50}) == []
    with running.database() as database:
        assert database.stock.find_one()["moves"] == []


def test_one_key_sent_40_times_at_once_makes_one_order(system):
    running = system()
    key = {"Idempotency-Key": '"one-and-only"'}
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda _: running.call("POST", "/orders", running.order(), **key), range(40)))
    assert Counter(status for status, _ in answers) == {201: 40}
    assert len({order["id"] for _, order in answers}) == 1
    assert len(running.orders()) == 1
    status, problem = running.call("POST", "/orders", running.order(quantity=2), **key)
    assert (status, problem["type"]) == (422, "urn:orderproc:key-reused")


def test_a_cancelled_order_gives_back_stock_and_voids_its_label(system):
    running = system(HANDLERS="inventory,email")  # nobody ships, so the order stays pending
    running.call("PUT", "/stock/A1", {"available": 10})
    _, order = running.call("POST", "/orders", running.order(quantity=3))
    wait_for(lambda: running.call("GET", "/stock/A1")[1]["available"] == 7)
    assert running.call("POST", f"/orders/{order['id']}/cancel")[0] == 200
    running.stop("consumer")
    running.environment["HANDLERS"] = ""
    running.start("consumer")
    running.wait_until_final()
    wait_for(lambda: running.call("GET", "/stock/A1")[1]["available"] == 10)
    wait_for((running.folder / f"data/labels/{order['id']}.void").exists)
    assert running.check({"A1": 10}) == []


def test_one_trace_runs_from_the_request_to_the_last_handler(system):
    running = system()
    running.call("PUT", "/stock/A1", {"available": 1})
    trace = "0af7651916cd43dd8448eb211c80319c"
    running.call("POST", "/orders", running.order(), traceparent=f"00-{trace}-b7ad6b7169203331-01")
    running.wait_until_final()
    for name, lines in (("api", 1), ("consumer", 3)):
        assert sum(f'"trace": "{trace}"' in line for line in running.log(name).splitlines()) >= lines
    assert "customer-0@example.com" not in running.log("api") + running.log("consumer")
