"""The environment, read once and checked, as one frozen value.

`load(os.environ, need=...)` is called in `core/running/process.py` alone; everything else is handed plain values.
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from core.base.ids import digest

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
ROLES = ("client", "read", "admin")
DEMO = "change-me"  # in every secret that is published with this program
STORE = r"(mongodb(\+srv)?://[^/?#].*|embedded|memory)?"
SECRET = ("API_KEYS", "MONGODB_URL", "AMQP_URL")  # are never shown
BROKER = "(amqps?://[^/?#].*|embedded)?"


class Refusal(Exception):
    """Stops the start or a command with one line: what is wrong, and what to do."""


class SettingInvalid(Refusal):
    """A variable that stops the start; the text names it, what is wrong and what would be right."""


@dataclass(frozen=True)
class ApiKey:
    """Who a secret belongs to, and what they may do."""

    name: str
    role: str
    secret: str = field(repr=False)


def _read(default: str, must_be: str, pattern: str = "(?s:.*)", parse: Callable[[str], Any] = str) -> Any:
    """How the text of a variable is read: it matches `pattern`, and `parse` raises no ValueError."""
    return field(metadata={"default": default, "must_be": must_be, "pattern": pattern, "parse": parse})


def _number(default: str, low: int, high: int) -> Any:
    def parse(text: str) -> int | None:
        if text and not low <= int(text) <= high:
            raise ValueError
        return int(text) if text else None

    must_be = f"a whole number from {low} to {high}" + (" or empty" if not default else "")
    return _read(default, must_be, "[0-9]{1,9}" if default else "[0-9]{0,9}", parse)


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        _ = parts.port if parts.scheme.startswith("amqp") else 0  # a store's URL may have several
    except ValueError:  # a host or a port is none; its own words repeat the password
        raise ValueError from None
    return text


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _delays(text: str) -> tuple[float, ...]:
    if not all(re.fullmatch(r"(?=[0.]*[1-9])[0-9]{1,6}(\.[0-9]{1,3})?", part) for part in _names(text)):
        raise ValueError
    return tuple(float(part) for part in _names(text))


def _keys(text: str) -> dict[str, ApiKey]:
    keys: dict[str, ApiKey] = {}
    for position, part in enumerate(_names(text), 1):
        match = re.fullmatch(rf"([A-Za-z0-9._-]{{1,64}}):([!-9;-~]{{1,200}})(?::({'|'.join(ROLES)}))?", part)
        if match is None:
            raise ValueError(f"entry {position} is not")
        key = ApiKey(match[1], match[3] or "client", match[2])
        if any(other.name == key.name and other.role != key.role for other in keys.values()):
            raise ValueError(f"entry {position} gives {key.name} a second role, and one name has one role")
        if keys.setdefault(digest(key.secret), key) is not key:
            raise ValueError(f"entry {position} repeats a secret, and every entry needs one of its own")
    if text and not keys:
        raise ValueError("there is no entry")
    return keys


@dataclass(frozen=True)
class Settings:
    """What the environment says; URLs are kept as given, delays are seconds.

    `api_keys` is found by the digest of a secret: comparing digests tells an attacker nothing about the secret.
    """

    mongodb_url: str = _read("", "mongodb://host:port/database, embedded or memory", STORE, _url)
    amqp_url: str = _read("", "amqp[s]://user:password@host:port/vhost or embedded", BROKER, _url)
    data_dir: Path = _read("./data", "a folder", parse=Path)
    api_keys: dict[str, ApiKey] = _read("", "name:secret[:role],... with a role of client, read or admin", parse=_keys)
    host: str = _read("127.0.0.1", "an address")
    port: int = _number("8080", 0, 65535)
    web_threads: int = _number("32", 1, 256)
    concurrency: int = _number("16", 1, 256)
    handlers: tuple[str, ...] = _read("", "names of handlers, separated by commas", parse=_names)
    handlers_dir: Path = _read(str(ROOT / "handlers"), "a folder", parse=Path)
    retry_delays: tuple[float, ...] = _read("2,15,90,900", "seconds above 0, such as 2,15,90", parse=_delays)
    metrics_port: int = _number("9090", 0, 65535)
    api_metrics_port: int | None = _number("", 0, 65535)
    email_function: str = _read("send_email", "a function's name")
    label_function: str = _read("make_label", "a function's name")
    aws_endpoint_url_lambda: str = _read("", "the address of a local Lambda runtime")
    log_level: str = _read("info", "debug, info, warning or error", "(?i:debug|info|warning|error)", str.lower)
    log_format: str = _read("", "text, json or empty", "(?i:text|json|)", str.lower)

    @property
    def bundled_store(self) -> bool:
        """True where the store is a part of `make run`, and no server of yours."""
        return self.mongodb_url in ("embedded", "memory")

    @property
    def single_process(self) -> bool:
        """True where a part lives inside the process, so that API and consumer have to share it."""
        return self.bundled_store or self.amqp_url == "embedded"


VARIABLES: dict[str, Mapping[str, Any]] = {each.name.upper(): each.metadata for each in fields(Settings)}


def load(env: Mapping[str, str], need: tuple[str, ...] = ()) -> Settings:
    """Settings from a mapping; `need` names the variables that must be there. Raises SettingInvalid."""
    return Settings(**{variable.lower(): _value(env, variable, variable in need) for variable in VARIABLES})


def _value(env: Mapping[str, str], variable: str, needed: bool) -> Any:
    rule, text = VARIABLES[variable], env.get(variable, "").strip()
    if not text and (variable not in env or variable != "RETRY_DELAYS"):  # an empty RETRY_DELAYS means: no retries
        text = rule["default"]
    if needed and not text:
        raise SettingInvalid(f"{variable}: is not set; it must be {rule['must_be']}")
    try:
        if not re.fullmatch(rule["pattern"], text):
            raise ValueError
        return rule["parse"](text)
    except ValueError as error:
        shown = f"not {text!r}; " if variable not in SECRET else ""
        why = f"; {error}" if error.args else ""
        raise SettingInvalid(f"{variable}: {shown}it must be {rule['must_be']}{why}") from None


def warn_of_demo_values(env: Mapping[str, str]) -> None:
    """Log a line for each variable that still holds a secret everybody can read in this repository."""
    for variable in VARIABLES:
        if DEMO in env.get(variable, ""):
            log.warning("a demo secret is in use; set one of your own", extra={"variable": variable})
