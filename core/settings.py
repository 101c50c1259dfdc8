"""The environment, read once and checked, as one frozen value.

`load(os.environ, need=...)` is called in `main` and nowhere else; everything below `main` is handed plain values.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROLES = ("client", "read", "admin")
ROOT = Path(__file__).resolve().parent.parent


class BadSetting(Exception):
    """A variable that stops the start; the text names it, what is wrong and what would be right."""


@dataclass(frozen=True)
class ApiKey:
    """Who a secret belongs to, and what they may do."""

    name: str
    role: str


@dataclass(frozen=True)
class Settings:
    """What the environment says. URLs are kept as given; delays are seconds, as text, because they name queues."""

    mongodb_url: str
    amqp_url: str
    data_dir: Path
    api_keys: dict[bytes, ApiKey]
    host: str
    port: int
    web_threads: int
    concurrency: int
    handlers: tuple[str, ...]
    handlers_dir: Path
    retry_delays: tuple[str, ...]
    metrics_port: int
    email_function: str
    label_function: str
    log_level: str
    log_format: str

    @property
    def single_process(self) -> bool:
        """True where a part lives inside the process, so that API and consumer have to share it."""
        return self.mongodb_url in ("embedded", "memory") or self.amqp_url == "embedded"


def load(env: Mapping[str, str], need: tuple[str, ...] = ()) -> Settings:
    """Settings from a mapping; `need` names the variables that must be there. Raises BadSetting."""
    for variable in need:
        if not env.get(variable):
            raise BadSetting(f"{variable}: is not set; it must be {EXPECTED[variable]}")
    return Settings(**{variable.lower(): _read(env, variable, *rule) for variable, rule in VARIABLES.items()})


def _read(env: Mapping[str, str], variable: str, default: str, parse: Callable[[str], Any]) -> Any:
    text = env.get(variable, default).strip()
    if not text and variable != "RETRY_DELAYS":  # an empty RETRY_DELAYS has a meaning: no retries
        text = default
    try:
        return parse(text)
    except ValueError as error:
        shown = "" if variable == "API_KEYS" else f" not {text!r};"  # secrets stay out of logs
        raise BadSetting(f"{variable}:{shown} {error}") from None


def digest(secret: str) -> bytes:
    """What a secret is looked up by; comparing digests tells an attacker nothing about the secret."""
    return hashlib.sha256(secret.encode()).digest()


def _url(expected: str, schemes: tuple[str, ...], words: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        parts = urlsplit(text)
        if text and text not in words and not (parts.scheme in schemes and parts.netloc):
            raise ValueError(f"it must be {expected}")
        return text

    return parse


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise ValueError(f"it must be a whole number from {low} to {high}")
        return int(text)

    return parse


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in words:
            raise ValueError(f"it must be one of {', '.join(word or 'empty' for word in words)}")
        return text.lower()

    return parse


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _delays(text: str) -> tuple[str, ...]:
    parts = _names(text)
    if not all(re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", part) and float(part) > 0 for part in parts):
        raise ValueError("it must be seconds above 0, separated by commas, for example 2,15,90")
    return tuple(f"{float(part):.10g}" for part in parts)


def _keys(text: str) -> dict[bytes, ApiKey]:
    keys: dict[bytes, ApiKey] = {}
    for position, part in enumerate(_names(text), 1):
        match = re.fullmatch(r"([A-Za-z0-9._-]{1,64}):([!-9;-~]{1,200})(?::([a-z]+))?", part)
        role = match[3] or "client" if match else ""
        if match is None or role not in ROLES:
            raise ValueError(f"entry {position} must be name:secret[:role] with a role of {', '.join(ROLES)}")
        if any(key.name == match[1] and key.role != role for key in keys.values()):
            raise ValueError(f"entry {position} gives {match[1]} a second role; one name has one role")
        if digest(match[2]) in keys:
            raise ValueError(f"entry {position} repeats a secret; every entry needs one of its own")
        keys[digest(match[2])] = ApiKey(match[1], role)
    return keys


def _text(text: str) -> str:
    return text


EXPECTED = {
    "MONGODB_URL": "mongodb://host:port/database, embedded or memory",
    "AMQP_URL": "amqp://user:password@host:port/vhost, amqps://... or embedded",
    "API_KEYS": "name:secret[:role],... with a role of client, read or admin",
}

VARIABLES: dict[str, tuple[str, Callable[[str], Any]]] = {  # variable: (default, how it is read)
    "MONGODB_URL": ("", _url(EXPECTED["MONGODB_URL"], ("mongodb", "mongodb+srv"), ("embedded", "memory"))),
    "AMQP_URL": ("", _url(EXPECTED["AMQP_URL"], ("amqp", "amqps"), ("embedded",))),
    "DATA_DIR": ("./data", Path),
    "API_KEYS": ("", _keys),
    "HOST": ("127.0.0.1", _text),
    "PORT": ("8080", _integer(0, 65535)),
    "WEB_THREADS": ("32", _integer(1, 256)),
    "CONCURRENCY": ("16", _integer(1, 256)),
    "HANDLERS": ("", _names),
    "HANDLERS_DIR": (str(ROOT / "handlers"), Path),
    "RETRY_DELAYS": ("2,15,90", _delays),
    "METRICS_PORT": ("9090", _integer(0, 65535)),
    "EMAIL_FUNCTION": ("send_email", _text),
    "LABEL_FUNCTION": ("make_label", _text),
    "LOG_LEVEL": ("info", _one_of("debug", "info", "warning", "error")),
    "LOG_FORMAT": ("", _one_of("", "text", "json")),
}
