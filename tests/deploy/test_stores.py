"""docs/stores.md against the program and its driver: what anybody checks a store by must be what is asked of it."""

import re

import botocore
import pymongo
import pytest
import yaml
from pymongo.common import MIN_SUPPORTED_SERVER_VERSION, MIN_SUPPORTED_WIRE_VERSION

from core.base.settings import ROOT, load
from core.store.connection import connect
from core.store.store import OF_ORDERS, OF_STOCK

TEXT = (ROOT / "docs/stores.md").read_text()
URLS = re.findall(r"^MONGODB_URL='(.+)'", TEXT, re.MULTILINE)
ANY_CERTIFICATES = f"{botocore.__path__[0]}/cacert.pem"


@pytest.mark.parametrize("url", URLS)
def test_the_program_starts_with_each_connection_string(url, monkeypatch):
    def away(*_, **__):
        raise pymongo.errors.AutoReconnect("there is no such host")

    monkeypatch.setattr(pymongo.database.Database, "command", away)
    given = url.replace("+srv", "").replace("/etc/docdb/global-bundle.pem", ANY_CERTIFICATES)  # DNS is not asked
    database = connect(load({"MONGODB_URL": given}).mongodb_url)
    database.client.close()
    assert database.name == "orderproc"
    assert database.read_preference == pymongo.ReadPreference.PRIMARY
    assert not database.client.options.retry_writes


def test_the_indexes_to_make_by_hand_are_those_of_the_program():
    by_hand = [
        (collection, yaml.safe_load(keys), yaml.safe_load(options or "{}"))
        for collection, keys, options in re.findall(
            r"^db\.(\w+)\.createIndex\(({.+?})(?:, ({.+}))?\)", TEXT, re.MULTILINE
        )
    ]
    made = [("orders", index.document) for index in OF_ORDERS] + [("stock", OF_STOCK.document)]
    for (collection, keys, options), (where, index) in zip(by_hand, made, strict=True):
        assert (collection, list(keys.items())) == (where, list(index["key"].items()))
        assert options == {name: index[name] for name in options} and "partialFilterExpression" not in index
        assert set(index) - {"key", "name"} == set(options) - {"name"}


def test_the_operators_on_the_page_are_those_in_the_code():
    asked = TEXT[TEXT.index("## What is asked of a server") : TEXT.index("No transactions")]
    source = "".join(path.read_text() for path in (ROOT / "core/store").glob("*.py"))
    fields = {"$outbox"}
    assert set(re.findall(r"\$\w+", asked)) == set(re.findall(r'"(\$\w+)"', source)) - fields
    assert "the positional `$`" in asked and ".$." in source


def test_the_versions_on_the_page_are_those_of_the_driver():
    [pinned] = re.findall(r"^pymongo==(\d+\.\d+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert f"PyMongo {pinned}, which asks for wire version {MIN_SUPPORTED_WIRE_VERSION}:" in TEXT
    assert f"older than MongoDB {MIN_SUPPORTED_SERVER_VERSION}" in " ".join(TEXT.split())


def test_the_page_is_at_most_120_lines_long():
    assert len(TEXT.splitlines()) <= 120
