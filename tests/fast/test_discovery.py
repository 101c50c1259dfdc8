"""Finding handlers: what is taken, and every mistake that stops the start with one line that names file and fix."""

import sys

import pytest

from core.base.settings import ROOT, SettingInvalid
from core.events import Event
from core.order.schemas import event_schemas, find_faults
from core.running.discovery import HandlerInvalid, aligned, describe, discover
from tests.fakes import event, services
from tests.support.consumer import run_command, write_handlers

GOOD = "def order_created(event, services):\n    return None\n"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "handlers"


def refusal(folder, wanted=(), **handlers: str) -> str:
    """The one line that the start is refused with."""
    with pytest.raises(SettingInvalid) as refused:
        discover(write_handlers(folder, **handlers), wanted)
    text = str(refused.value)
    assert text and "\n" not in text
    return text


def test_the_three_handlers_are_found_with_the_events_they_take():
    assert {name: sorted(taken) for name, taken in discover(ROOT / "handlers").items()} == {
        "email": ["order_cancelled", "order_confirmed", "order_failed"],
        "inventory": ["order_cancelled", "order_created", "order_failed"],
        "shipping": ["inventory_reserved", "order_cancelled", "order_failed"],
    }


def test_one_file_dropped_into_the_folder_is_a_handler(folder):
    write_handlers(folder, email=GOOD)
    write_handlers(folder, loyalty="def order_confirmed(event, services):\n    services.log.info('points')\n")
    found = discover(folder)
    assert list(found) == ["email", "loyalty"] and list(found["loyalty"]) == ["order_confirmed"]
    assert found["loyalty"]["order_confirmed"](event("order_confirmed"), services()) is None


@pytest.fixture
def types():
    """The event types there are; those that a test adds go with it."""
    known = dict(event_schemas())
    yield event_schemas()
    event_schemas().clear()
    event_schemas().update(known)


def test_an_event_type_beside_the_handlers_is_one(folder, types):
    given = types["order_created"]
    (folder / "events").mkdir(parents=True)
    for name in ("parcel_sent", "order_created"):
        (folder / f"events/{name}.json").write_text('{"required": ["parcel"]}')
    found = discover(write_handlers(folder, parcels=GOOD + "def parcel_sent(event, services): ...\n"))
    assert list(found["parcels"]) == ["order_created", "parcel_sent"]
    assert find_faults(types["parcel_sent"], {}) == [("/parcel", "is required")]
    assert types["order_created"] is given, "a type that is there stays as it is"


def test_an_event_type_that_is_no_json_stops_the_start(folder, types):
    (folder / "events").mkdir(parents=True)
    (folder / "events/parcel_sent.json").write_text("{")
    assert "events/parcel_sent.json: is no JSON: Expecting property name" in refusal(folder, mine=GOOD)


def test_helpers_imports_classes_and_values_are_no_event_functions(folder):
    source = """
import json
from json import dumps
from core.events import Event
from core.order.schemas import event_schemas, find_faults
from core.order.schemas import nearest
from handlers.email import order_failed, order_cancelled

LIMIT = 3

class Refused(Exception):
    pass

def _order_created(event, services): ...

def inventory_reserved(event, services):
    return Event("order_confirmed", shipment=_shipment())

def _shipment():
    return {"carrier": "x", "trackingNumber": dumps(LIMIT)}
"""
    found = discover(write_handlers(folder, mine=source))
    assert list(found["mine"]) == ["inventory_reserved"]
    answer = found["mine"]["inventory_reserved"](event("inventory_reserved"), services())
    assert isinstance(answer, Event) and answer.data["shipment"]["trackingNumber"] == "3"


CALLABLES = {
    "a partial": "import functools\ndef _f(x, event, services): return x\norder_created = functools.partial(_f, 7)\n",
    "an instance": "class _H:\n    def __call__(self, event, services): return 7\norder_created = _H()\n",
    "lru_cache": "import functools\n@functools.lru_cache\ndef order_created(event, services): return 7\n",
    "a decorator without wraps": "def _plain(f):\n    return lambda event, services: f(event, services)\n"
    "@_plain\ndef order_created(event, services): return 7\n",
    "a method": "class _H:\n    def take(self, event, services): return 7\norder_created = _H().take\n",
    "postponed annotations": "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\n"
    "class _A:\n    n: int\ndef order_created(event, services): return _A(7).n\n",
}


@pytest.mark.parametrize("form", CALLABLES)
def test_whatever_can_be_called_with_an_event_is_taken(folder, form):
    found = discover(write_handlers(folder, mine=CALLABLES[form]))
    assert list(found["mine"]) == ["order_created"]
    assert found["mine"]["order_created"](event("order_created"), object()) == 7
    assert "handlers.mine" not in sys.modules


def test_a_second_name_for_a_function_takes_a_second_event(folder):
    found = discover(write_handlers(folder, mail=GOOD + "order_failed = order_created\n"))
    assert list(found["mail"]) == ["order_created", "order_failed"]


def test_files_with_a_leading_underscore_and_other_files_are_ignored(folder):
    write_handlers(folder, email=GOOD, _shared="this is no python", __init__="nor this")
    folder.joinpath("README.md").write_text("about the handlers")
    folder.joinpath("._email.py").write_bytes(b"\0\5\26\7")  # as macOS leaves beside a file
    folder.joinpath(".#email.py").symlink_to("me@host.1")  # as Emacs does
    assert list(discover(folder)) == ["email"]


def test_importing_a_handler_leaves_no_module_for_another_folder(folder, tmp_path):
    first = discover(write_handlers(folder, email=GOOD))
    second = discover(write_handlers(tmp_path / "other", email="def order_failed(event, services): pass"))
    assert (list(first["email"]), list(second["email"])) == (["order_created"], ["order_failed"])


# --- what stops the start --------------------------------------------------------------------------------------------


def test_a_misspelt_event_names_the_near_match(folder):
    text = refusal(folder, email="def order_creatd(event, services): pass")
    assert text.startswith(f"{folder / 'email.py'}: order_creatd is no event type")
    assert "did you mean order_created?" in text and "start with _" in text


def test_a_name_like_no_event_lists_the_events(folder):
    text = refusal(folder, email=GOOD + "def zzz(event, services): pass")
    assert "zzz" in text and "order_created" in text and "order_cancelled" in text


def test_a_file_without_an_event_function_says_what_to_add(folder):
    text = refusal(folder, email="def _helper(event, services): pass")
    assert str(folder / "email.py") in text and "order_created" in text


@pytest.mark.parametrize(
    "signature", ["()", "(event)", "(event, services, more)", "(*, event, services)", "(event, *, services)"]
)
def test_wrong_arguments_say_the_right_ones(folder, signature):
    text = refusal(folder, email=f"def order_created{signature}: pass")
    assert str(folder / "email.py") in text and "order_created" in text and "(event, services)" in text


@pytest.mark.parametrize("signature", ["(event, services)", "(e, s, more=1)", "(*both)", "(event, services, **more)"])
def test_arguments_that_can_be_called_with_two_are_fine(folder, signature):
    assert discover(write_handlers(folder, email=f"def order_created{signature}: pass"))


@pytest.mark.parametrize(
    "source",
    [
        "async def order_created(event, services): pass",
        "async def order_created(event, services): yield",
        "class _H:\n    async def __call__(self, event, services): pass\norder_created = _H()",
    ],
)
def test_a_coroutine_is_refused_because_nobody_would_await_it(folder, source):
    text = refusal(folder, email=source)
    assert str(folder / "email.py") in text and "async" in text


@pytest.mark.parametrize(
    ("source", "line", "what"),
    [
        ("x = 1\ndef order_created(event, services:\n    pass\n", 2, "SyntaxError"),
        ("x = 1\n\nimport no_such_module\n", 3, "no_such_module"),
        ("import json\n\njson.loads('{')\n", 3, "JSONDecodeError"),
        ("def f():\n    return 1 / 0\nf()\n", 2, "ZeroDivisionError"),
        ("x = 1\nraise ValueError('two\\nlines')\n", 2, "ValueError"),
        ("\n\nimport sys\nsys.exit(3)\n", 4, "SystemExit"),
    ],
)
def test_a_failed_import_names_the_file_and_the_line(folder, source, line, what):
    text = refusal(folder, email=source)
    assert text.startswith(f"{folder / 'email.py'}: line {line}: ") and what in text


def test_an_unknown_name_in_handlers_names_the_near_match(folder):
    text = refusal(folder, ["email", "shiping"], email=GOOD, shipping=GOOD)
    assert text.startswith("HANDLERS: ") and "shiping" in text and "did you mean shipping?" in text


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_handlers_says_which_variable_names_it(folder, there):
    if there:
        folder.mkdir()
    with pytest.raises(HandlerInvalid, match="HANDLERS_DIR") as refused:
        discover(folder)
    assert str(folder) in str(refused.value)


@pytest.mark.parametrize("name", ["my-mail", "größe", "9lives", "a" * 61, "mail.v2", "two words"])
def test_a_file_name_that_cannot_name_a_queue_is_refused(folder, name):
    text = refusal(folder, **{name: GOOD})
    assert f"{name}.py" in text and "1 to 60 of a-z" in text


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("class order_created:\n    pass", "order_created is a class"),
        ("import functools\nhelp_out = functools.partial(print)\n" + GOOD, "help_out is no event type"),
        ("order_created = int", "order_created is a class"),
    ],
)
def test_what_can_be_called_and_is_no_handler_is_named(folder, source, why):
    assert why in refusal(folder, email=source)


# --- check -----------------------------------------------------------------------------------------------------------


def test_the_map_has_a_line_per_handler_and_event(folder):
    lines = describe(discover(write_handlers(folder, email=GOOD + "def order_failed(event, services): pass")))
    assert [line.split() for line in lines] == [
        ["order_created", "->", "email", "->", "orders.email"],
        ["order_failed", "->", "email", "->", "orders.email"],
    ]


def test_a_table_is_as_wide_as_its_widest_entries():
    assert aligned([["A", "BB"], ["long name", ""], ["x", "y"]]) == ["A          BB", "long name", "x          y"]


def test_check_needs_no_settings_and_no_server():
    ran = run_command("check")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert len(ran.stdout.splitlines()) == sum(map(len, discover(ROOT / "handlers").values()))
    assert "inventory_reserved  ->  shipping   ->  orders.shipping" in ran.stdout


def test_check_exits_with_2_and_one_line_for_wrong_handlers(folder):
    write_handlers(folder, email="def order_creatd(event, services): pass")
    ran = run_command("check", HANDLERS_DIR=str(folder))
    assert (ran.returncode, ran.stdout) == (2, "")
    assert len(ran.stderr.splitlines()) == 1 and "did you mean order_created?" in ran.stderr
