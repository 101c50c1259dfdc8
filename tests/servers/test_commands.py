"""The commands of consumer.py as an operator runs them: what they print, what they leave, how they refuse."""

import os
import pty
import subprocess
import sys
import uuid

import pytest

from core.base.ids import new_order_id
from core.bus.topology import dead_queue, main_queue, queues_of, retry_queue
from core.order.events import make_event, message_body
from tests.fakes import ORDER
from tests.support.consumer import run_command, write_handlers
from tests.support.samples import api_event
from tests.support.servers import channel_to, declare_queues, delete_queues, length, put
from tools.chaos.system import ROOT, free_port, wait_for

DELAYS = (0.2, 0.5)
HANDLERS = ("email", "inventory", "legacy")
TIME = "2026-01-31T09:30:00.000Z"


class Operator:
    """Runs commands on a broker, in a folder with the handlers email and inventory."""

    def __init__(self, url: str, folder) -> None:
        self.url, self.folder = url, folder
        write_handlers(folder, email=HANDLER, inventory=HANDLER)

    def run(self, *args: str, stdin: str = "", **environment: str):
        given = {"AMQP_URL": self.url, "HANDLERS_DIR": str(self.folder), "RETRY_DELAYS": "0.2,0.5", **environment}
        ran = run_command(*args, stdin=stdin, **given)
        assert "Traceback" not in ran.stderr, ran.stderr
        return ran

    def output(self, *args: str, stdin: str = "", **environment: str) -> str:
        """What a command prints that succeeds."""
        ran = self.run(*args, stdin=stdin, **environment)
        assert (ran.returncode, ran.stderr) == (0, ""), ran
        return ran.stdout

    def refusal(self, *args: str, **environment: str) -> str:
        """The one line of a command that exits with 2."""
        ran = self.run(*args, **environment)
        assert (ran.returncode, ran.stdout) == (2, ""), ran
        [line] = ran.stderr.splitlines()
        return line

    def park(self, handler: str, *bodies: bytes, **headers) -> None:
        put(self.url, dead_queue(handler), *bodies, headers=headers, delivery_mode=2, message_id="m")

    def length(self, queue: str) -> int:
        return length(self.url, queue)


HANDLER = "def order_created(event, services): pass"


@pytest.fixture(scope="module")
def broker(broker_url):
    """The broker without our queues, before and after."""
    delete_queues(broker_url, HANDLERS, DELAYS)
    yield broker_url
    delete_queues(broker_url, HANDLERS, DELAYS)


@pytest.fixture
def operator(broker, tmp_path):
    declare_queues(broker, HANDLERS, DELAYS)
    return Operator(broker, tmp_path / "handlers")


def an_event() -> tuple[str, bytes]:
    id = new_order_id()
    event = api_event("order_created", id)
    return id, message_body(event.envelope(), {**ORDER, "id": id})


# --- dead ------------------------------------------------------------------------------------------------------------


def test_dead_lists_each_parked_message_with_details_and_moves_none(operator):
    id, body = an_event()
    operator.park("email", body, error="LookupError('x')", tries=4, time=TIME)
    operator.park("inventory", b"{oops", error="not an event", tries=1, time=TIME)
    for _ in range(2):
        lines = operator.output("dead").splitlines()
        assert lines == [
            f"HANDLER    {'ORDER':<36}  {'EVENT':<14}  TRIES  {'TIME':<24}  ERROR",
            f"email      {id}  {'order_created':<14}  4      {TIME}  LookupError('x')",
            f"inventory  {'-':<36}  none: b'{{oops'  1      {TIME}  not an event",
        ]
    wait_for(lambda: operator.length(dead_queue("email")) == operator.length(dead_queue("inventory")) == 1)


def test_dead_of_one_handler_lists_only_that_even_without_headers(operator):
    operator.park("email", b"\xff")
    operator.park("inventory", b"{}")
    lines = operator.output("dead", "email").splitlines()
    assert [line.split() for line in lines[1:]] == [["email", "-", "none:", r"b'\xff'", "-", "-", "-"]]


def test_dead_knows_the_event_types_of_the_folder(operator):
    (operator.folder / "events").mkdir()
    (operator.folder / "events/parcel_sent.json").write_text("{}")
    id = new_order_id()
    event = make_event(
        "parcel_sent", {}, id=str(uuid.uuid4()), source="/orderproc/handlers/email", subject=id, orderstatus="pending",
        traceparent="",
    )  # fmt: skip
    operator.park("email", message_body(event.envelope(), {**ORDER, "id": id}))
    [line] = operator.output("dead", "email").splitlines()[1:]
    assert line.split()[:3] == ["email", id, "parcel_sent"]


def test_dead_says_so_where_nothing_is_parked(operator):
    assert operator.output("dead") == "email: nothing is parked\ninventory: nothing is parked\n"


def test_dead_says_where_the_list_is_cut(operator):
    operator.park("email", *[b"{}"] * 1001)
    lines = operator.output("dead", "email").splitlines()
    assert len(lines) == 1002 and lines[-1] == "email: maybe there are more; these are the oldest"


# --- redrive ---------------------------------------------------------------------------------------------------------


def test_redrive_moves_the_oldest_parked_messages_to_their_handlers_queue(operator):
    operator.park("email", b"1", b"2", b"3", error="e", tries=4)
    assert operator.output("redrive", "email", "--limit", "2") == "sent 2 parked messages to orders.email again\n"
    wait_for(lambda: operator.length(dead_queue("email")) == 1)
    assert operator.length(main_queue("email")) == 2 and operator.length(main_queue("inventory")) == 0
    assert "none: b'3'" in operator.output("dead", "email")
    assert operator.output("redrive", "email") == "sent 1 parked messages to orders.email again\n"


def test_a_long_redrive_tells_on_a_terminal_how_far_it_is(operator):
    operator.park("email", *[b"{}"] * 250)
    terminal, end = pty.openpty()
    environment = {"AMQP_URL": operator.url, "HANDLERS_DIR": str(operator.folder), "PATH": os.environ["PATH"]}
    command = [sys.executable, "consumer.py", "redrive", "email"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=end, timeout=60)
    os.close(end)
    assert (ran.stdout, os.read(terminal, 100)) == (
        b"sent 250 parked messages to orders.email again\n",
        b"\r100 \r200 ",
    )
    os.close(terminal)


def test_redrive_of_all_goes_past_a_handler_that_never_ran(operator):
    write_handlers(operator.folder, fresh=HANDLER)
    operator.park("email", b"{}", b"{}")
    operator.park("inventory", b"{}")
    lines = operator.output("redrive", "--all").splitlines()
    assert lines[0] == "sent 2 parked messages to orders.email again"
    assert lines[1].startswith("fresh: ") and "did it ever run" in lines[1]
    assert lines[2] == "sent 1 parked messages to orders.inventory again"
    assert "inventory: nothing is parked" in operator.output("dead")


def test_a_dry_run_says_how_many_and_moves_nothing(operator):
    operator.park("email", b"1", b"2", b"3")
    assert operator.output("redrive", "email", "--dry-run") == "would send 3 parked messages to orders.email again\n"
    assert operator.output("redrive", "email", "--dry-run", "--limit", "2").startswith("would send 2 ")
    wait_for(lambda: operator.length(dead_queue("email")) == 3)
    assert operator.length(main_queue("email")) == 0


def test_redrive_with_nothing_parked_sends_nothing(operator):
    assert operator.output("redrive", "email") == "sent 0 parked messages to orders.email again\n"


# --- purge -----------------------------------------------------------------------------------------------------------


def test_purge_throws_away_what_is_parked_for_one_handler(operator):
    operator.park("email", b"1", b"2")
    operator.park("inventory", b"3")
    assert operator.output("purge", "email", "--yes") == "threw 2 parked messages of email away\n"
    assert operator.length(dead_queue("email")) == 0 and operator.length(dead_queue("inventory")) == 1


@pytest.mark.parametrize("answer", ["y\n", "Y\n"])
def test_purge_asks_first_and_takes_a_yes(operator, answer):
    operator.park("email", b"1")
    result = operator.output("purge", "email", stdin=answer)
    assert result.startswith("Throw away what is parked for email?") and "[y/N]" in result and "threw 1" in result


@pytest.mark.parametrize("answer", ["n\n", "\n", "", "what?\n"], ids=["no", "just enter", "end of input", "else"])
def test_anything_but_a_yes_purges_nothing_and_exits_with_1(operator, answer):
    operator.park("email", b"1")
    ran = operator.run("purge", "email", stdin=answer)
    assert (ran.returncode, ran.stderr) == (1, "") and "nothing was done; " in ran.stdout and "--yes" in ran.stdout
    assert operator.length(dead_queue("email")) == 1


# --- retire ----------------------------------------------------------------------------------------------------------


def test_retire_refuses_a_handler_that_is_still_there(operator):
    line = operator.refusal("retire", "email", "--yes")
    assert "email is still in" in line and "remove its file" in line
    assert operator.length(main_queue("email")) == 0, "its queue is there"


def test_retire_deletes_every_queue_of_a_handler_that_is_gone(operator):
    operator.park("legacy", b"1")
    assert operator.output("retire", "legacy", "--yes") == "deleted the queues of legacy, and 1 messages with them\n"
    assert [operator.length(queue) for queue in queues_of("legacy", DELAYS)] == [-1] * 4
    assert operator.length(main_queue("email")) == 0


def test_retire_asks_first(operator):
    ran = operator.run("retire", "legacy", stdin="no\n")
    assert ran.returncode == 1 and "Delete all queues of legacy" in ran.stdout
    assert operator.length(retry_queue("legacy", 0.5)) == 0


def test_retiring_twice_says_that_there_is_nothing(operator):
    operator.output("retire", "legacy", "--yes")
    assert "legacy" in operator.refusal("retire", "legacy", "--yes")


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args", [["dead", "emial"], ["redrive", "emial"], ["purge", "emial", "--yes"], ["retire", "emial", "--yes"]]
)
def test_a_wrong_name_is_named_in_one_line(operator, args):
    line = operator.refusal(*args)
    assert "emial" in line and "is that its name" in line


def test_redrive_to_a_missing_queue_gives_advice_and_moves_nothing(operator):
    operator.park("email", b"1")
    with channel_to(operator.url) as channel:
        channel.queue_delete(main_queue("email"))
    assert operator.refusal("redrive", "email") == (
        "orders.email is not there; start a consumer, which declares it"
    )  # fmt: skip
    wait_for(lambda: operator.length(dead_queue("email")) == 1)


@pytest.mark.parametrize("args", [["dead"], ["redrive", "email"], ["purge", "email", "--yes"]])
def test_with_the_embedded_bus_a_command_advises_a_restart(operator, args):
    line = operator.refusal(*args, AMQP_URL="embedded")
    assert "needs RabbitMQ" in line and "restart" in line and "POST /orders/<id>/redrive" in line


@pytest.mark.parametrize("args", [["dead"], ["redrive", "email"], ["purge", "email", "--yes"]])
def test_a_broker_that_is_away_is_one_line(operator, args):
    line = operator.refusal(*args, AMQP_URL=f"amqp://127.0.0.1:{free_port()}")
    assert line.startswith("RabbitMQ does not answer") and "refused" in line


def test_without_amqp_url_the_line_names_it(operator):
    assert operator.refusal("dead", AMQP_URL="").startswith("AMQP_URL: is not set")


@pytest.mark.parametrize(
    "args", ["redrive", "purge", "retire", "purge --all", "retire --all", "redrive email --limit -1", "explode"]
)
def test_words_that_make_no_command_show_the_usage(operator, args):
    ran = operator.run(*args.split())
    assert ran.returncode == 2 and ran.stderr.startswith("usage: ")


def test_a_consumer_refuses_an_embedded_store_or_bus(operator):
    for name, value in (("AMQP_URL", "embedded"), ("MONGODB_URL", "memory"), ("MONGODB_URL", "embedded")):
        line = operator.refusal(**{"MONGODB_URL": "mongodb://127.0.0.1:1/x", name: value})
        assert "orderproc.py" in line
