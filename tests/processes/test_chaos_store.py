"""The scenarios of tools/chaos/store.py, in a short form: each ends with every promise held."""

import subprocess
import sys

import pytest

from tools.chaos.system import ROOT


@pytest.mark.parametrize(("scenario", "seconds"), [("overload", 10), ("refusing", 10), ("stale", 1)])
def test_every_promise_holds_on_a_store_in_trouble(rabbit, scenario, seconds):
    command = [sys.executable, "-m", "tools.chaos.store", scenario, "--seconds", str(seconds)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert run.stdout.endswith("every promise held\n")
