"""Ids, times and traces."""

import re
import uuid
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.base.ids import new_order_id, new_traceparent, now, rfc3339

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_order_ids_are_uuids_version_7_and_sort_by_time():
    made = [uuid.UUID(new_order_id()) for _ in range(100)]
    assert {(id.version, id.variant) for id in made} == {(7, uuid.RFC_4122)} and len(set(made)) == 100
    assert [id.int >> 80 for id in made] == sorted(id.int >> 80 for id in made)


def test_now_is_what_the_store_gives_back():
    moment = now()
    assert moment.tzinfo is None and moment.microsecond % 1000 == 0


def test_times_have_milliseconds_and_a_z():
    assert rfc3339(datetime(2026, 1, 31, 9, 30, 0, 7000)) == "2026-01-31T09:30:00.007Z"


@pytest.mark.parametrize("given", [TRACE, TRACE[:-2] + "00", "01" + TRACE[2:] + "-what-comes-later"])
def test_a_good_traceparent_is_kept(given):
    assert new_traceparent(given)[3:52] == given[3:52]


@pytest.mark.parametrize(
    "given",
    [
        "",
        TRACE.upper(),
        TRACE + "-more",
        "ff" + TRACE[2:],
        TRACE + "\n",
        "00-" + "0" * 32 + TRACE[35:],
        TRACE[:36] + "0" * 16 + "-01",
    ],
)
def test_a_bad_traceparent_gives_way_to_a_new_trace(given):
    made = new_traceparent(given)
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-01", made) and made[3:35] not in given.lower()


@given(st.text(max_size=80))
def test_whatever_is_given_a_traceparent_comes_out(given):
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", new_traceparent(given))
