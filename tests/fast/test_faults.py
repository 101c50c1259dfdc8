"""Faults: what is wrong with a value, as its sender reads it."""

from core.order.schemas import find_faults, schema


def test_a_fault_names_the_field_that_is_missing_or_unknown():
    faults = find_faults(schema("order"), {"custmerId": "ada", "items": [{"sku": "A1", "quantity": 1}]})
    assert {("/customerId", "is required"), ("/custmerId", "is not a known field")} <= set(faults)
    assert ("/items/0/price", "is required") in faults


def test_there_are_at_most_twenty_faults_and_none_echoes_input():
    faults = find_faults(schema("order"), {str(n) + "x" * 50_000: 1 for n in range(50)})
    assert len(faults) == 20 and all(len(pointer + message) < 400 for pointer, message in faults)


def test_pointers_are_escaped_as_rfc_6901_says():
    assert ("/a~1b~0c", "is not a known field") in find_faults(schema("order"), {"a/b~c": 1})
