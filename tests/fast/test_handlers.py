"""The three handlers, each by itself: given an event and fakes, what follows and which functions are called."""

import pytest

from handlers import email, inventory, shipping
from tests.fakes import ORDER, event, services
from tests.support.samples import LABEL

# --- inventory


def test_inventory_holds_the_stock_of_a_new_order():
    given = services(stock={"A1": 5})
    assert inventory.order_created(event("order_created"), given).type == "inventory_reserved"
    assert given.stock.units == {"A1": 3}


def test_inventory_fails_an_order_without_stock_and_holds_nothing():
    given = services(stock={"A1": 1})
    answer = inventory.order_created(event("order_created"), given)
    assert (answer.type, answer.data) == ("order_failed", {"reason": "out_of_stock"})
    assert given.stock.units == {"A1": 1}


def test_an_unknown_sku_comes_before_one_out_of_stock():
    items = [{"sku": "A1", "quantity": 2, "price": 1}, {"sku": "Z9", "quantity": 1, "price": 1}]
    answer = inventory.order_created(event("order_created", {"items": items}), services(stock={"A1": 1}))
    assert answer.data == {"reason": "unknown_sku"}


@pytest.mark.parametrize("type", ["order_failed", "order_cancelled"])
def test_inventory_gives_back_what_an_order_holds(type):
    given = services(stock={"A1": 3}, holds={"A1": 2})
    assert getattr(inventory, type)(event(type), given) is None
    assert given.stock.units == {"A1": 5}


# --- shipping


def test_shipping_makes_a_label_with_the_order_id_as_token():
    given = services(answers={"make_label": {**LABEL, "url": "elsewhere"}})
    answer = shipping.inventory_reserved(event("inventory_reserved"), given)
    assert (answer.type, answer.data) == ("order_confirmed", {"shipment": LABEL})
    [(function, payload)] = given.calls
    assert (function, payload["action"], payload["token"]) == ("make_label", "make", ORDER["id"])


def test_shipping_raises_where_no_label_can_be_made():
    with pytest.raises(TimeoutError):
        shipping.inventory_reserved(event("inventory_reserved"), services(answers={"make_label": TimeoutError()}))


@pytest.mark.parametrize("type", ["order_failed", "order_cancelled"])
def test_shipping_voids_the_label_of_an_order_that_ends_badly(type):
    given = services()
    assert getattr(shipping, type)(event(type), given) is None
    assert given.calls == [("make_label", {"action": "void", "token": ORDER["id"]})]


# --- email


@pytest.mark.parametrize("type", ["order_confirmed", "order_failed", "order_cancelled"])
def test_email_sends_one_mail_with_the_event_id_as_token(type):
    sent, given = event(type), services()
    assert getattr(email, type)(sent, given) is None
    [(function, mail)] = given.calls
    assert (function, mail["token"], mail["to"], mail["template"]) == ("send_email", sent.id, ORDER["email"], type)


def test_an_order_without_an_address_gets_no_mail():
    sent, given = event("order_failed"), services()
    del sent.order["email"]
    email.order_failed(sent, given)
    assert given.calls == []
