"""`make run`: everything in one process, with a bundled store, or with one in memory."""

import os
import signal
import subprocess
import sys
import time

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


def test_a_store_left_by_a_killed_process_is_ended(embedded):
    running = embedded()
    left = int((running.folder / "data/mongo.pid").read_text())
    running.kill("api")
    os.kill(left, 0)  # still there
    running.start("api")
    running.wait_ready()
    assert int((running.folder / "data/mongo.pid").read_text()) != left
    assert not _alive(left)


def test_the_recorded_pid_of_somebody_else_is_left_alone(embedded, tmp_path):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        (tmp_path / "data").mkdir()
        (tmp_path / "data/mongo.pid").write_text(str(bystander.pid))
        embedded()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_ctrl_c_ends_all_of_it_within_10_seconds(embedded):
    running = embedded()
    store = int((running.folder / "data/mongo.pid").read_text())
    running.post_many(50, 8)
    process = running.processes.pop("api")
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
    assert time.monotonic() - started < 10
    assert not _alive(store)


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
    assert "start that" in ended.stderr and len(ended.stderr.splitlines()) == 1


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline") as command:
            return "secantusd" in command.read()
    except OSError:
        return False
