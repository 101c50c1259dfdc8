"""A handler that takes its time, SLOW_SECONDS or 3: only its own queue gets long, and every order is done before."""

import os
import time


def order_confirmed(event, services):
    time.sleep(float(os.environ.get("SLOW_SECONDS", "3")))
