"""The story of some orders, told in the terminal as it happens: `make demo`, two minutes.

    python -m tools.demo [--pace 1.0]       0 tells it without pauses

It starts the program as `make run` does, on a port and a data folder of its own, talks to its API, kills it and starts
it again; nothing in it is acted. It exits with 1 where something did not happen as it is told.
"""

import argparse
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tools.client import Client, order

ROOT = Path(__file__).resolve().parents[1]
KEY = "demo-key"
SECONDS_A_WORD = 0.27  # at which a person reads


class NotAsTold(Exception):
    """Something happened otherwise than the story has it."""


class Program:
    """The whole program as one process, with everything it knows in a folder."""

    def __init__(self, folder: Path, pace: float) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.folder, self.client = folder, Client(f"http://127.0.0.1:{self.port}", KEY)
        self.survives = (Path(sys.executable).parent / "secantusd-py").exists()
        delays = f"{max(0.2, 2 * pace):g},{max(0.4, 4 * pace):g}"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        self.environment = inherited | {
            "MONGODB_URL": "embedded" if self.survives else "memory", "AMQP_URL": "embedded",
            "DATA_DIR": str(folder / "data"), "PORT": str(self.port), "HOST": "127.0.0.1",
            "API_KEYS": f"demo:{KEY}:admin", "RETRY_DELAYS": delays, "HANDLERS": "", "HANDLERS_DIR": "",
        }  # fmt: skip

    def start(self) -> float:
        """Start it; gives the seconds until it is ready."""
        began = time.monotonic()
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "orderproc.py"], cwd=ROOT, env=self.environment, stdout=log, stderr=log
            )
        wait_for(self._is_ready, "the program is ready")
        return time.monotonic() - began

    def _is_ready(self) -> bool:
        if self.process.poll() is not None:
            raise NotAsTold(f"the program ended: {(self.folder / 'log').read_text()[-500:]}")
        with suppress(OSError, http.client.HTTPException):
            return self.client.call("GET", "/readyz").status == 200
        return False

    def kill(self) -> None:
        """As a power cut would: at once, with no chance to save anything."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Ask it to end; gives its exit code."""
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(15)


class Story:
    """Tells, does and shows. Times shown are those of the program, in seconds since the order came."""

    def __init__(self, program: Program, pace: float) -> None:
        self.program, self.call, self.pace = program, program.client.call, pace
        self._shown = Counter[str]()  # lines, by order

    def title(self, text: str) -> None:
        print(f"\n\033[1m{text}\033[0m\n" if sys.stdout.isatty() else f"\n{text}\n", flush=True)

    def say(self, text: str) -> None:
        """Tell a paragraph, and give time to read it."""
        print(textwrap.fill(" ".join(text.split()), 88, break_on_hyphens=False), flush=True)
        time.sleep(len(text.split()) * SECONDS_A_WORD * self.pace)

    def show(self, text: str) -> None:
        """A line of what happens."""
        print(f"    {text}", flush=True)

    def place(self, body: dict[str, Any]) -> dict[str, Any]:
        """Send an order; gives it as it was stored."""
        began = time.monotonic()
        status, stored, _ = self.call("POST", "/orders", body)
        expect(status == 201, f"the order is accepted, not {status}")
        item, to = body["items"][0], body.get("shippingAddress", {}).get("city")
        what = f"{item['quantity']} x {item['sku']}" + (f", to be shipped to {to}" if to else "")
        self.show(f"POST /orders ({what})  ->  201 after {1000 * (time.monotonic() - began):.0f} ms")
        return stored

    def watch(self, stored: dict[str, Any], until: Callable[[dict[str, Any]], object], show: bool = True) -> Any:
        """Show an order's timeline as it grows, until the order is as told; gives the order."""
        id, began = stored["id"], seconds(stored["createdAt"])

        def looked() -> dict[str, Any] | None:
            now = self.call("GET", f"/orders/{id}").body
            for line in now["timeline"][self._shown[id] :] if show else ():
                self.show(f"{seconds(line['at']) - began:7.3f} s  {told(line)}")
            self._shown[id] = len(now["timeline"])
            return now if until(now) else None

        return wait_for(looked, f"the order of {stored['customerId']} goes on as told")

    def available(self) -> int:
        """Units of A1 that are free to sell."""
        return self.call("GET", "/stock/A1").body["available"]


def told(line: dict[str, Any]) -> str:
    """A line of a timeline, for people."""
    by, took = line["by"], f" ({line['ms']} ms)" if "ms" in line else ""
    if "event" in line:
        return f"{by}: {line['event']}{took}"
    if "done" in line:
        return f"{by}: done with {line['done']}{took}"
    if "failed" in line:
        wait = seconds(line["next"]) - seconds(line["at"])
        return f"{by}: {line['failed']} FAILED, {line['error']}, try {line['try']}; again in {wait:g} s"
    return f"{by}: " + ", ".join(f"{name} {value}" for name, value in line.items() if name not in ("at", "by", "id"))


def seconds(at: str) -> float:
    """A time of day as the API writes it, in seconds."""
    hours, minutes, rest = at[11:-1].split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(rest)


def mailed(now: dict[str, Any]) -> bool:
    """Whether the customer has been told how the order ended."""
    return any("done" in line and line["by"] == "email" for line in now["timeline"])


def expect(condition: object, what: str) -> None:
    """Raises NotAsTold unless it holds."""
    if not condition:
        raise NotAsTold(what)


def wait_for(looked: Callable[[], Any], what: str, within: float = 60) -> Any:
    """Look until there is something, and give it. Raises NotAsTold."""
    until = time.monotonic() + within
    while not (found := looked()):
        expect(time.monotonic() < until, what)
        time.sleep(0.05)
    return found


# --- the scenes


def a_good_order(story: Story) -> None:
    story.title("1. A good order")
    story.say("Ada orders two of A1. The API stores the order and its event in one write, and answers.")
    done = story.watch(story.place(order("ada", quantity=2)), lambda now: now["status"] == "processed" and mailed(now))
    story.say(f"""Processed, {len(done["timeline"])} lines later. Three handlers worked on it one after the other, and
        none knows the others: each takes an event and answers with the next. {story.available()} of A1 are left, and
        there are a label and a mail.""")
    for name in ("labels/*.svg", "mail/new/*"):
        story.show(str(next((story.program.folder / "data").glob(name))))


def out_of_stock(story: Story) -> None:
    story.title("2. One that is out of stock")
    story.say("Grace orders E5, of which there is none. That is no breakdown but an answer: order_failed.")
    done = story.watch(story.place(order("grace", "E5")), lambda now: now["status"] == "failed" and mailed(now))
    story.say(f"""Failed, {done["failureReason"].replace("_", " ")}. One event, order_failed, went to three queues at
        once: stock to give back, a label to void, a customer to tell.""")


def a_failing_handler(story: Story) -> None:
    story.title("3. A handler that fails, and recovers")
    story.say("Joan's order goes to the city of Jam, where the label printer jams twice. Watch shipping.")
    before = story.available()
    done = story.watch(story.place(order("joan", city="Jam")), lambda now: now["status"] == "processed" and mailed(now))
    failed = sum("failed" in line for line in done["timeline"])
    expect((failed, before - story.available()) == (2, 1), "two tries fail, and one unit is taken")
    story.say("""It failed twice, waited, and came again to shipping alone. Inventory did not run a second time, and
        orders behind it did not wait. Had it failed once more, it would be parked for a person to look at.""")


def a_cancelled_order(story: Story) -> None:
    story.title("4. One that is cancelled on its way")
    before = story.available()
    story.say("Lin's order goes to Jam!, where the printer never works. Its unit is held, its label is not made.")
    stored = story.place(order("lin", city="Jam!"))
    story.watch(stored, lambda now: "failed" in now["timeline"][-1])
    cancelled = story.call("POST", f"/orders/{stored['id']}/cancel")
    expect(cancelled.status == 200, "a pending order can be cancelled")
    story.show("POST /orders/<id>/cancel  ->  200")
    story.watch(stored, lambda now: now["status"] == "cancelled" and mailed(now))
    wait_for(lambda: story.available() == before, "the unit is back")
    story.say(f"""Each handler undid its own part: the unit is back, {before} as before, the label will never be made,
        and the customer was told.""")


def kill_9(story: Story) -> None:
    story.title("5. kill -9")
    if not story.program.survives:
        return story.say("The store that is built in here is in memory only, so this scene has to be left out.")
    story.say("Five orders to Jam, so that all are under way; and then the program dies, as in a power cut.")
    before = story.available()
    stored = [story.place(order(name, city="Jam")) for name in ("mia", "noor", "olga", "pia", "quinn")]
    story.program.kill()
    story.show(f"kill -9 {story.program.process.pid}")
    story.say("""Gone: the queues in memory, every thread, whatever a handler had in its hands. Left: five documents,
        each with its order, its events and the steps recorded so far. It starts again.""")
    story.show(f"ready after {story.program.start():.1f} s")
    story.say("""Whoever swept before might still be alive, so the new process watches that lease stand still for ten
        seconds. Then it asks. This is the order of mia, before and after:""")
    done = [story.watch(each, mailed, show=each is stored[0]) for each in stored]
    for each in done:
        took = [line for line in each["timeline"] if line["by"] == "inventory"]
        expect((each["status"], len(took)) == ("processed", 1), "each is processed, its stock taken once")
        expect((story.program.folder / f"data/labels/{each['id']}.svg").exists(), "each has its label")
    wait_for(lambda: story.available() == before - 5, "five units are gone, no more and no less")
    story.say(f"""All five were answered 201, so all five are there: processed, each with its stock taken once, one
        label and one mail, and {before - 5} of A1, five fewer. Nobody repaired anything: the sweep asked each order
        what was left to do.""")


SCENES = (a_good_order, out_of_stock, a_failing_handler, a_cancelled_order, kill_9)


def tell(pace: float) -> int:
    """The whole story; gives the exit code."""
    folder = Path(tempfile.mkdtemp(prefix="orderproc-demo-"))
    program = Program(folder, pace)
    story = Story(program, pace)
    began = time.monotonic()
    try:
        story.say(f"""This starts the program as `make run` does, on port {program.port} and in {folder}. All you will
            see is real.""")
        story.show(f"ready after {program.start():.1f} s: API, three handlers, store and queues in one process")
        for scene in SCENES:
            scene(story)
        expect(program.stop() == 0, "it ends when it is asked to")
        story.title("The end")
        story.say(f"""That took {time.monotonic() - began:.0f} s. Now yours: `make run` prints a link to a page that
            shows the same, hop by hop, and docs/lessons/ has you break it yourself.""")
        return 0
    except NotAsTold as error:
        print(f"\nThat was not as told: {error}", file=sys.stderr)
        return 1
    finally:
        program.stop()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pace", type=float, default=1.0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return tell(max(0.0, parser.parse_args().pace))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
