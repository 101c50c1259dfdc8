"""The environment, read once and checked, as one frozen value.

`load(os.environ, need=...)` is called in `main` and nowhere else; everything below `main` is handed plain values.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
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
            raise BadSetting(f"{variable}: is not set; it must be {VARIABLES[variable].must_be}")
    return Settings(**{variable.lower(): _read(env, variable) for variable in VARIABLES})


def _read(env: Mapping[str, str], variable: str) -> Any:
    rule, text = VARIABLES[variable], env.get(variable, "").strip()
    if not text and (variable not in env or variable != "RETRY_DELAYS"):  # an empty RETRY_DELAYS means: no retries
        text = rule.default
    try:
        return rule.parse(text)
    except ValueError as error:
        shown = f"not {text!r}; " if variable != "API_KEYS" else ""  # secrets stay out of logs
        raise BadSetting(f"{variable}: {shown}it must be {rule.must_be}{error}") from None


def digest(secret: str) -> bytes:
    """What a secret is looked up by; comparing digests tells an attacker nothing about the secret."""
    return hashlib.sha256(secret.encode()).digest()


def _if(good: Any, value: Any) -> Any:
    if not good:
        raise ValueError
    return value


def _url(text: str, schemes: tuple[str, ...], words: tuple[str, ...]) -> str:
    parts = urlsplit(text)
    return _if(text in ("", *words) or (parts.scheme in schemes and parts.netloc), text)


def _integer(low: int, high: int) -> Callable[[str], int]:
    return lambda text: _if(re.fullmatch("[0-9]{1,9}", text) and low <= int(text) <= high, int(text or 0))


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _delay(text: str) -> str:
    return _if(re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", text) and float(text) > 0, f"{float(text or 0):.10g}")


def _keys(text: str) -> dict[bytes, ApiKey]:
    keys: dict[bytes, ApiKey] = {}
    for position, part in enumerate(_names(text), 1):
        match = re.fullmatch(r"([A-Za-z0-9._-]{1,64}):([!-9;-~]{1,200})(?::(client|read|admin))?", part)
        if match is None:
            raise ValueError(f"; entry {position} is not")
        key = ApiKey(match[1], match[3] or "client")
        if any(other.name == key.name and other.role != key.role for other in keys.values()):
            raise ValueError(f"; entry {position} gives {key.name} a second role, and one name has one role")
        if keys.setdefault(digest(match[2]), key) is not key:
            raise ValueError(f"; entry {position} repeats a secret, and every entry needs one of its own")
    return keys


class _Rule(NamedTuple):
    default: str
    must_be: str
    parse: Callable[[str], Any]


_LEVELS, _FORMATS = ("debug", "info", "warning", "error"), ("", "text", "json")
_MONGODB, _AMQP = ("mongodb", "mongodb+srv"), ("amqp", "amqps")

VARIABLES = {
    "MONGODB_URL": _Rule(
        "", "mongodb://host:port/database, embedded or memory", lambda t: _url(t, _MONGODB, ("embedded", "memory"))
    ),
    "AMQP_URL": _Rule(
        "", "amqp[s]://user:password@host:port/vhost or embedded", lambda t: _url(t, _AMQP, ("embedded",))
    ),
    "DATA_DIR": _Rule("./data", "a folder", Path),
    "API_KEYS": _Rule("", "name:secret[:role],... with a role of client, read or admin", _keys),
    "HOST": _Rule("127.0.0.1", "an address", str),
    "PORT": _Rule("8080", "a whole number from 0 to 65535", _integer(0, 65535)),
    "WEB_THREADS": _Rule("32", "a whole number from 1 to 256", _integer(1, 256)),
    "CONCURRENCY": _Rule("16", "a whole number from 1 to 256", _integer(1, 256)),
    "HANDLERS": _Rule("", "names of handlers, separated by commas", _names),
    "HANDLERS_DIR": _Rule(str(ROOT / "handlers"), "a folder", Path),
    "RETRY_DELAYS": _Rule("2,15,90", "seconds above 0, such as 2,15,90", lambda t: tuple(map(_delay, _names(t)))),
    "METRICS_PORT": _Rule("9090", "a whole number from 0 to 65535", _integer(0, 65535)),
    "EMAIL_FUNCTION": _Rule("send_email", "a function's name", str),
    "LABEL_FUNCTION": _Rule("make_label", "a function's name", str),
    "LOG_LEVEL": _Rule("info", "one of " + ", ".join(_LEVELS), lambda t: _if(t.lower() in _LEVELS, t.lower())),
    "LOG_FORMAT": _Rule("", "text, json or empty", lambda t: _if(t.lower() in _FORMATS, t.lower())),
}
