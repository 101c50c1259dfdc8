"""`asyncapi.json` says what is announced: its schemas are the files, its queues follow from handlers and topology."""

import json

import pytest
from jsonschema import Draft202012Validator

from core.base.settings import ROOT
from core.order.schemas import event_schemas
from core.running.discovery import discover, subscribers_of
from tests.support import contracts

SPEC = json.loads((ROOT / "asyncapi.json").read_text())


def test_it_is_up_to_date():
    assert contracts.asyncapi() == SPEC, "python -m tests.support.contracts"


def test_its_schemas_are_the_files_of_the_schemas_folder():
    files = {path.stem: json.loads(path.read_text()) for path in (ROOT / "schemas/events").glob("*.json")}
    assert SPEC["components"]["schemas"] == files


@pytest.mark.parametrize("type", event_schemas())
def test_the_example_of_an_event_is_valid(type):
    [example] = SPEC["components"]["messages"][type]["examples"]
    assert not list(Draft202012Validator(SPEC["components"]["schemas"][type]).iter_errors(example["payload"]))


def test_each_event_reaches_the_queues_of_its_subscribers():
    reached = {type: [] for type in event_schemas()}
    for handler in discover(ROOT / "handlers"):
        for type in SPEC["channels"][f"orders.{handler}"]["messages"]:
            reached[type].append(handler)
    assert reached == subscribers_of(discover(ROOT / "handlers"))
