"""`/docs` as a real browser shows it."""

import json

import pytest

from tests.support.browser import CHROMIUM, chromium
from tools.chaos.system import ROOT, SECRET

SPEC = json.loads((ROOT / "openapi.json").read_text())
CREATE = "#operations-orders-createOrder"


@pytest.fixture
def docs(embedded):
    """The page, behind a proxy that strips a prefix; what it asked for; what its console said."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")  # in CI a skip is a failure
    origin = f"http://127.0.0.1:{embedded(mongodb_url='memory').port}"
    asked, said = [], []
    with chromium() as browser:
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.route(
            f"{origin}/shop/**",
            lambda route: route.fulfill(response=route.fetch(url=route.request.url.replace("/shop/", "/"))),
        )
        page.goto(f"{origin}/shop/docs")
        yield page, f"{origin}/shop/", asked, said


def test_the_docs_page_shows_every_call_and_tries_one_within_its_policy(docs):
    page, prefix, asked, said = docs
    page.wait_for_selector(CREATE)
    shown = page.eval_on_selector_all(".opblock-summary-path", "found => found.map(each => each.dataset.path)")
    assert set(shown) == set(SPEC["paths"])
    for summary in page.query_selector_all(".opblock-summary-control"):
        summary.click()
    page.click(".auth-wrapper .authorize")
    page.fill(".modal-ux input", SECRET)
    page.click(".modal-ux .authorize")
    page.click(".modal-ux .btn-done")
    page.click(f"{CREATE} .try-out__btn")
    page.click(f"{CREATE} .execute")
    answer = page.wait_for_selector(f"{CREATE} .live-responses-table .response-col_status")
    assert page.inner_text(f"{CREATE} .live-responses-table tbody .response-col_status").startswith("201")
    assert answer and json.loads(page.inner_text(f"{CREATE} .live-responses-table .highlight-code code"))["id"]
    page.evaluate(f"sessionStorage.setItem('key', '{SECRET}')")  # as the live page does
    page.reload()
    page.wait_for_selector(".auth-wrapper .authorize.locked")
    assert said == [], "a violation of Content-Security-Policy is an error in the console"
    assert f"{prefix}orders" in asked and all(url.startswith((prefix, "data:")) for url in asked), asked
