"""A MongoDB server that misbehaves on demand: it speaks the wire protocol, has its documents in mongomock, and answers
as a script tells it.

    with WireStore() as server:
        server.fault = once("update", refuse_writes(189))       # the next update: every write in it is refused
        database = connect(server.url)

A *fault* is asked before each command; it gives the reply to send, or None to go on as usual, or raises `Drop` to close
the connection without a word. `server.apply(command)` does what a well server would, so a fault can apply a command and
then lose its answer. Replies are in the shape in which a real server sends them:

    an error of single writes    {"ok": 1, "n": 0, "writeErrors": [{"index": 0, "code": 189, "errmsg": "..."}]}
    an error of the command      {"ok": 0, "code": 13, "codeName": "Unauthorized", "errmsg": "..."}
    badly acknowledged           {"ok": 1, "n": 1, "writeConcernError": {"code": 64, "errmsg": "..."}}

Several of them make a replica set (`replica_set`), whose secondaries lag and may take over.

The protocol: a message is a header of four little-endian integers (length, id, id it answers, kind), then for OP_MSG
(2013) flags and sections: one document, and lists of documents that belong into it under a name.
https://www.mongodb.com/docs/manual/reference/mongodb-wire-protocol/
"""

import copy
import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import bson
import mongomock
from pymongo.errors import DuplicateKeyError

Document = dict[str, Any]
Fault = Callable[["WireStore", str, Document], Document | None]
OP_REPLY, OP_QUERY, OP_MSG = 1, 2004, 2013
HELLO = ("hello", "isMaster", "ismaster")


class Drop(Exception):
    """Close the connection instead of answering."""


class WireStore:
    """One server. `commands` are those it was sent, as (name, document), without hellos and the like."""

    def __init__(self, wire_version: int = 21, primary: bool = True, lag: float = 0.0) -> None:
        self.database = mongomock.MongoClient()["orderproc"]
        self.fault: Fault | None = None
        self.commands: list[tuple[str, Document]] = []
        self.primary, self.members, self.followers = primary, [self], list[WireStore]()
        self._wire_version, self._lag, self._lock = wire_version, lag, threading.RLock()
        self._connections: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, name="wire-store", daemon=True).start()

    def __enter__(self) -> "WireStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self.drop_all()

    @property
    def url(self) -> str:
        """Of the whole set that it is a member of."""
        addresses = ",".join(member.address for member in self.members)
        return f"mongodb://{addresses}/orderproc?replicaSet=rs0"

    def drop_all(self) -> None:
        """Close every connection."""
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    # --- what a well server does

    def apply(self, command: Document) -> Document:
        """Run a command; gives the reply."""
        name = next(iter(command))
        run = getattr(self, f"_{name.lower()}", None)
        if run is None:
            return (
                {"ok": 1.0} if name in ("ping", "endSessions", "killCursors") else error(59, f"no such command: {name}")
            )
        writes = name in ("insert", "update", "delete", "createIndexes")
        if writes and not self.primary:
            return error(10107, "not primary")
        with self._lock:
            reply = run(copy.deepcopy(command))
        for follower in self.followers if writes else []:
            threading.Timer(follower._lag, follower._replay, [copy.deepcopy(command)]).start()
        return reply

    def _replay(self, command: Document) -> None:
        with self._lock:
            getattr(self, f"_{next(iter(command)).lower()}")(command)

    def _insert(self, command: Document) -> Document:
        collection = self.database[command["insert"]]
        return _each(command["documents"], collection.insert_one)

    def _update(self, command: Document) -> Document:
        collection = self.database[command["update"]]
        upserted: list[Document] = []

        def run(statement: Document) -> int:
            result = collection.update_one(statement["q"], statement["u"], upsert=statement.get("upsert", False))
            if result.upserted_id is not None:
                upserted.append({"index": command["updates"].index(statement), "_id": result.upserted_id})
            return result.matched_count

        reply = _each(command["updates"], run)
        return reply | {"nModified": reply["n"]} | ({"upserted": upserted} if upserted else {})

    def _find(self, command: Document) -> Document:
        found = self.database[command["find"]].find(command.get("filter", {}), command.get("projection"))
        found = found.sort(list(command["sort"].items())) if "sort" in command else found
        return _cursor(command["find"], list(found.limit(command.get("limit", 0))))

    def _aggregate(self, command: Document) -> Document:
        return _cursor(command["aggregate"], list(self.database[command["aggregate"]].aggregate(command["pipeline"])))

    def _createindexes(self, command: Document) -> Document:
        for index in command["indexes"]:
            options = {name: index[name] for name in ("name", "unique", "sparse") if name in index}
            self.database[command["createIndexes"]].create_index(list(index["key"].items()), **options)
        return {"ok": 1.0}

    def _listindexes(self, command: Document) -> Document:
        known = self.database[command["listIndexes"]].index_information()
        return _cursor(
            command["listIndexes"], [{"name": name, **each, "key": dict(each["key"])} for name, each in known.items()]
        )

    # --- the wire

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._connections.add(connection)
                threading.Thread(target=self._serve, args=[connection], name="wire-store", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        numbers = itertools.count(1)
        with suppress(OSError, Drop), connection, connection.makefile("rb") as stream:
            while header := stream.read(16):
                length, request, _, kind = struct.unpack("<4i", header)
                command = read_command(kind, stream.read(length - 16))
                body = write_reply(kind, self._answer(command))
                reply = OP_REPLY if kind == OP_QUERY else OP_MSG
                connection.sendall(struct.pack("<4i", 16 + len(body), next(numbers), request, reply) + body)
        self._connections.discard(connection)

    def _answer(self, command: Document) -> Document:
        name = next(iter(command))
        if name in HELLO:
            return self._hello()
        if name not in ("ping", "endSessions"):
            self.commands.append((name, command))
        reply = self.fault(self, name, command) if self.fault else None
        return self.apply(command) if reply is None else reply

    def _hello(self) -> Document:
        primary = next((member.address for member in self.members if member.primary), None)
        return {
            "ok": 1.0, "helloOk": True, "isWritablePrimary": self.primary, "ismaster": self.primary,
            "secondary": not self.primary, "setName": "rs0", "setVersion": 1, "me": self.address,
            "hosts": [member.address for member in self.members], "maxBsonObjectSize": 16777216,
            "maxMessageSizeBytes": 48000000, "maxWriteBatchSize": 100000, "localTime": datetime.now(UTC),
            "minWireVersion": 0, "maxWireVersion": self._wire_version, "logicalSessionTimeoutMinutes": 30,
        } | ({"primary": primary} if primary else {})  # fmt: skip


def replica_set(*lags: float) -> WireStore:
    """The primary of a set, with secondaries that know of a write so many seconds later."""
    primary = WireStore()
    primary.followers = [WireStore(primary=False, lag=lag) for lag in lags]
    for member in [primary, *primary.followers]:
        member.members = [primary, *primary.followers]
    return primary


def read_command(kind: int, body: bytes) -> Document:
    """The command in a message."""
    if kind == OP_QUERY:  # flags, the collection's name with a zero byte, two integers, the document
        return dict(bson.decode(body[body.index(b"\0", 4) + 9 :]))
    command, place = {}, 4
    end = len(body) - (4 if struct.unpack_from("<I", body)[0] & 1 else 0)  # behind it there may be a checksum
    while place < end:
        section, place = body[place], place + 1
        size = struct.unpack_from("<i", body, place)[0]
        part, place = body[place : place + size], place + size
        if section == 0:  # its first field is the command's name, also where a list came before it
            command = dict(bson.decode(part)) | command
        else:
            name, _, documents = part[4:].partition(b"\0")
            command[name.decode()] = bson.decode_all(documents)
    return command


def write_reply(kind: int, reply: Document) -> bytes:
    """A document as the answer to that kind of message."""
    if kind == OP_QUERY:
        return struct.pack("<iqii", 8, 0, 0, 1) + bson.encode(reply)
    return struct.pack("<IB", 0, 0) + bson.encode(reply)


def _each(statements: list[Document], run: Callable[[Document], Any]) -> Document:
    done, errors = 0, list[Document]()
    for index, statement in enumerate(statements):
        try:
            matched = run(statement)
            done += matched if isinstance(matched, int) else 1
        except DuplicateKeyError as duplicate:
            errors.append({"index": index, "code": 11000, "errmsg": f"E11000 {duplicate}"})
    return {"ok": 1.0, "n": done} | ({"writeErrors": errors} if errors else {})


def _cursor(collection: str, documents: list[Document]) -> Document:
    return {"ok": 1.0, "cursor": {"id": bson.Int64(0), "ns": f"orderproc.{collection}", "firstBatch": documents}}


# --- faults


def error(code: int, message: str = "refused", **more: Any) -> Document:
    """The reply to a command that failed as a whole."""
    return {"ok": 0.0, "code": code, "codeName": f"Code{code}", "errmsg": message, **more}


def refuse(code: int) -> Fault:
    """The whole command fails, and nothing is done."""
    return lambda server, name, command: error(code)


def refuse_writes(code: int) -> Fault:
    """Every write in the command is refused, and none is done."""

    def fault(server: WireStore, name: str, command: Document) -> Document:
        count = len(command.get("updates", command.get("documents", [])))
        return {
            "ok": 1.0,
            "n": 0,
            "nModified": 0,
            "writeErrors": [{"index": n, "code": code, "errmsg": "refused"} for n in range(count)],
        }

    return fault


def acknowledge_badly(code: int) -> Fault:
    """Everything is done, but not as safely as was asked for."""
    return lambda server, name, command: (
        server.apply(command) | {"writeConcernError": {"code": code, "errmsg": "no majority"}}
    )


def lose(server: WireStore, name: str, command: Document) -> Document | None:
    """The connection is lost before anything is done."""
    raise Drop


def lose_answer(server: WireStore, name: str, command: Document) -> Document | None:
    """Everything is done, and the connection is lost then."""
    server.apply(command)
    raise Drop


def delay(seconds: float) -> Fault:
    """As usual, but late."""
    return lambda server, name, command: time.sleep(seconds)


def when(matches: Callable[[str, Document], bool], *faults: Fault) -> Fault:
    """The faults one after the other, at commands that match; as usual then."""
    left = list(faults)

    def fault(server: WireStore, name: str, command: Document) -> Document | None:
        return left.pop(0)(server, name, command) if left and matches(name, command) else None

    return fault


def always(matches: Callable[[str, Document], bool], fault: Fault) -> Fault:
    """The fault at each command that matches."""
    return lambda server, name, command: fault(server, name, command) if matches(name, command) else None


def on(collection: str, *names: str) -> Callable[[str, Document], bool]:
    """Matches commands of these names on a collection; `*`: on any but the lease's."""
    return lambda name, command: (
        name in names and (command[name] == collection or (collection == "*" and command[name] != "leases"))
    )
