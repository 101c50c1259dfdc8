"""The environment, read once and checked, as one frozen value.

`load(os.environ, need=...)` is called in `main` and nowhere else; everything below `main` is handed plain values.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

ROLES = ("client", "read", "admin")
ROOT = Path(__file__).resolve().parent.parent


class BadSetting(Exception):
    """A variable that stops the start; the text names it, what is wrong and what would be right."""


class ApiKey(NamedTuple):
    """Who a secret belongs to, and what they may do."""

    name: str
    role: str


def digest(text: str) -> str:
    """SHA-256. A secret is looked up by it: comparing digests tells an attacker nothing about the secret."""
    return hashlib.sha256(text.encode()).hexdigest()


# --- how the text of a variable is read; ValueError where it is wrong --------------------------------------------


def _if(good: Any, value: Any) -> Any:
    if not good:
        raise ValueError
    return value


def _url(schemes: str, words: str) -> Callable[[str], str]:
    return lambda text: _if(text in ("", *words.split()) or re.match(f"({schemes})://[^/]", text), urlsplit(text).geturl())


def _one_of(*words: str) -> Callable[[str], str]:
    return lambda text: _if(text.lower() in words, text.lower())


def _integer(low: int, high: int) -> Callable[[str], int]:
    return lambda text: _if(re.fullmatch("[0-9]{1,9}", text) and low <= int(text) <= high, int(text or 0))


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _delays(text: str) -> tuple[str, ...]:
    good = all(re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", part) and float(part) > 0 for part in _names(text))
    return _if(good, ()) or tuple(f"{float(part):.10g}" for part in _names(text))
