"""The live page in a real browser. Each state that it knows is reached for real."""

import ast
import json
import re
import shutil
import time

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.support.browser import CHROMIUM, chromium
from tests.support.servers import BrokerNode, installed
from tools.chaos.system import ROOT, SECRET, System, wait_for

POINTS = 'def order_confirmed(event, services):\n    services.log.info("points awarded")\n'
JAMMED = {"name": "A", "line1": "1 Road", "city": "Jam!", "postalCode": "1", "country": "DE"}
FOCUSED = """() => {
  const { activeElement: focused, body } = document;
  return focused === body ? "" : focused.ariaLabel || focused.innerText;
}"""
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")  # in CI a skip is a failure
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The program as `make run` starts it, with a handler of one's own and short retries."""
    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(ROOT / "handlers", folder / "handlers")
    (folder / "handlers/points.py").write_text(POINTS)
    with System(
        folder, "memory", "embedded", RETRY_DELAYS="0.3,2.5", HANDLERS_DIR=str(folder / "handlers"),
        API_KEYS=f"chaos:{SECRET}:admin,shop:client-secret:client", LOG_LEVEL="debug",
    ) as running:  # fmt: skip
        yield running


class Visit:
    """Somebody's look at the page; remembers what the page asked for and what the console said."""

    def __init__(self, browser, running, key=SECRET, width=1366, **options):
        self.home = f"http://127.0.0.1:{running.port}/"
        self.context = browser.new_context(viewport={"width": width, "height": 768}, **options)
        self.page = self.context.new_page()
        self.asked, self.complaints = [], []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._heard)
        self.page.goto(self.home + (f"#key={key}" if key else ""))

    def _heard(self, message):
        # An answer 4xx, and none at all, is told as an error too; the tests want some of those.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.complaints.append(message.text)

    def says(self, headline, text=""):
        expect(self.page.locator("#headline")).to_contain_text(headline)
        expect(self.page.locator(".head p")).to_contain_text(text)

    def place(self, example):
        self.page.get_by_role("button", name=example).click()

    def send(self, body):
        self.page.get_by_role("button", name="Your own body").click()
        self.page.get_by_label("Body, as JSON").fill(body if isinstance(body, str) else json.dumps(body))
        self.page.get_by_role("button", name="Send").click()

    def steps(self):
        return self.page.locator("#steps button").all_inner_texts()

    def picture(self):
        return self.page.locator("#picture")

    def tab_to(self, name):
        """Press Tab until the focus is on the control of this name."""
        for _ in range(80):
            self.page.keyboard.press("Tab")
            if name in self.page.evaluate(FOCUSED):
                return
        pytest.fail(f"no way to {name} by keyboard")


@pytest.fixture
def visit(browser):
    """A function that opens the page; at the end nothing may have gone elsewhere, or been complained about."""
    visits = []

    def start(running, **options):
        visits.append(Visit(browser, running, **options))
        return visits[-1]

    yield start
    for each in visits:
        each.context.close()
        assert each.complaints == []
        assert {url for url in each.asked if not url.startswith(each.home)} == set()


def order(**fields):
    return {"customerId": "ada", "items": [{"sku": "B2", "quantity": 1, "price": 5}], **fields}


# --- the states


def test_a_good_order_is_replayed_and_ends_processed(demo, visit):
    mine = visit(demo)
    mine.says("Choose an order" if demo.orders() else "No order yet", "Press Good order")
    mine.place("Good order")
    mine.says("Replay, moment")
    mine.says("Processed in", "No handler calls another")
    assert [text.split()[:2] for text in mine.steps()][:3] == [
        ["api", "order_created"], ["inventory", "inventory_reserved"], ["shipping", "order_confirmed"],
    ]  # fmt: skip
    assert "key=" not in mine.page.url
    expect(mine.page.locator("#json")).to_contain_text('"specversion": "1.0"')


def test_a_handler_of_ones_own_has_its_row(demo, visit):
    mine = visit(demo, reduced_motion="reduce")
    mine.place("Good order")
    mine.says("Processed in")
    expect(mine.picture()).to_contain_text("points")
    expect(mine.page.locator("#steps")).to_contain_text(re.compile(r"points\s*done"))


def test_an_order_out_of_stock_fails_and_everybody_is_told(demo, visit):
    mine = visit(demo, reduced_motion="reduce")
    mine.place("Out of stock")
    mine.says("Failed: out of stock", "inventory, shipping and email at once")


def test_a_refused_order_shows_its_fault_and_that_nothing_is_stored(demo, visit):
    mine, before = visit(demo), len(demo.orders())
    mine.place("Bad price")
    mine.says("Refused: one fault in the body", "/items/0/price must have at most 2 decimals in USD")
    expect(mine.picture()).to_contain_text("nothing stored")
    assert len(demo.orders()) == before


def test_a_failing_label_is_retried_counted_down_and_works_in_the_end(demo, visit):
    mine = visit(demo, reduced_motion="reduce")
    mine.place("Jammed label")
    mine.says("Retrying: shipping failed twice", "What is done does not run again")
    expect(mine.page.get_by_role("timer")).to_have_text(re.compile(r"Try 3 of 3 is due in [123] s\."))
    expect(mine.picture()).to_contain_text("next try in")
    mine.says("Processed in")
    assert [text.split()[0] for text in mine.steps()].count("shipping") == 3


def test_a_parked_step_is_redriven_and_its_order_cancelled(demo, visit):
    mine = visit(demo, reduced_motion="reduce")
    mine.send(order(shippingAddress=JAMMED))
    mine.says("Parked: shipping failed 3 times", "Mend the handler, then press Redrive")
    expect(mine.picture()).to_contain_text("1 here")
    mine.page.get_by_role("button", name="Redrive").click()
    mine.says("Retrying: shipping failed")
    mine.page.get_by_role("button", name="Cancel order").click()
    mine.says("Cancelled after", "each undoes what it did")
    expect(mine.page.locator("#orders [aria-current=true]")).to_contain_text("cancelled")


def test_a_wrong_key_is_asked_for_and_its_successor_remembered(demo, visit):
    mine = visit(demo, key="nobody's")
    mine.says("This key is not known")
    mine.page.get_by_label("API key").fill("client-secret")
    mine.page.keyboard.press("Enter")
    mine.says("No order yet")
    mine.page.reload()
    mine.says("No order yet")
    mine.page.get_by_label("A1").fill("1")
    mine.page.keyboard.press("Enter")
    expect(mine.page.locator("#stock-says")).to_have_text("A1: this takes the role admin")
    expect(mine.page.get_by_label("A1")).not_to_have_value("1")


@pytest.fixture
def real(tmp_path, store_server):
    """The program on a broker of its own; gives (program, broker)."""
    if not installed("rabbitmq-server"):
        pytest.skip("rabbitmq-server is not installed here")
    (tmp_path / "broker").mkdir()
    node = BrokerNode(tmp_path / "broker")
    try:
        node.start()
        with System(tmp_path, store_server.url("page"), node.url()) as running:
            running.call("PUT", "/stock/A1", {"available": 100})
            yield running, node
    finally:
        node.kill()


def test_what_is_away_shows_and_what_comes_back_goes_on(real, visit):
    running, broker = real
    mine = visit(running, reduced_motion="reduce")

    running.kill("consumer")
    mine.place("Good order")
    mine.says("Under way", "inventory has been asked")
    mine.says("Waiting: nobody takes inventory's queue", "Is a consumer running?")
    expect(mine.picture()).to_contain_text("no consumer")
    running.start("consumer")
    mine.says("Processed in")

    broker.kill()
    expect(mine.page.get_by_label("Health")).to_contain_text("broker away")
    mine.place("Good order")
    mine.says("Accepted, and safe without the broker", "waits in the outbox")
    expect(mine.picture()).to_contain_text("away")

    running.stop("api")
    mine.says("The API does not answer", "Trying again in")
    mine.place("Good order")  # asked again under one key, until there is an answer
    time.sleep(3)
    running.start("api")
    mine.says("Accepted, and safe without the broker")
    wait_for(lambda: len(running.orders()) == 3)
    broker.start()
    mine.says("Processed in")


# --- what a person does


def test_the_replay_is_stepped_through_and_says_what_happened(demo, visit):
    mine = visit(demo, reduced_motion="reduce")
    mine.place("Good order")
    mine.says("Processed in")
    mine.page.locator("#replay").click()
    mine.says("Replay, moment")
    for _ in range(20):
        mine.page.get_by_label("One moment back").press("ArrowLeft")
    titles = []
    while "Replay" in (title := mine.page.locator("#headline").inner_text()):
        titles.append(re.sub(r".*: ", "", title))
        mine.page.get_by_label("One moment on").click()
    assert titles[:6] == [
        "a request", "one write", "sent to the exchange", "in inventory's queue", "inventory at work", "one write",
    ]  # fmt: skip
    mine.page.get_by_label("One moment back").click()
    mine.says(f"moment {len(titles)} of {len(titles)}")


def test_faults_of_ones_own_body_lead_to_their_fields(demo, visit):
    mine = visit(demo, reduced_motion="reduce")
    mine.send(order(customerId="", items=[{"sku": "A1", "quantity": 0, "price": 1}]))
    faults = mine.page.locator("#faults button")
    expect(faults).to_have_text([re.compile("Line 2, /customerId"), re.compile("Line 6, /items/0/quantity")])
    faults.nth(1).click()
    area = mine.page.get_by_label("Body, as JSON")
    assert area.evaluate("area => area.value.slice(area.selectionStart, area.selectionEnd)").strip() == '"quantity": 0,'
    area.fill("{")
    mine.page.get_by_role("button", name="Send").click()
    expect(faults).to_have_count(1)
    area.fill(json.dumps(order()))
    mine.page.get_by_role("button", name="Send").click()
    mine.says("Processed in")


def test_what_a_customer_wrote_is_shown_as_text(demo, visit):
    mine = visit(demo, reduced_motion="reduce")
    name = "<img src=x onerror=\"document.title='owned'\">"
    mine.send(order(customerId=name))
    mine.says("Processed in")
    expect(mine.page.locator("#orders")).to_contain_text(name)
    mine.page.get_by_role("button", name="whole order").click()
    expect(mine.page.locator("#json")).to_contain_text(json.dumps(name))
    assert mine.page.locator("img").count() == 0
    assert "owned" not in mine.page.title()


def test_stock_is_set_where_it_is_shown(demo, visit):
    mine = visit(demo)
    mine.page.get_by_label("C3").fill("7")
    mine.page.keyboard.press("Enter")
    wait_for(lambda: demo.call("GET", "/stock/C3")[1]["available"] == 7)
    demo.call("PUT", "/stock/D4", {"available": 8})
    mine.page.locator("#headline").focus()
    expect(mine.page.get_by_label("D4")).to_have_value("8")


def test_a_chosen_order_stays_chosen_and_has_an_address(demo, visit):
    mine = visit(demo, reduced_motion="reduce")
    mine.place("Out of stock")
    mine.says("Failed")
    demo.post_many(2, clients=1)
    expect(mine.page.locator("#orders button").first).to_contain_text("customer-")
    mine.says("Failed")
    mine.page.reload()
    mine.says("Failed: out of stock")


def test_the_keyboard_alone_suffices(demo, visit):
    mine = visit(demo, reduced_motion="reduce")
    mine.tab_to("Good order")
    mine.page.keyboard.press("Enter")
    mine.says("Processed in")
    expect(mine.page.locator("#headline")).to_be_focused()
    mine.tab_to("One moment back")
    mine.page.keyboard.press("ArrowLeft")
    mine.says("Replay, moment")
    mine.page.keyboard.press("ArrowRight")
    mine.says("Processed in")
    mine.tab_to("inventory")
    mine.page.keyboard.press("Enter")
    expect(mine.page.locator("#json-title")).to_have_text("The event inventory_reserved")
    mine.tab_to("D: worked")
    mine.page.keyboard.press("Enter")
    expect(mine.page.locator("#crash")).to_contain_text("a unit is gone that nobody bought")
    expect(mine.page.locator("#letters [data-letter=D]")).to_be_focused()
    mine.page.keyboard.press("Escape")
    expect(mine.page.locator("#crash")).not_to_contain_text("a unit is gone that nobody bought")
    mine.tab_to("Jammed label")
    mine.page.keyboard.press("Enter")
    mine.says("Retrying")
    mine.tab_to("Cancel order")
    mine.page.keyboard.press("Enter")
    mine.says("Cancelled after")
    mine.tab_to(" A1 ")
    mine.page.keyboard.press("Enter")
    mine.says("Processed in")


# --- what holds of all of it


def test_axe_finds_nothing_and_nothing_scrolls_sideways(demo, visit):
    demo.post_many(1, clients=1)
    mine = visit(demo, reduced_motion="reduce", bypass_csp=True)  # axe is a script from elsewhere
    states = {
        "Choose an order": lambda: None, "Processed": lambda: mine.place("Good order"),
        "Failed": lambda: mine.place("Out of stock"), "Refused": lambda: mine.place("Bad price"),
        "Parked": lambda: mine.send(order(shippingAddress=JAMMED)),
        "Cancelled": lambda: mine.page.get_by_role("button", name="Cancel order").click(),
        "Replay, moment": lambda: [mine.page.get_by_label("One moment back").click() for _ in range(5)],
        "Replay": lambda: mine.send("{"),
    }  # fmt: skip
    found = []
    for state, reach in states.items():
        mine.page.set_viewport_size({"width": 1366, "height": 768})
        reach()
        mine.says(state)
        for width in (1366, 360):
            mine.page.set_viewport_size({"width": width, "height": 768})
            for scheme in ("light", "dark"):
                mine.page.evaluate(f"() => {{ document.documentElement.style.colorScheme = '{scheme}' }}")
                for each in Axe().run(mine.page).response["violations"]:
                    found.append((state, width, scheme, each["id"], each["nodes"][0]["html"][:200]))
            overflow = mine.page.evaluate("() => document.documentElement.scrollWidth - innerWidth")
            assert overflow <= 0, (state, width)
    assert found == []


def test_the_theme_follows_the_system_and_its_button(demo, visit):
    def ground(mine):
        return mine.page.evaluate("() => getComputedStyle(document.documentElement).backgroundColor")

    dark, light = visit(demo, color_scheme="dark"), visit(demo, color_scheme="light")
    before = ground(dark), ground(light)
    assert before[0] != before[1]
    dark.page.get_by_role("button", name="Light").click()
    light.page.get_by_role("button", name="Dark").click()
    assert (ground(light), ground(dark)) == before


def test_each_crash_point_names_a_function_that_is_there(demo, visit):
    mine, named = visit(demo), {}
    for letter in "ABCDEF":
        mine.page.locator(f"#letters [data-letter={letter}]").click()
        expect(mine.page.locator("#crash")).to_contain_text(f"{letter}: ")
        named[letter] = mine.page.locator("#crash code").inner_text()
    for file, function in (each.split() for each in named.values()):
        body = ast.parse((ROOT / file).read_text()).body
        for name in function.split("."):
            found = [node for node in body if getattr(node, "name", None) == name]
            assert found, f"there is no {function} in {file}"
            body = found[0].body
    assert len(set(named.values())) == 6


RECORD = """
window.read = new Set();
const told = Response.prototype.json;
const watched = (value) => typeof value !== "object" || value === null ? value : new Proxy(value, { get(target, name) {
  if (!Array.isArray(target) && typeof name === "string") window.read.add(name);
  return watched(target[name]);
} });
Response.prototype.json = async function () { return watched(await told.call(this)); };
"""


def test_the_page_reads_no_field_that_the_spec_lacks(demo, visit):
    mine = visit(demo, reduced_motion="reduce")
    mine.page.add_init_script(RECORD)
    mine.page.reload()
    mine.place("Good order")
    mine.says("Processed")
    mine.place("Bad price")
    mine.says("Refused")
    mine.send(order(shippingAddress=JAMMED))
    mine.says("Parked")
    read = set(mine.page.evaluate("() => [...window.read]")) - {"toJSON", "then"}
    assert {"timeline", "outbox", "parked", "errors"} <= read
    assert read - set(names_in(json.loads((ROOT / "openapi.json").read_text()))) == set()


def names_in(node):
    """Every property that a schema anywhere in the spec, or in a file beside it, names."""
    if isinstance(node, list):
        return [name for each in node for name in names_in(each)]
    if not isinstance(node, dict):
        return []
    found = list(node.get("properties", {})) + [name for each in node.values() for name in names_in(each)]
    return found


def test_what_did_not_change_is_not_sent_again(demo, visit):
    visit(demo)
    wait_for(lambda: re.search(r'"route": "/orders", "status": 304', demo.log("api")), 10, "a 304")


def test_the_page_works_below_a_path_and_links_to_what_there_is(demo, visit):
    mine = visit(demo)
    links = mine.page.evaluate("() => [...document.querySelectorAll('[href], [src]')].map("
                               "each => each.getAttribute('href') ?? each.getAttribute('src'))")  # fmt: skip
    files = {link for link in links if not link.startswith(("#", "data:"))}
    assert {"docs", "metrics", "page.css", "page.js"} <= files
    for link in files:
        assert not re.match(r"/|\w+:", link), link
        assert demo.call("GET", f"/{link}")[0] == 200, link
