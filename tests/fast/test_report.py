"""What consumers report of their handlers, into the store and the metrics."""

import threading
from datetime import timedelta

import pytest
from prometheus_client import REGISTRY

from core.flow import report
from core.flow.report import start_reporting
from core.store.connection import DocumentExists, StoreUnavailable, connect
from core.store.store import Store
from tests.support.buses import FakeBus
from tools.chaos.system import wait_for

HANDLERS = {"email": ["order_confirmed", "order_failed"], "points": ["order_confirmed"]}


class Reporter:
    """A consumer's report on a bus of its own; `tell` counts how often it was written."""

    def __init__(self, store, handlers=HANDLERS):
        self.bus, self.stop, others = FakeBus(), threading.Event(), threading.enumerate()
        start_reporting(store.reports, self.bus, handlers, (2, 0.5), self.stop)
        [self.thread] = [each for each in threading.enumerate() if each.name == "report" and each not in others]

    def end(self):
        self.stop.set()
        self.thread.join(5)
        assert not self.thread.is_alive()


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(report, "EVERY", 0.02)
    return Store(connect("memory"))


@pytest.fixture
def reporter(store):
    reporter = Reporter(store)
    yield reporter
    reporter.end()


def test_each_handler_is_told_with_what_waits_and_is_dead(store, reporter):
    reporter.bus.depths, reporter.bus.dead = {"email": 3, "inventory": 9}, {"email": 1}
    wait_for(lambda: [each["waiting"] for each in store.reports.all()] == [3, 0], 5)
    email, points = store.reports.all()
    assert email.pop("seen").endswith("Z")
    assert email == {
        "name": "email", "takes": HANDLERS["email"], "waiting": 3, "dead": 1, "retryDelays": [2, 0.5]
    }  # fmt: skip
    assert (points["name"], points["takes"], points["dead"]) == ("points", ["order_confirmed"], 0)
    assert REGISTRY.get_sample_value("orderproc_dead_messages", {"handler": "email"}) == 1


def test_two_consumers_tell_of_their_own_handlers(store, reporter):
    other = Reporter(store, {"shipping": ["inventory_reserved"]})
    wait_for(lambda: [each["name"] for each in store.reports.all()] == ["email", "points", "shipping"], 5)
    other.end()


def test_who_does_not_consume_is_not_seen(store, reporter):
    wait_for(store.reports.all, 5)
    reporter.bus.consuming = False
    pause = threading.Event().wait
    pause(0.1)  # for what is on its way
    before = store.reports.all()
    pause(0.2)
    assert store.reports.all() == before
    reporter.bus.consuming = True
    wait_for(lambda: store.reports.all()[0]["seen"] > before[0]["seen"], 5)


def test_a_store_that_is_away_is_told_later(store, reporter, monkeypatch):
    put, failures = store.reports._bulk.do, iter([StoreUnavailable("away"), DocumentExists("another was first")] * 3)

    def do(*args, **named):
        if error := next(failures, None):
            raise error
        return put(*args, **named)

    monkeypatch.setattr(store.reports._bulk, "do", do)
    reporter.bus.depths = {"email": 7}
    wait_for(lambda: any(each["waiting"] == 7 for each in store.reports.all()), 5)


def test_a_handler_that_nobody_ran_for_a_day_is_forgotten(store, reporter, monkeypatch):
    wait_for(store.reports.all, 5)
    reporter.end()
    monkeypatch.setattr("core.store.consumers.FORGOTTEN_AFTER", timedelta(0))
    assert store.reports.all() == []
