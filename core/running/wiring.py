"""The parts put together: which store, which bus, and for `make run` the consumer beside the API in one process."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from core.base.settings import Settings
from core.bus.bus import Bus
from core.bus.memory import MemoryBus
from core.bus.rabbit import Rabbit
from core.running.embedded import bundled_store, only_one
from core.store.connection import connect
from core.store.orders import Orders
from core.store.stock import Stock


def connect_all(settings: Settings, store_url: str) -> tuple[Orders, Stock, Bus]:
    """Orders and stock in the store, and the carrier that AMQP_URL names."""
    database = connect(store_url)
    in_memory = settings.amqp_url == "embedded"
    bus: Bus = MemoryBus() if in_memory else Rabbit(settings.amqp_url, settings.retry_delays)
    return Orders(database), Stock(database), bus


def start_bundled(settings: Settings, at_end: ExitStack) -> str:
    """Start what lives inside this process, until `at_end`; gives the store's URL. Raises SettingInvalid."""
    if settings.single_process:
        at_end.enter_context(only_one(settings.data_dir))
    if settings.mongodb_url == "embedded":
        return at_end.enter_context(bundled_store(settings.data_dir / "mongo"))
    return settings.mongodb_url


def run_beside(consume: Callable[[], None], bus: Bus, stop: threading.Event, at_end: ExitStack) -> None:
    """Consume on a thread until `stop`; returns when the bus knows every queue. Neither half goes on alone."""
    pool = at_end.enter_context(ThreadPoolExecutor(1, "consumer"))
    running = pool.submit(consume)
    at_end.callback(running.result)  # raises what ended it
    at_end.callback(stop.set)
    running.add_done_callback(lambda _: stop.set())
    while isinstance(bus, MemoryBus) and not (bus.consuming or running.done()):
        time.sleep(0.01)
