"""What a token has led to, so that a function asked twice acts once: DynamoDB if TOKENS_TABLE is set, else DATA_DIR."""

import os
import re
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

ID = "[A-Za-z0-9-]{1,64}"  # what can be a file name and a mail header; `../` ends here


def safe(what: str, text: str, pattern: str = ID, must_be: str = "1 to 64 of A-Z, a-z, 0-9 and -") -> str:
    """Give the text back if it matches; ValueError if it does not."""
    if not re.fullmatch(pattern, text):
        raise ValueError(f"{what} must be {must_be}, not {text!r}")
    return text


@cache
def client(service: str) -> Any:
    import boto3  # late: a local start needs none of it

    return boto3.session.Session().client(service)  # a session of its own: the shared one is not thread-safe


def path(key: str) -> Path:
    return Path(os.environ.get("DATA_DIR") or "data", key)


def has(key: str) -> bool:
    if table := os.environ.get("TOKENS_TABLE"):
        return "Item" in client("dynamodb").get_item(TableName=table, Key={"id": {"S": key}}, ConsistentRead=True)
    return path(key).exists()


def put(key: str, text: str) -> bool:
    """Write `key` unless it is there, whole or not at all; True if this call wrote it."""
    if not (table := os.environ.get("TOKENS_TABLE")):
        return put_file(key, text)
    item = {"id": {"S": key}, "text": {"S": text}, "expires": {"N": str(int(time.time()) + 366 * 86_400)}}
    with suppress(client("dynamodb").exceptions.ConditionalCheckFailedException):
        client("dynamodb").put_item(TableName=table, Item=item, ConditionExpression="attribute_not_exists(id)")
        return True
    return False


def put_file(key: str, text: str) -> bool:
    target, stage = path(key), path(key).parent.with_name("tmp")  # where a Maildir has it, too
    for folder in (target.parent, stage):
        folder.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=stage) as file, suppress(FileExistsError):
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
        os.link(file.name, target)  # unlike a rename it never replaces
        return True
    return False


def drop(key: str) -> None:
    if table := os.environ.get("TOKENS_TABLE"):
        client("dynamodb").delete_item(TableName=table, Key={"id": {"S": key}})
    else:
        path(key).unlink(missing_ok=True)
