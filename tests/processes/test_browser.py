"""The pages as a real browser shows them."""

import json
import re
import shutil
import subprocess

import pytest

from tools.chaos.system import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
)


@pytest.fixture
def browse(tmp_path):
    """A function that gives a page's elements, as they are once its scripts have run."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")  # in CI a skip is a failure

    def dom(url: str) -> str:
        command = [CHROMIUM, *QUIET.split(), f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=8000"]
        ran = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=60)
        return ran.stdout

    return dom


def test_the_docs_page_shows_every_call_from_local_files_only(embedded, browse):
    running = embedded(mongodb_url="memory")
    page = browse(f"http://127.0.0.1:{running.port}/docs")
    shown = set(re.findall(r'opblock-summary-path[^>]*data-path="([^"]*)"', page))
    assert shown == set(json.loads((ROOT / "openapi.json").read_text())["paths"])
    assert re.findall(r'(?:src|href)="https?://(?!127\.0\.0\.1)[^"]*"', page) == []


def test_the_first_page_links_to_what_there_is(embedded, browse):
    running = embedded(mongodb_url="memory")
    for link in re.findall(r'href="(/[^"]*)"', browse(f"http://127.0.0.1:{running.port}/")):
        assert running.call("GET", link)[0] == 200, link
