"""The JSON Schemas in `schemas/`: which event types there are, and what is wrong with a value, for who sent it."""

import json
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

from core.base.settings import ROOT, SettingInvalid

MOST_FAULTS = 20
Fault = tuple[str, str]  # (JSON Pointer, what would be right)


@cache
def schema(name: str) -> jsonschema.Draft202012Validator:
    """The validator of `schemas/<name>.json`; made once, because making one costs far more than using it."""
    return jsonschema.Draft202012Validator(json.loads((ROOT / f"schemas/{name}.json").read_text()))


@cache
def event_schemas() -> dict[str, jsonschema.Draft202012Validator]:
    """Event type -> validator; a new event type is one more file in `schemas/events/`, or beside the handlers."""
    return {path.stem: schema(f"events/{path.stem}") for path in sorted((ROOT / "schemas/events").glob("*.json"))}


def add_event_schemas(folder: Path) -> None:
    """Also the event types that handlers bring along; one that is there stays. Raises SettingInvalid."""
    for path in folder.glob("*.json"):
        try:
            event_schemas().setdefault(path.stem, jsonschema.Draft202012Validator(json.loads(path.read_text())))
        except ValueError as error:
            raise SettingInvalid(f"{path}: is no JSON: {error}") from None


def find_faults(validator: jsonschema.Draft202012Validator, value: Any) -> list[Fault]:
    """What is wrong with a value: one fault per field, at most 20, none where all is well."""
    faults: dict[str, str] = {}
    for error in validator.iter_errors(value):  # found one by one, so this stops early on a hopeless value
        for pointer, message in _explain(error):
            faults.setdefault(pointer, message)
        if len(faults) >= MOST_FAULTS:
            break
    return list(faults.items())[:MOST_FAULTS]


def _explain(error: jsonschema.ValidationError) -> list[Fault]:
    # The schema's own words: the library's echo the input, which may be a megabyte.
    pointer = "".join(map(_token, error.absolute_path))
    rule, limit, value = error.validator, error.validator_value, error.instance
    if rule == "required":
        return [(pointer + _token(name), "is required") for name in limit if name not in value]
    if rule == "additionalProperties":
        known = error.schema["properties"]
        return [(pointer + _token(name), "is not a known field") for name in value if name not in known]
    description = error.schema.get("description", "")
    return [(pointer, description if description.startswith("must ") else f"must be of {rule} {limit}")]


def _token(part: str | int) -> str:
    return "/" + str(part)[:200].replace("~", "~0").replace("/", "~1")


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a word that is not a known one."""
    match = get_close_matches(word, list(known), 1)
    return f"did you mean {match[0]}?" if match else f"it must be one of {', '.join(sorted(known))}"
