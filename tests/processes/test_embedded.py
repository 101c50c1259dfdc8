"""`make run`: everything in one process, with a bundled store, or with one in memory."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

from tests.support.consumer import run_command
from tools.chaos.system import ROOT, wait_for


def test_an_order_becomes_processed_with_label_and_mail_on_disk(embedded):
    running = embedded()
    _, order = running.call("POST", "/orders", running.order())
    running.wait_until_final()
    assert (running.folder / f"data/labels/{order['id']}.svg").exists()
    assert len(list((running.folder / "data/mail/new").iterdir())) == 1
    assert running.check({"A1": 1000}) == []


def test_the_same_holds_in_memory(embedded):
    running = embedded(mongodb_url="memory")
    running.post_many(50, 8)
    running.wait_until_final()
    assert running.check({"A1": 1000}) == []


def test_real_rabbitmq_serves_the_bundled_store_as_well(embedded, rabbit):
    running = embedded(amqp_url=rabbit)
    running.post_many(50, 8)
    running.wait_until_final()
    assert running.check({"A1": 1000}) == []


def test_a_clean_restart_keeps_orders_and_stock_despite_the_catalogue(embedded):
    running = embedded()
    running.call("PUT", "/stock/A1", {"available": 7})
    running.call("POST", "/orders", running.order())
    running.wait_until_final()
    assert running.stop("api") == 0
    running.start("api")
    running.wait_ready()
    assert running.call("GET", "/stock/A1")[1] == {"sku": "A1", "available": 6}
    assert [order["status"] for order in running.orders()] == ["processed"]


def test_a_second_start_on_a_folder_in_use_is_refused(embedded):
    running = embedded()
    second = subprocess.run(
        [sys.executable, "orderproc.py"],
        cwd=ROOT,
        env=running.environment | {"PORT": "0"},
        capture_output=True,
        text=True,
    )
    assert second.returncode == 2
    assert "is in use by another orderproc" in second.stderr.splitlines()[-1]


def test_kill_9_of_the_program_ends_the_bundled_store(embedded):
    running = embedded()
    assert store_processes(running)
    running.kill("api")
    wait_for(lambda: not store_processes(running), 10, "the store ended with its program")


def test_the_death_of_the_bundled_store_ends_the_process(embedded):
    running = embedded()
    running.call("POST", "/orders", running.order())
    process = running.processes["api"]
    os.kill(store_of(running), signal.SIGKILL)
    assert process.wait(10) == 1
    lines = [json.loads(line) for line in running.log("api").splitlines() if line.startswith("{")]
    [why] = [line["message"] for line in lines if line["level"] == "CRITICAL"]  # others may still have warned behind it
    assert "the embedded store ended with 137" in why
    assert store_processes(running) == {}
    running.start("api")
    running.wait_ready()
    running.wait_until_final()
    assert len(running.orders()) == 1 and running.check({"A1": 1000}) == []


def test_a_clean_end_says_nothing_of_a_dead_store(embedded):
    running = embedded()
    assert running.stop("api") == 0
    assert "ended with" not in running.log("api") and "CRITICAL" not in running.log("api")


def test_a_restart_right_after_kill_9_works_each_time(embedded):
    running, made = embedded(), set()
    for _ in range(3):
        made.add(running.call("POST", "/orders", running.order())[1]["id"])
        running.kill("api")
        running.start("api")  # at once: the old store may still be closing its files
        running.wait_ready()
    running.wait_until_final()
    assert {order["id"] for order in running.orders()} == made
    running.wait_until_whole({"A1": 1000})
    assert store_of(running), "one runs, and none of those before"


def test_a_restart_after_kill_9_works_though_the_store_hangs(embedded):
    running = embedded()
    left = store_of(running)
    os.kill(left, signal.SIGSTOP)
    try:
        running.kill("api")
        running.start("api")
        running.wait_ready()
        assert store_of(running) != left
    finally:
        with suppress(ProcessLookupError):
            os.kill(left, signal.SIGKILL)


def test_ctrl_c_ends_all_of_it_within_10_seconds(embedded):
    running = embedded()
    assert store_processes(running)
    running.post_many(50, 8)
    process = running.processes["api"]
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
    assert time.monotonic() - started < 10
    assert store_processes(running) == {}


def test_a_parked_step_is_tried_again_by_a_restart(embedded, tmp_path):
    folder = tmp_path / "handlers"
    folder.mkdir()
    for path in (ROOT / "handlers").glob("*.py"):
        (folder / path.name).write_text(path.read_text())
    (folder / "shipping.py").write_text("def inventory_reserved(event, services):\n    raise OSError('no paper')\n")
    running = embedded(HANDLERS_DIR=str(folder), RETRY_DELAYS="")
    _, order = running.call("POST", "/orders", running.order())
    wait_for(lambda: running.call("GET", f"/orders/{order['id']}")[1].get("parked") == ["shipping"])
    running.stop("api")
    (folder / "shipping.py").write_text((ROOT / "handlers/shipping.py").read_text())
    running.start("api")
    running.wait_ready()
    running.wait_until_final()
    assert running.check({"A1": 1000}) == []


def test_consumer_py_refuses_to_run_beside_an_embedded_store(embedded):
    ended = run_command(MONGODB_URL="embedded", AMQP_URL="amqp://localhost")
    assert ended.returncode == 2
    assert "so run that instead" in ended.stderr and len(ended.stderr.splitlines()) == 1


def store_processes(running) -> dict[int, str]:
    """{pid: command line} of the bundled store on this system's folder, and of the shell that watches over it."""
    listed = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,args="], capture_output=True, text=True, check=True).stdout
    lines = [line.split(maxsplit=1) for line in listed.splitlines()]
    folder = f"--storage-path {running.folder / 'data/mongo'}"
    return {int(pid): args for pid, args in lines if folder in args}


def store_of(running) -> int:
    """The pid of the store itself."""
    [pid] = [pid for pid, args in store_processes(running).items() if not args.startswith("sh ")]
    return pid
