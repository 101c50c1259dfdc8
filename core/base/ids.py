"""New ids, the clock, digests and traces."""

import hashlib
import re
import time
import uuid
from datetime import UTC, datetime
from secrets import randbits, token_hex


def new_order_id() -> str:
    """A UUIDv7 (RFC 9562), which sorts by the millisecond it was made in; from Python 3.14 on it is `uuid.uuid7`."""
    milliseconds = time.time_ns() // 1_000_000
    return str(uuid.UUID(f"{milliseconds:012x}7{randbits(12):03x}{1 << 63 | randbits(62):016x}"))


def now() -> datetime:
    """The time in UTC as the store gives it back: without a zone, cut to milliseconds."""
    return datetime.fromtimestamp(time.time_ns() // 1_000_000 / 1000, UTC).replace(tzinfo=None)


def rfc3339(moment: datetime) -> str:
    """2026-01-31T09:30:00.000Z"""
    return moment.isoformat(timespec="milliseconds") + "Z"


def digest(text: str) -> str:
    """SHA-256, as 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def new_traceparent(given: str = "") -> str:
    """The caller's W3C traceparent where it is a good one, else that of a new trace."""
    match = re.fullmatch(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", given)
    if match and int(match[1], 16) and int(match[2], 16) and (given[:2] != "00" or not match[4]):
        return f"00-{match[1]}-{match[2]}-{match[3]}"
    return f"00-{token_hex(16)}-{token_hex(8)}-01"


def trace_id(traceparent: str) -> str:
    """The 32 hex digits that all parts of a trace share."""
    return traceparent[3:35]
