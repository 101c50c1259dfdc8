"""Exact money."""

import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.order.money import LARGEST_TOTAL, currencies, from_minor, to_minor


@pytest.mark.parametrize(
    ("amount", "currency", "minor"),
    [
        ("19.99", "USD", 1999),
        ("0.1", "USD", 10),
        ("5", "USD", 500),
        ("5.00", "USD", 500),
        ("1E+3", "USD", 100_000),
        ("0", "USD", 0),
        ("0.000", "JPY", 0),
        ("-0.0", "USD", 0),
        ("500", "JPY", 500),
        ("1.234", "KWD", 1234),
        ("1000000000", "USD", 10**11),
    ],
)
def test_an_amount_becomes_whole_minor_units(amount, currency, minor):
    assert to_minor(Decimal(amount), currency) == minor


@pytest.mark.parametrize(
    ("amount", "currency"),
    [
        ("19.999", "USD"),
        ("0.5", "JPY"),
        ("1.2345", "KWD"),
        ("1e-400", "USD"),
        ("1.0000000000000000000000000000001", "USD"),
    ],
)
def test_more_decimals_than_the_currency_has_are_refused(amount, currency):
    with pytest.raises(ValueError, match="at most"):
        to_minor(Decimal(amount), currency)


def test_zeros_behind_the_last_digit_are_no_decimals():
    assert to_minor(Decimal("1.500000000000000000000000000000000000"), "USD") == 150


def test_a_tenth_and_two_tenths_are_three_tenths():
    assert from_minor(to_minor(Decimal("0.1"), "USD") + to_minor(Decimal("0.2"), "USD"), "USD") == 0.3


def test_whole_amounts_come_back_whole():
    assert repr(from_minor(1500, "USD")) == "15" and repr(from_minor(7, "JPY")) == "7"


@given(st.integers(0, LARGEST_TOTAL), st.sampled_from(["USD", "JPY", "KWD"]))
def test_an_amount_of_up_to_15_digits_survives_json(minor, currency):
    there_and_back = json.loads(json.dumps(from_minor(minor, currency)), parse_float=Decimal)
    assert to_minor(there_and_back, currency) == minor


def test_every_currency_has_three_letters_and_at_most_four_decimals():
    assert all(code.isalpha() and len(code) == 3 and 0 <= decimals <= 4 for code, decimals in currencies().items())
