"""The checks before a call, in the order in which they are made: key, role, media type, size, query, JSON."""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from bottle import HTTPResponse, request

from core.base.ids import digest
from core.base.settings import ApiKey
from core.http import reading
from core.http.problems import problem, problem_of

LARGEST_BODY = 64 * 1024  # bytes
JSON_IN_UTF8 = re.compile(r'application/json\s*(;\s*charset=("?)utf-8\2\s*)?')


class Request(NamedTuple):
    """A request that passed the checks."""

    key: ApiKey
    query: dict[str, str]
    body: Any


Call = Callable[..., HTTPResponse]  # of a Request and the parts of the path
Keys = dict[str, ApiKey]  # by the digest of their secrets


def checked(
    call: Call, keys: Keys, roles: Iterable[str], body: bool = False, query: reading.Parameters | None = None
) -> Call:
    """The call behind the checks. What any of them raises becomes a problem.

    `body`: whether it takes one; `query`: the parameters it takes.
    """

    def respond(**path: str) -> HTTPResponse:
        try:
            key, raw = authenticate(keys, roles), read_body() if body else b"null"
            parameters = reading.read_query(request.query_string, query or {})
            return call(Request(key, parameters, reading.parse_json(raw)), **path)
        except HTTPResponse as response:
            return response
        except Exception as error:
            return problem_of(error)

    return respond


def authenticate(keys: Keys, roles: Iterable[str]) -> ApiKey:
    """Whose secret was sent. Raises the problem where it is nobody's, or the role may not do this."""
    match = re.fullmatch("(?i:bearer) +([!-~]+)", header("AUTHORIZATION", ""))
    key = keys.get(digest(match[1])) if match else None
    if key is None:
        raise problem("unauthorized", "send Authorization: Bearer <secret>")
    if key.role not in roles:
        raise problem("forbidden", f"this takes the role {' or '.join(roles)}")
    return key


def read_body() -> bytes:
    """The body, as sent. Raises the problem where it is of another type, or too large."""
    if header("CONTENT_ENCODING", "identity") != "identity" or not JSON_IN_UTF8.fullmatch(request.content_type):
        raise problem("unsupported-media-type", "send application/json in UTF-8, unencoded")
    body = request.environ["wsgi.input"].read(LARGEST_BODY + 1)  # waitress joins chunks and marks the end
    if len(body) > LARGEST_BODY:
        raise problem("too-large", f"at most {LARGEST_BODY} bytes")
    return body


def header(name: str, default: Any = None) -> Any:
    """A header of the request; Bottle's own way raises on bytes that are not UTF-8."""
    return request.environ.get(f"HTTP_{name}", default)
