"""Clients that are made from `openapi.json`, and what makes requests of it by itself, against the running program."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.chaos.system import ROOT, SECRET

DOCS = (ROOT / "docs/clients.md").read_text()
PLACED = {"customerId": "ada", "items": [{"sku": "A1", "quantity": 2, "price": 19.99}]}


@pytest.fixture
def running(embedded):
    """The program, which keeps orders pending, with one order in it."""
    system = embedded(mongodb_url="memory", HANDLERS="email")
    assert system.call("POST", "/orders", PLACED | {"customerId": "before"})[0] == 201
    return system


def block(language, running):
    """The n-th lines of docs/clients.md in a language, pointed at the running program."""
    found = re.search(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)[1]
    return found.replace("127.0.0.1:8080", f"127.0.0.1:{running.port}").replace("demo-key", SECRET)


def command(name, running):
    """A command of docs/clients.md that begins so."""
    line = re.search(rf"^{name} .*", DOCS, re.MULTILINE)[0]
    return line.replace("127.0.0.1:8080", f"127.0.0.1:{running.port}").split()


def run(arguments, folder):
    """What a program prints; it must end well."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ran = subprocess.run(
        arguments, cwd=folder, capture_output=True, text=True, timeout=120, env={**os.environ, "PATH": path}
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def check(read, page, older, cancelled):
    """What a client got, as JSON: the order it placed, two pages with an order each, the cancelled order."""
    assert {name: read[name] for name in PLACED} == PLACED and read["total"] == 39.98
    assert read["status"] == "pending" and read["timeline"][0]["event"] == "order_created"
    assert [order["id"] for order in page["orders"]] == [read["id"]] == [page["next"]]
    assert [order["customerId"] for order in older["orders"]] == ["before"] and older["next"] is None
    assert cancelled["id"] == read["id"] and cancelled["status"] == "cancelled"
    assert cancelled["timeline"][-1]["event"] == "order_cancelled"


def test_a_generated_python_client_places_reads_pages_and_cancels_an_order(running, tmp_path):
    generated = run(command("openapi-python-client generate", running), tmp_path)
    assert "Warning" not in generated, generated
    tell = "print(json.dumps([each.to_dict() for each in (read, page, older, cancelled)], default=str))"
    (tmp_path / "client.py").write_text(f"import json\n{block('python', running)}{tell}\n")
    check(*json.loads(run([sys.executable, "client.py"], tmp_path)))


def test_a_generated_typescript_client_places_reads_pages_and_cancels_an_order(running, tmp_path):
    if shutil.which("npx") is None:
        pytest.skip("no npm on this machine")  # in CI a skip is a failure
    folder = shutil.copytree(ROOT / "tests/clients", tmp_path / "client")
    run(["npm", "ci", "--no-audit", "--no-fund"], folder)
    run(command("npx openapi-typescript", running), folder)
    tell = "console.log(JSON.stringify([read, page, older, cancelled].map((each) => each.data)));"
    (folder / "client.ts").write_text(f"{block('ts', running)}{tell}\n")
    run(["npx", "tsc"], folder)
    check(*json.loads(run(["node", "client.js"], folder)))


def test_the_documented_versions_are_those_that_are_tested():
    pinned = json.loads((ROOT / "tests/clients/package.json").read_text())
    npm = {
        f"{name}@{version}" for kind in ("dependencies", "devDependencies") for name, version in pinned[kind].items()
    }
    assert set(re.search("npm install (.*)", DOCS)[1].split()) == npm
    assert re.search("pip install (.*)", DOCS)[1] in (ROOT / "requirements-dev.txt").read_text()


def test_schemathesis_finds_nothing(embedded, tmp_path):
    system = embedded(mongodb_url="memory")
    where, config = f"http://127.0.0.1:{system.port}/openapi.json", ROOT / "tests/processes/schemathesis.toml"
    header = f"Authorization: Bearer {SECRET}"
    options = ["--max-examples", "10", "--seed", "1", "--header", header]
    print(run(["st", "--config-file", config, "run", where, *options], tmp_path))
    assert '"ERROR"' not in system.log("api")
