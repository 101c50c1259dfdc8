"""The same functions on AWS's own runtime client and on the local runtime: the same answers, errors and files.

Each function has a story: calls, made one after the other, and what must come of each. On AWS's side it is the package
that `sam build` makes. Not shown here: SES, DynamoDB, roles, and what Lambda does around its runtime.
"""

import re
from functools import cache
from pathlib import Path

import pytest

from lambdas.local import FUNCTIONS
from tests.support.lambda_runtimes import RUNTIMES, TEMPLATE, NeverStarted, awslambdaric

SHIP_TO = {"name": "Zoë 木村 <&> 😀", "line1": "12 St James's Square", "city": "Łódź", "postalCode": "90-001"}


def mail(token="t-1", to="zoe@bücher.example", template="order_confirmed", **changes):
    items = [{"sku": "A1", "quantity": 2, "price": 5.25}, {"sku": "B2", "quantity": 1, "price": 1e3}]
    order = {"id": "o-1", "currency": "EUR", "items": items, "total": 1010.5, "shippingAddress": SHIP_TO, **changes}
    return {"token": token, "to": to, "template": template, "order": order, "traceparent": "00-1-2-01"}


def label(action, token="o-1", **more):
    return {"action": action, "token": token, "items": [], "traceparent": "00-1-2-01", **more}


def raised(kind, message):
    return {"errorType": kind, "errorMessage": message}


T_1, T_2 = "<t-1@orderproc>", "<t-2@orderproc>"
TWO_LINES = "a@b.example\nBcc: c@d.example"
SAFE = "must be 1 to 64 of A-Z, a-z, 0-9 and -, not"
NO_DICT = "'NoneType' object is not subscriptable"
O_1 = {"carrier": "ACME Parcel", "trackingNumber": "563191431772249912"}
O_2 = {"carrier": "ACME Parcel", "trackingNumber": "606840049163493569"}
STORIES = {
    "send_email": [
        (mail(), {"messageId": T_1, "duplicate": False}),
        (mail(), {"messageId": T_1, "duplicate": True}),
        (mail("t-2", template="order_failed", failureReason="out_of_stock"), {"messageId": T_2, "duplicate": False}),
        (mail("t-3", to=TWO_LINES), raised("ValueError", f"to must be one plain mail address, not {TWO_LINES!r}")),
        (mail("木村"), raised("ValueError", f"token {SAFE} '木村'")),
        (mail("t-4", template="order_lost"), raised("KeyError", "'order_lost'")),
        ({}, raised("KeyError", "'token'")),
        (None, raised("TypeError", NO_DICT)),
        (mail(), {"messageId": T_1, "duplicate": True}),
    ],
    "make_label": [
        (label("make", shipTo=SHIP_TO), O_1),
        (label("make"), O_1),
        (label("make", "o-2", shipTo=SHIP_TO), O_2),
        (label("void", "o-2"), {"voided": True}),
        (label("make", "o-2"), raised("LabelVoided", "the label of order o-2 is void")),
        (label("void", "o-3"), {"voided": True}),
        (label("void", "o-3"), {"voided": True}),
        (label("make", "o-3"), raised("LabelVoided", "the label of order o-3 is void")),
        (label("print", "o-4"), raised("ValueError", "action must be make or void, not 'print'")),
        (label("make", "../ö"), raised("ValueError", f"token {SAFE} '../ö'")),
        ({}, raised("KeyError", "'token'")),
        (None, raised("TypeError", NO_DICT)),
    ],
}  # fmt: skip
LEFT = {
    "send_email": ["mail/new/t-1.orderproc", "mail/new/t-2.orderproc"],
    "make_label": ["labels/o-1.svg", "labels/o-2.void", "labels/o-3.void"],
}


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    """Play a function's story on a runtime, once: the results, and what is then on disk."""

    @cache
    def played(function, runtime):
        folder = tmp_path_factory.mktemp(f"{function}-{runtime}")
        with RUNTIMES[runtime](function, folder) as call:
            return [call(event) for event, _ in STORIES[function]], files(folder / "data")

    return played


def files(folder: Path) -> dict[str, str]:
    """Path -> text, without what differs from mail to mail: its date and the border between its parts."""
    found = {str(file.relative_to(folder)): file.read_bytes().decode() for file in folder.rglob("*") if file.is_file()}
    return {name: re.sub(r"(?m)^Date: .*$|===============\d+==", "...", text) for name, text in sorted(found.items())}


def alike(payload: dict) -> dict:
    """An answer without the number of its request, and of a trace the frames that are the function's."""
    if "stackTrace" not in payload:
        return payload
    frames = re.findall(r'lambdas/(\w+)\.py", line (\d+), in (\w+)', "".join(payload["stackTrace"]))
    return {
        **payload,
        "requestId": bool(payload.get("requestId")),
        "stackTrace": [f for f in frames if f[0] != "local"],
    }


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("function", STORIES)
def test_every_call_comes_to_what_it_must(play, function, runtime):
    answers, left = play(function, runtime)
    for (event, expected), (failed, payload) in zip(STORIES[function], answers, strict=True):
        result = {name: payload[name] for name in ("errorType", "errorMessage")} if failed else payload
        assert (failed, result) == ("errorType" in expected, expected), event
    assert list(left) == LEFT[function]


@pytest.mark.parametrize("function", STORIES)
def test_both_runtimes_give_the_same_answers_and_error_shapes(play, function):
    there, here = ([alike(answer.payload) for answer in play(function, runtime)[0]] for runtime in RUNTIMES)
    assert here == there
    assert all(answer["stackTrace"] for answer in there if "errorType" in answer)


@pytest.mark.parametrize("function", STORIES)
def test_both_runtimes_leave_the_same_on_disk(play, function):
    there, here = (play(function, runtime)[1] for runtime in RUNTIMES)
    assert here == there


def test_the_template_deploys_exactly_the_local_functions_all_with_stories():
    assert sorted(TEMPLATE.values()) == sorted(f"lambdas.{name}.handler" for name in FUNCTIONS)
    assert STORIES.keys() == LEFT.keys() == FUNCTIONS.keys()


def test_a_missing_module_in_a_package_is_named_at_start(tmp_path):
    with (
        awslambdaric("make_label", tmp_path, without="tokens.py") as call,
        pytest.raises(NeverStarted, match=r"'tokens'.*Runtime\.ImportModuleError"),
    ):
        call({})
