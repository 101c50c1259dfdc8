"""A deterministic simulation: the real worker, sweep and stores, and a scheduler that decides what goes wrong when.

The program moves an order by single writes, and a process may die, hang or lose an answer between any two of them. Real
threads meet the dangerous orderings once in a million runs and can never repeat one. Here each delivery, sweep, request
and cancel is an `Actor`: a thread that stands still at every *moment* (before and after each write, before each call of
a function, and while it waits) until the simulation lets it run to its next moment. One actor runs at a time, and what
happens next is drawn from one random generator. So a seed is a whole history, the same on every machine.

At a moment the simulation may also deliver a message (the same one twice at once, too), cancel or place an order,
sweep, kill an actor as `kill -9` would, or leave it standing until the sweep believes it dead and has fenced it.

A write that somebody waits for has one of these fates: done; done twice; lost or done without an answer
(StoreUnavailable); half of its bulk done; its maker dead just before or just after it; or, beside any of these, a copy
of it on a slow server that is done long after everybody forgot it. A write that nobody waits for may be done, lost or
late. The bus loses and repeats messages, and functions time out.

`finish` ends the trouble: late writes arrive, who stood still goes on or dies, and the sweep has the last word. These
invariants hold after every write: no stock is negative, what is available and what orders hold is never more than there
was, no step is recorded twice, no final status changes. And these at the end: every order is final, nothing is pending
or unfinished, and not a unit is missing: what a processed order needs is held once, and nothing else is.

To replay what failed with "seed 42: ...", in tests/fast/test_interleavings.py:  simulation.check(42)
Print in `step` and `fate` to see the history. A change of the program or of the draws makes another history of a seed.
"""

import itertools
import random
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import pytest

from core.base import ids
from core.order.state_machine import holdings
from core.store.connection import StoreUnavailable, connect
from core.store.group_commit import bulk_write
from core.store.orders import StatusConflict
from handlers import inventory, shipping
from tests.support.buses import FakeBus
from tests.support.consumer import Desk, HandDelivery
from tests.support.samples import LABEL, place

STOCK = {"A1": 7, "B2": 6}
BEGIN = datetime(2026, 1, 1)
MOMENTS = 400  # of a run, before the trouble ends


def gift(event, services):
    """A plug-in: one more thing into the parcel, while there are any."""
    services.stock.take([{"sku": "B2", "quantity": 1}])


HANDLERS = {
    "inventory": {type: getattr(inventory, type) for type in ("order_created", "order_failed", "order_cancelled")},
    "shipping": {type: getattr(shipping, type) for type in ("inventory_reserved", "order_failed", "order_cancelled")},
    "gift": {"inventory_reserved": gift},
    "warehouse": {"order_cancelled": inventory.order_cancelled},  # gives back too: it must not come back twice
}


class Killed(BaseException):
    """`kill -9`, as the thread sees it."""


class Simulation:
    """One run at a time: a few orders, little stock, and a lot of trouble. `check` runs one seed."""

    def __init__(self) -> None:
        self.actor: Actor | None = None
        self.trouble = False
        # The simulation is the desk's Lambda functions and stop signal as well: see `invoke` and `wait`.
        self.desk = Desk(
            LossyBus(self), delays="1,1", stock={}, database=connect("memory"), functions=self, stop=self,
            **HANDLERS,
        )  # fmt: skip
        self.database, self.orders, self.stock = self.desk.database, self.desk.orders, self.desk.stock
        self.sweeps = [self.desk.sweep, self.desk.new_sweep()]
        self._take_over()

    def _take_over(self) -> None:
        """Swap the parts that have threads of their own. Nothing else in the tests reaches into the program like this:
        the program has no use for such seams, and a simulation that left these out would decide nothing."""
        store = self.desk.store
        orders, stock = (SimulatedGroupCommit(self, self.database[name]) for name in ("orders", "stock"))
        store.orders._bulk = store.open_orders._bulk = orders
        store.stock._bulk = store.moves._bulk = stock
        self.desk.worker._pools = dict.fromkeys(HANDLERS, self)  # see `submit`

    def check(self, seed: int) -> None:
        """A run from start to end; AssertionError names the seed that shows the fault again."""
        with pytest.MonkeyPatch.context() as monkeypatch:
            self._swap_the_clock(monkeypatch)
            self._start(seed)
            try:
                self._run(MOMENTS)
                self._finish()
                self._check_at_the_end()
            except AssertionError as error:
                raise AssertionError(f"seed {seed}: {error}") from error
            finally:
                for actor in self.actors[:]:
                    actor.abandon()

    def _swap_the_clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Time passes by the look: with the real clock, a slow moment would make another history of the same seed."""
        moments = itertools.count()
        for name, module in list(sys.modules.items()):
            if name.startswith("core.") and hasattr(module, "now"):
                monkeypatch.setattr(module, "now", lambda: BEGIN + timedelta(milliseconds=next(moments)))

    def _start(self, seed: int) -> None:
        self.dice, self.trouble, self.actor = random.Random(seed), False, None
        self.desk.store.lease.now = 1
        self.actors: list[Actor] = []
        self.paused: Actor | None = None
        self.messages: list[tuple[str, str, bytes, int]] = []  # handler, id, body, tries
        self.late_writes: list[tuple] = []
        self.placed, self.ended = 0, dict[str, str]()
        for name in ("orders", "stock"):
            self.database[name].delete_many({})
        self.stock.fill(STOCK)
        self.trouble, self.calm = True, self.dice.choice([1, 3, 10])  # the larger, the fewer writes go wrong

    def _run(self, moments: int) -> None:
        for _ in range(moments):
            self.dice.choices(
                [self.step, self.deliver, self.sweep, self.cancel, self.order, self.pause, self.arrive_late, self.kill],
                [80, 10, 1.5, 0.4, 2, 3, 1.5, 0.3],
            )[0]()

    # --- what happens next

    def begin(self, what, *args) -> None:
        if len(self.actors) < 6:
            self.actors.append(Actor(self, what, *args))

    def step(self) -> None:
        awake = [actor for actor in self.actors if actor is not self.paused]
        if awake:
            actor = self.dice.choice(awake)
            actor.step()
            if actor.over:
                self.actors.remove(actor)

    def deliver(self) -> None:
        if self.messages:
            chosen = self.dice.randrange(len(self.messages))
            message = self.messages[chosen] if self.dice.random() < 0.4 else self.messages.pop(chosen)
            self.begin(self.desk.worker.deliver, SimulatedDelivery(self, *message))

    def sweep(self) -> None:
        self.begin(self.dice.choice(self.sweeps).round)

    def cancel(self) -> None:
        if documents := self._all_orders():
            id = self.dice.choice(documents)["_id"]
            self.begin(lambda: self.desk.outbox.publish_pending(self.desk.cancel(id)))

    def order(self) -> None:
        skus, number = self.dice.choices(list(STOCK), k=2), self.placed
        lines = [{"sku": sku, "quantity": self.dice.randint(1, 2), "price": 1} for sku in skus]
        if number < 5:
            self.placed, id = number + 1, f"{number:08}-0000-7000-8000-000000000000"
            self.begin(lambda: self.desk.outbox.publish_pending(place(self.desk.store, _id=id, items=lines)))

    def pause(self, actor: "Actor | None" = None) -> None:
        """One stands still until another does, and sometimes everything gets old meanwhile and is swept."""
        self.paused = actor or self.dice.choice([None, *self.actors])
        if self.dice.random() < 0.5:
            self.desk.pass_time(40 * 60)
            self.sweep()

    def arrive_late(self) -> None:
        if self.late_writes:
            self._apply(*self.late_writes.pop(self.dice.randrange(len(self.late_writes))))

    def kill(self) -> None:
        if self.actors:
            self._end(self.dice.choice(self.actors))

    def _end(self, actor: "Actor") -> None:
        actor.killed = True
        actor.step()
        self.actors.remove(actor)

    # --- what parts of the program call

    def moment(self) -> None:
        """Here anything else may happen, if an actor is running."""
        if self.actor:
            self.actor.stand()

    def submit(self, call, *args) -> None:
        """As the worker's pool: run it on the thread that delivers."""
        call(*args)

    def wait(self, seconds: float) -> bool:
        """As the stop signal, on which the worker waits while the store is away or a shortage is in doubt."""
        self.moment()
        return not self.trouble or self.dice.random() < 0.5

    def is_set(self) -> bool:
        return False

    def invoke(self, function: str, payload: dict) -> dict:
        """As the Lambda functions."""
        self.moment()
        if self.trouble and self.dice.random() < 0.15:
            raise TimeoutError(function)
        return LABEL

    # --- what becomes of a write

    def fate(self, collection, writes, once: bool) -> None:
        """What becomes of a bulk that somebody waits for."""
        trouble = self.trouble and self.actor
        if trouble and self.dice.random() < 0.08:  # no answer to the first copy, which arrives whenever it likes
            self.late_writes.append((collection, writes))
            if once:
                raise StoreUnavailable("no answer, and it is not sent again")
        luck = self.dice.random() * self.calm if trouble else 1.0
        if luck < 0.04:
            self.actor.die()
        if luck < 0.08:
            self._apply(collection, self.dice.sample(writes, self.dice.randrange(len(writes) + 1)))
            raise StoreUnavailable("no answer, and only a part was done")
        for _ in range(2 if luck < 0.2 and not once else 1):
            errors = self._apply(collection, writes)
        if luck < 0.25:
            self.actor.die()
        if luck < 0.3:
            raise StoreUnavailable("done, and nobody learns it")
        if trouble and collection.name == "stock" and self.dice.random() < 0.1:
            self.pause(self.actor)  # with moves pending and nothing recorded
        for error in errors.values():
            raise error

    def fate_of_an_offer(self, collection, writes, lost: float = 0.3) -> None:
        """What becomes of writes that nobody waits for."""
        luck = self.dice.random() if self.trouble else 1.0
        if luck < lost / 2:
            self.late_writes.append((collection, writes))
        elif luck > lost:
            self._apply(collection, writes)

    def _apply(self, collection, writes) -> dict[int, Exception]:
        errors = bulk_write(collection, writes)
        self._check_always()
        return errors

    # --- the end: no more trouble, and the sweep has the last word

    def _finish(self) -> None:
        self.trouble, self.paused = False, None
        self.desk.pass_time(40 * 60)
        self._calm_round()  # fences whoever stands still
        for actor in self.actors[:]:
            if self.dice.random() < 0.3:
                self._end(actor)
        while self.actors:
            self.step()
        while self.late_writes:
            self.arrive_late()
        self._redrive()
        for _ in range(20):
            self.desk.pass_time(40 * 60)
            if not self._calm_round():
                return
        raise AssertionError("it does not come to an end")

    def _redrive(self) -> None:
        """As a start does on a bus in memory."""
        self.desk.store.open_orders.wake(100, before=ids.now())

    def _calm_round(self) -> int:
        found = self.sweeps[0].round()
        while self.messages:
            self.desk.worker.deliver(SimulatedDelivery(self, *self.messages.pop(0)))
        return found

    def _all_orders(self) -> list[dict[str, Any]]:
        return sorted(self.database["orders"].find(), key=lambda document: document["_id"])

    # --- what must be true

    def _check_always(self) -> None:
        held = Counter()
        for document in self.database["orders"].find():
            held.update(holdings(document))
            steps = Counter(step["step"] for step in document["steps"])
            assert all(times == 1 for times in steps.values()), f"a step was recorded twice: {steps}"
            if document["status"] != "pending":
                before = self.ended.setdefault(document["_id"], document["status"])
                assert before == document["status"], f"{before} became {document['status']}"
        for document in self.database["stock"].find():
            sku, available = document["_id"], document["available"]
            assert available >= 0, f"{sku}: {available} available"
            assert available + held[sku] <= STOCK[sku], f"{sku}: {available} available, {held[sku]} held"

    def _check_at_the_end(self) -> None:
        self._check_always()
        held = Counter()
        for document in self._all_orders():
            held.update(holdings(document))
            assert document["status"] != "pending" and "due" not in document, document
            wanted = Counter()
            for item in document["items"] if document["status"] == "processed" else []:
                wanted[item["sku"]] += item["quantity"]
            gifts = Counter(holdings(document)) - wanted
            assert not wanted - Counter(holdings(document)), document
            assert not gifts or (gifts == {"B2": 1} and document["status"] == "processed"), document
        assert not self.desk.pending_moves()
        for document in self.database["stock"].find():
            assert document["available"] + held[document["_id"]] == STOCK[document["_id"]], (document, held)


class Actor:
    """A thread that runs from one moment to the next when `step` lets it, and otherwise stands still."""

    def __init__(self, simulation: Simulation, what, *args) -> None:
        self.simulation, self.killed, self.over = simulation, False, False
        self.error: BaseException | None = None
        self.go, self.stood = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, args=(what, *args), daemon=True)
        self.thread.start()

    def _run(self, what, *args) -> None:
        self.go.acquire()
        try:
            if not self.killed:
                what(*args)
        except (Killed, StoreUnavailable, StatusConflict):
            pass
        except BaseException as error:
            self.error = error
        self.over = True
        self.stood.release()

    def step(self) -> None:
        """Let it run to its next moment, or to its end."""
        self.simulation.actor = self
        self.go.release()
        assert self.stood.acquire(timeout=10)
        self.simulation.actor = None
        if self.error:
            raise self.error

    def stand(self) -> None:
        """On its own thread: a moment. Who is dead has none, whatever the program catches."""
        if self.killed:
            raise Killed
        self.stood.release()
        self.go.acquire()
        if self.killed:
            raise Killed

    def die(self) -> None:
        """On its own thread, at once."""
        self.killed = True
        raise Killed

    def abandon(self) -> None:
        """Have its thread end, without waiting for it."""
        self.killed = True
        self.go.release()


class SimulatedGroupCommit:
    """In place of group commit, with its promises, and with everything that may happen meanwhile."""

    away = False

    def __init__(self, simulation: Simulation, collection) -> None:
        self._simulation, self._collection = simulation, collection

    def do(self, writes=(), read=(), once=False) -> dict[str, Any]:
        self._simulation.moment()
        if writes:
            self._simulation.fate(self._collection, list(writes), once)
        self._simulation.moment()
        return {document["_id"]: document for document in self._collection.find({"_id": {"$in": list(read)}})}

    def do_each(self, writes) -> list[dict[str, Any]]:
        ids = [write.filter["_id"] for write in writes]
        documents = self.do(writes, ids) if writes else {}
        return [documents.get(id, {}) for id in ids]

    @contextmanager
    def reading(self):
        yield self._collection

    def offer(self, *writes) -> None:
        self._simulation.fate_of_an_offer(self._collection, list(writes))


class SimulatedDelivery(HandDelivery):
    """A delivery whose retry may come as soon as it likes, and may be lost like anything on the bus."""

    def __init__(self, simulation: Simulation, *args) -> None:
        super().__init__(*args)
        self._simulation = simulation

    def retry(self, seconds, tries) -> None:
        if self._simulation.actor and self._simulation.actor.killed:
            raise Killed
        super().retry(seconds, tries)
        if not (self._simulation.trouble and self._simulation.dice.random() < 0.2):
            self._simulation.messages.append((self.handler, self.id, self.body, tries))


class LossyBus(FakeBus):
    """Keeps what it is given, loses some of it, and delivers anything any number of times."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self._simulation = simulation

    def publish(self, message, done) -> None:
        simulation = self._simulation
        outcome = "unsent" if simulation.trouble and simulation.dice.random() < 0.1 else "confirmed"
        if outcome == "confirmed" and not (simulation.trouble and simulation.dice.random() < 0.1):
            handlers = [message.handler] if message.handler else simulation.desk.subscribers[message.type]
            simulation.messages += [(handler, message.id, message.body, 0) for handler in handlers]
        done(outcome)
