"""A handler that fails twice for every order and then works: to watch retries. A restart makes it forget."""

from collections import Counter

FAILURES = 2
_tries = Counter()


def order_confirmed(event, services):
    _tries[event.id] += 1
    if _tries[event.id] <= FAILURES:
        raise ConnectionError(f"try {_tries[event.id]}: nobody answers")
