"""Makes the README's pictures of the live page anew: `make pictures` writes docs/page.png and docs/page-dark.png.

They show a real order whose label has failed twice, on a program that runs for the moment on a folder of its own.
"""

import tempfile
from contextlib import ExitStack
from pathlib import Path

from playwright.sync_api import Browser, Page, expect

from tests.support.browser import chromium
from tools.chaos.system import ROOT, SECRET, System

SIZE = {"width": 1366, "height": 768}
DELAYS = "2,15,90,900"  # as they are by default


def main() -> None:
    """Write both pictures."""
    with ExitStack() as at_end:
        folder, browser = at_end.enter_context(tempfile.TemporaryDirectory()), at_end.enter_context(chromium())
        running = at_end.enter_context(System(Path(folder), "memory", "embedded", RETRY_DELAYS=DELAYS))
        take(open_page(browser, f"http://127.0.0.1:{running.port}/#key={SECRET}"))


def take(page: Page) -> None:
    for example, end in (("Out of stock", "Failed"), ("Good order", "Processed"), ("Jammed label", "failed twice")):
        page.get_by_role("button", name=example).click()
        expect(page.locator("#headline")).to_contain_text(end, timeout=30_000)
    for name, theme in (("page.png", "Dark"), ("page-dark.png", "Light")):
        page.wait_for_timeout(1100)  # what is drawn each second
        page.screenshot(path=ROOT / "docs" / name, animations="disabled")
        page.get_by_role("button", name=theme).click()


def open_page(browser: Browser, url: str) -> Page:
    page = browser.new_page(viewport=SIZE, color_scheme="light", reduced_motion="reduce")
    page.goto(url)
    expect(page.get_by_label("A1")).to_be_visible()
    return page


if __name__ == "__main__":
    main()
