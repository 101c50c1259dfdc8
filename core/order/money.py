"""Exact money: amounts are whole minor units (cents), and a float is only ever the way a number is written in JSON."""

import json
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal
from functools import cache

from core.base.settings import ROOT

LARGEST_TOTAL = 10**15 - 1  # minor units; 15 digits are what a JSON number carries exactly
EXACT = Context(prec=MAX_PREC, Emin=MIN_EMIN, Emax=MAX_EMAX)  # the usual one rounds after 28 digits


@cache
def currencies() -> dict[str, int]:
    """ISO 4217 code -> number of decimals."""
    return json.loads((ROOT / "schemas/currencies.json").read_text())


def to_minor(amount: Decimal | int, currency: str) -> int:
    """19.99 USD -> 1999. Raises ValueError where the amount has more decimals than the currency."""
    minor = Decimal(amount).scaleb(currencies()[currency], EXACT)
    if minor != minor.to_integral_value():
        raise ValueError(f"must have at most {currencies()[currency]} decimals in {currency}")
    return int(minor)


def from_minor(minor: int, currency: str) -> int | float:
    """1999 USD -> 19.99; whole amounts come back whole. The division rounds correctly, so 15 digits print exactly."""
    unit = 10 ** currencies()[currency]
    return minor // unit if minor % unit == 0 else minor / unit
