"""What send_email and make_label promise: one mail per token, one label per order, none once it is voided."""

import base64
import mailbox
import random
import re
import socketserver
import threading
from concurrent.futures import ThreadPoolExecutor
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from pathlib import Path
from xml.etree import ElementTree

import boto3
import pytest
from botocore.stub import ANY, Stubber

from lambdas import make_label, send_email, tokens
from tests.support.lambda_runtimes import keep_to

ORDER_ID = "0190a5b2-7c1e-7d3a-9f00-5b2c8d1e4f6a"
TOKEN = "6fa459ea-ee8a-5ca4-894e-db77e160355e"
ADDRESS = {"name": "Ada", "line1": "12 St James's Square", "city": "London", "postalCode": "SW1Y 4JH", "country": "GB"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A data folder of its own, and none of the settings that lead elsewhere."""
    keep_to(tmp_path, monkeypatch)
    return tmp_path


def order(**changes):
    items = [{"sku": "A1", "quantity": 2, "price": 5.25}]
    return {"id": ORDER_ID, "customerId": "c-1", "currency": "EUR", "items": items, "total": 10.5, **changes}


def send(token=TOKEN, to="ada@example.com", template="order_confirmed", **changes):
    event = {"token": token, "to": to, "template": template, "order": order(**changes), "traceparent": "00-1-2-01"}
    return send_email.handler(event, None)


def label(action, token=ORDER_ID, **more):
    return make_label.handler({"action": action, "token": token, "items": [], "traceparent": "00-1-2-01", **more}, None)


def mails(folder) -> list[EmailMessage]:
    files = [file for part in ("new", "cur") for file in (folder / "mail" / part).iterdir()]
    return [message_from_bytes(file.read_bytes(), policy=default) for file in files]


def at_once(count, work):
    """Run work(0), work(1), ... on as many threads, all let go at the same moment; what each gave or raised."""
    gate = threading.Barrier(count)

    def one(number):
        gate.wait()
        try:
            return work(number)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


# The mail


def test_mail_lands_in_the_maildir_and_parses_with_both_parts(folder):
    shipment = {"carrier": "ACME Parcel", "trackingNumber": "4711"}
    assert send(shipment=shipment, shippingAddress=ADDRESS) == {"messageId": f"<{TOKEN}@orderproc>", "duplicate": False}
    [mail] = mails(folder)
    assert mail["Message-ID"] == f"<{TOKEN}@orderproc>"
    assert (mail["X-Order-Id"], mail["To"], mail["From"]) == (ORDER_ID, "ada@example.com", "orders@example.com")
    assert mail["Date"].datetime and ORDER_ID in mail["Subject"] and not mail.defects
    text, html = mail.get_body(("plain",)).get_content(), mail.get_body(("html",)).get_content()
    for fact in ("A1", "2 x 5.25 EUR", "10.5 EUR", "4711", "ACME Parcel", "London"):
        assert fact in text and fact in html


def test_any_maildir_reader_finds_the_mail(folder):
    send()
    [mail] = mailbox.Maildir(folder / "mail", create=False)
    assert mail["X-Order-Id"] == ORDER_ID
    assert sorted(entry.name for entry in (folder / "mail").iterdir()) == ["cur", "new", "tmp"]
    assert not list((folder / "mail/tmp").iterdir())


@pytest.mark.parametrize("template", ["order_confirmed", "order_failed", "order_cancelled"])
def test_every_template_makes_a_mail(folder, template):
    send(template=template)
    assert len(mails(folder)) == 1


def test_an_unknown_template_is_refused(folder):
    with pytest.raises(KeyError, match="order_lost"):
        send(template="order_lost")


def test_the_reason_of_a_failure_is_given_in_words(folder):
    send(template="order_failed", failureReason="out_of_stock")
    assert "out of stock" in mails(folder)[0].get_body(("plain",)).get_content()


def test_the_sender_is_a_setting(folder, monkeypatch):
    monkeypatch.setenv("MAIL_FROM", "The Shop <shop@example.org>")
    send()
    assert mails(folder)[0]["From"] == "The Shop <shop@example.org>"


def test_text_of_any_script_survives_in_a_mail_of_ascii(folder):
    send(shippingAddress={**ADDRESS, "name": "Zoë 木村 😀"})
    [file] = (folder / "mail/new").iterdir()
    assert file.read_bytes().isascii()
    assert "Zoë 木村 😀" in mails(folder)[0].get_body(("html",)).get_content()


def test_order_values_are_escaped_in_html_and_not_in_text(folder):
    evil = "<script>alert('x')</script> & \"co\""
    values = {"shippingAddress": {**ADDRESS, "name": evil}, "failureReason": "<b>", "currency": "<u>"}
    send(
        items=[{"sku": "<i>", "quantity": 1, "price": 1}],
        shipment={"carrier": "<a>", "trackingNumber": "<s>"},
        **values,
    )
    html = mails(folder)[0].get_body(("html",)).get_content()
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; &quot;co&quot;" in html
    assert set(re.findall(r"<(\w+)", html)) == {"p", "table", "tr", "td"}
    assert evil in mails(folder)[0].get_body(("plain",)).get_content()


@pytest.mark.parametrize(
    "to",
    [
        "a@example.com\r\nBcc: b@example.com",
        "a@example.com\n",
        "a@example.com\rX: y",
        "a@example.com\x0b",
        "a@b.c\u2028X: y",
    ]
    + [
        "a@example.com, b@example.com",
        "A <a@example.com>",
        '"a b"@example.com',
        "a@b@c.de",
        "example.com",
        "@example.com",
        "",
    ]
    + ["a@example.com\x00", "a@.example.com"],
)
def test_mail_to_anything_but_one_plain_address_is_refused(folder, to):
    with pytest.raises(ValueError, match="to must be one plain mail address|label empty"):
        send(to=to)
    assert not (folder / "mail").exists()


def test_a_domain_in_any_alphabet_is_written_in_ascii(folder):
    send(to="ada@bücher.example")
    assert mails(folder)[0]["To"] == "ada@xn--bcher-kva.example"


@pytest.mark.parametrize("bad", ["x\r\nBcc: b@example.com", "x\n", "../x", "", "x" * 65, "a b", "é"])
def test_an_unsafe_order_id_or_token_is_refused_without_mail(folder, bad):
    with pytest.raises(ValueError, match="order id must be"):
        send(id=bad)
    with pytest.raises(ValueError, match="token must be"):
        send(token=bad)
    assert not (folder / "mail").exists()


def test_a_sender_setting_with_a_line_end_is_refused(folder, monkeypatch):
    monkeypatch.setenv("MAIL_FROM", "shop@example.org\r\nBcc: b@example.com")
    with pytest.raises(ValueError):
        send()


def test_line_ends_in_a_body_value_add_no_header(folder):
    send(shippingAddress={**ADDRESS, "name": "Ada\r\n\r\nBcc: b@example.com"})
    assert mails(folder)[0]["Bcc"] is None


def test_twenty_sends_of_one_token_at_once_leave_one_mail(folder):
    answers = at_once(20, lambda _: send())
    assert [answer["duplicate"] for answer in answers].count(False) == 1
    assert len(mails(folder)) == 1


def test_another_token_is_another_mail_even_with_the_same_beginning(folder):
    send(token="abc")
    (folder / "mail/new/abc.orderproc").rename(folder / "mail/cur/abc.orderproc:2,S")
    assert send(token="ab")["duplicate"] is False
    assert len(mails(folder)) == 2


@pytest.mark.parametrize("flags", [":2,S", ":2,RS", ":2,", ""])
def test_a_mail_that_was_read_is_not_delivered_again(folder, flags):
    send()
    [file] = (folder / "mail/new").iterdir()
    file.rename(folder / "mail/cur" / f"{file.name}{flags}")
    assert send() == {"messageId": f"<{TOKEN}@orderproc>", "duplicate": True}
    assert len(mails(folder)) == 1


# SMTP


class SmtpServer(socketserver.ThreadingTCPServer):
    """Just enough of SMTP to take mails: `taken` has (sender, recipients, mail), `logins` what AUTH was given."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), SmtpTalk)
        self.taken, self.logins, self.refuse = [], [], ""


class SmtpTalk(socketserver.StreamRequestHandler):
    def handle(self):
        sender, recipients = "", []
        self.say("220 test")
        for line in self.rfile:
            verb = line[:4].upper()
            if verb == b"EHLO":
                self.say("250-test\r\n250 AUTH PLAIN")
            elif verb == b"AUTH":
                self.server.logins.append(base64.b64decode(line.split()[2]).decode())
                self.say("235 ok")
            elif verb == b"MAIL":
                sender, recipients = line.decode().strip(), []
                self.say("250 ok")
            elif verb == b"RCPT":
                recipients.append(line.decode().strip())
                self.say(self.server.refuse or "250 ok")
            elif verb == b"DATA":
                self.say("354 go on")
                self.server.taken.append((sender, recipients, self.mail()))
                self.say("250 taken")
            else:
                self.say("221 bye" if verb == b"QUIT" else "250 ok")
                if verb == b"QUIT":
                    return

    def mail(self):
        lines = list(iter(self.rfile.readline, b".\r\n"))
        return message_from_bytes(b"".join(lines), policy=default)

    def say(self, text):
        self.wfile.write(f"{text}\r\n".encode())


@pytest.fixture
def smtp(monkeypatch):
    with SmtpServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        monkeypatch.setenv("SMTP_URL", f"smtp://127.0.0.1:{server.server_address[1]}")
        yield server
        server.shutdown()


def test_a_mail_goes_to_the_smtp_server_once(smtp, folder):
    assert [send()["duplicate"], send()["duplicate"]] == [False, True]
    [(sender, recipients, mail)] = smtp.taken
    assert sender.lower().startswith("mail from:<orders@example.com>")  # Python 3.13 has it in lower case
    assert [each.lower() for each in recipients] == ["rcpt to:<ada@example.com>"]
    assert mail["Message-ID"] == f"<{TOKEN}@orderproc>" and mail.get_body(("html",))
    assert not (folder / "mail").exists() and not smtp.logins


def test_a_mail_of_any_script_needs_no_8_bit_server(smtp):
    send(shippingAddress={**ADDRESS, "name": "Zoë"})
    [(_, _, mail)] = smtp.taken
    assert mail.as_bytes().isascii() and "Zoë" in mail.get_body(("plain",)).get_content()


def test_name_and_password_in_the_smtp_url_are_percent_decoded(smtp, monkeypatch):
    monkeypatch.setenv("SMTP_URL", f"smtp://shop%40example.org:p%2Fw@127.0.0.1:{smtp.server_address[1]}")
    send()
    assert smtp.logins == ["\0shop@example.org\0p/w"]


def test_mail_that_smtp_refused_is_sent_on_the_next_try(smtp):
    smtp.refuse = "451 later"
    with pytest.raises(Exception, match="451"):
        send()
    smtp.refuse = ""
    assert send()["duplicate"] is False
    assert len(smtp.taken) == 1


def test_dying_between_smtp_and_mark_resends_with_the_same_id(smtp, monkeypatch):
    with monkeypatch.context() as dying:
        dying.setattr(tokens, "put", lambda *_: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            send()
    send()
    assert [mail["Message-ID"] for _, _, mail in smtp.taken] == [f"<{TOKEN}@orderproc>"] * 2


def test_smtps_speaks_tls_from_the_start_and_checks_the_certificate(monkeypatch):
    seen = []

    class Recorder:
        def __init__(self, host, port, *, timeout, context):
            seen.append((host, port, context.check_hostname, context.verify_mode.name))
            raise ConnectionRefusedError

    monkeypatch.setattr(send_email.smtplib, "SMTP_SSL", Recorder)
    monkeypatch.setenv("SMTP_URL", "smtps://mail.example.org")
    with pytest.raises(ConnectionRefusedError):
        send()
    assert seen == [("mail.example.org", 0, True, "CERT_REQUIRED")]


# The label


def test_a_label_has_the_address_order_and_tracking_number(folder):
    answer = label("make", shipTo=ADDRESS)
    assert answer["carrier"] == "ACME Parcel" and re.fullmatch(r"\d{18}", answer["trackingNumber"])
    assert [file.name for file in (folder / "labels").iterdir()] == [f"{ORDER_ID}.svg"]
    svg = ElementTree.parse(folder / "labels" / f"{ORDER_ID}.svg").getroot()
    lines = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert lines[:4] == ["Ada", "12 St James's Square", "SW1Y 4JH London", "GB"]
    assert ORDER_ID in lines[4] and lines[5] == answer["trackingNumber"]


def test_a_label_needs_no_address(folder):
    assert label("make") == label("make", shipTo=None)
    ElementTree.parse(folder / "labels" / f"{ORDER_ID}.svg")


def test_markup_in_an_address_is_text_on_the_label(folder):
    label("make", shipTo={**ADDRESS, "name": "</text><script>&amp;"})
    svg = ElementTree.parse(folder / "labels" / f"{ORDER_ID}.svg").getroot()
    assert "</text><script>&amp;" in [element.text for element in svg]


def test_tracking_numbers_belong_to_their_token_and_reveal_wrong_digits():
    number = make_label.tracking_number(ORDER_ID)
    assert number == make_label.tracking_number(ORDER_ID) != make_label.tracking_number(ORDER_ID + "0")

    def valid(text):
        return int(text) % 97 == 1

    wrong = {number[:at] + digit + number[at + 1 :] for at in range(18) for digit in "0123456789"}
    swapped = {number[:at] + number[at + 1] + number[at] + number[at + 2 :] for at in range(17)}
    assert valid(number) and not any(map(valid, (wrong | swapped) - {number}))


def test_eight_threads_making_one_label_get_one_answer_and_label(folder):
    for round_ in range(20):
        answers = at_once(8, lambda _, token=f"order-{round_}": label("make", token=token))
        assert all(answer == answers[0] for answer in answers) and "trackingNumber" in answers[0]
    assert len(list((folder / "labels").iterdir())) == 20 and not list((folder / "tmp").iterdir())


def test_a_label_made_again_is_the_first_one(folder):
    label("make", shipTo=ADDRESS)
    first = (folder / "labels" / f"{ORDER_ID}.svg").read_text()
    label("make", shipTo={**ADDRESS, "name": "Somebody else"})
    assert (folder / "labels" / f"{ORDER_ID}.svg").read_text() == first


def test_a_void_removes_the_label_and_refuses_the_next(folder):
    label("make")
    assert label("void") == label("void") == {"voided": True}
    assert [file.name for file in (folder / "labels").iterdir()] == [f"{ORDER_ID}.void"]
    with pytest.raises(make_label.LabelVoided, match=ORDER_ID):
        label("make")


def test_a_void_that_comes_first_marks_and_refuses_the_label(folder):
    assert label("void") == {"voided": True}
    with pytest.raises(make_label.LabelVoided):
        label("make")
    assert [file.name for file in (folder / "labels").iterdir()] == [f"{ORDER_ID}.void"]


def test_a_void_between_look_and_write_removes_the_new_label(folder, monkeypatch):
    write = tokens.put

    def late(key, text):
        if key.endswith(".svg"):
            label("void")
        return write(key, text)

    monkeypatch.setattr(tokens, "put", late)
    with pytest.raises(make_label.LabelVoided):
        label("make")
    assert [file.name for file in (folder / "labels").iterdir()] == [f"{ORDER_ID}.void"]


def test_the_next_void_finishes_one_that_died_after_marking(folder, monkeypatch):
    label("make")
    with monkeypatch.context() as dying:
        dying.setattr(tokens, "drop", lambda _: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            label("void")
    label("void")
    assert [file.name for file in (folder / "labels").iterdir()] == [f"{ORDER_ID}.void"]


def test_however_makes_and_voids_race_no_voided_label_is_left(folder):
    for round_ in range(150):
        actions = random.sample(["make", "make", "make", "void"], 4)
        token = f"order-{round_}"
        answers = at_once(4, lambda n, token=token, actions=actions: label(actions[n], token=token))
        assert not (folder / "labels" / f"{token}.svg").exists() and (folder / "labels" / f"{token}.void").exists()
        assert all(isinstance(answer, dict | make_label.LabelVoided) for answer in answers)


@pytest.mark.parametrize("bad", ["../../etc/passwd", "a/b", "..", "", "a\n", "a.b", "x" * 65, "é"])
@pytest.mark.parametrize("action", ["make", "void"])
def test_a_token_that_is_no_safe_id_is_refused(folder, action, bad):
    with pytest.raises(ValueError, match="token must be"):
        label(action, token=bad)
    assert not list(folder.iterdir())


def test_an_unknown_action_is_refused(folder):
    with pytest.raises(ValueError, match="action must be make or void, not 'print'"):
        label("print")
    assert not list(folder.iterdir())


def test_data_dir_defaults_to_data_in_the_working_directory(folder, monkeypatch):
    monkeypatch.delenv("DATA_DIR")
    monkeypatch.chdir(folder)
    label("make")
    assert (folder / "data/labels" / f"{ORDER_ID}.svg").exists()


# On AWS


@pytest.fixture
def aws(monkeypatch):
    """Clients without a network: aws["dynamodb"] and aws["sesv2"] are stubs that are given what comes."""
    keys = {"region_name": "eu-west-1", "aws_access_key_id": "x", "aws_secret_access_key": "x"}
    clients = {service: boto3.client(service, **keys) for service in ("dynamodb", "sesv2")}
    stubs = {service: Stubber(client) for service, client in clients.items()}
    monkeypatch.setattr(tokens, "client", clients.get)
    monkeypatch.setenv("TOKENS_TABLE", "tokens")
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_NAME", "under-test")
    for stub in stubs.values():
        stub.activate()
    yield stubs
    for stub in stubs.values():
        stub.assert_no_pending_responses()


def looks(aws, key, found):
    request = {"TableName": "tokens", "Key": {"id": {"S": key}}, "ConsistentRead": True}
    aws["dynamodb"].add_response("get_item", {"Item": {"id": {"S": key}}} if found else {}, request)


def writes(aws, key, taken=False):
    item = {"id": {"S": key}, "text": ANY, "expires": {"N": ANY}}
    request = {"TableName": "tokens", "Item": item, "ConditionExpression": "attribute_not_exists(id)"}
    if taken:
        aws["dynamodb"].add_client_error("put_item", "ConditionalCheckFailedException", expected_params=request)
    else:
        aws["dynamodb"].add_response("put_item", {}, request)


def drops(aws, key):
    aws["dynamodb"].add_response("delete_item", {}, {"TableName": "tokens", "Key": {"id": {"S": key}}})


LABEL, MARK, SENT = f"labels/{ORDER_ID}.svg", f"labels/{ORDER_ID}.void", f"sent/{TOKEN}"


@pytest.mark.parametrize("taken", [False, True])
def test_on_aws_a_label_is_one_item_of_the_table(aws, folder, taken):
    looks(aws, MARK, found=False)
    writes(aws, LABEL, taken)
    looks(aws, MARK, found=False)
    assert label("make")["trackingNumber"] == make_label.tracking_number(ORDER_ID)
    assert not list(folder.iterdir())


def test_on_aws_a_void_marks_then_removes(aws):
    writes(aws, MARK)
    drops(aws, LABEL)
    assert label("void") == {"voided": True}


def test_on_aws_a_void_seen_after_writing_removes_the_label(aws):
    looks(aws, MARK, found=False)
    writes(aws, LABEL)
    looks(aws, MARK, found=True)
    drops(aws, LABEL)
    with pytest.raises(make_label.LabelVoided):
        label("make")


def test_a_table_out_of_reach_raises_an_error(aws):
    aws["dynamodb"].add_client_error("get_item", "ProvisionedThroughputExceededException")
    with pytest.raises(Exception, match="ProvisionedThroughputExceeded"):
        label("make")


def test_on_aws_a_mail_is_sent_by_ses_then_marked(aws, folder):
    looks(aws, SENT, found=False)
    aws["sesv2"].add_response("send_email", {"MessageId": "ses-1"}, {"Content": {"Raw": {"Data": ANY}}})
    writes(aws, SENT)
    assert send() == {"messageId": f"<{TOKEN}@orderproc>", "duplicate": False}
    assert not list(folder.iterdir())


def test_on_aws_a_marked_mail_is_not_sent_again(aws):
    looks(aws, SENT, found=True)
    assert send()["duplicate"] is True


def test_on_aws_a_mail_that_ses_refuses_is_not_marked(aws):
    looks(aws, SENT, found=False)
    aws["sesv2"].add_client_error("send_email", "MessageRejected")
    with pytest.raises(Exception, match="MessageRejected"):
        send()


def test_a_client_is_made_once_and_for_the_right_service(monkeypatch):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    tokens.client.cache_clear()
    assert tokens.client("sesv2") is tokens.client("sesv2")
    assert tokens.client("sesv2").meta.service_model.service_name == "sesv2"
    tokens.client.cache_clear()


def test_the_template_names_handlers_that_exist():
    template = Path(send_email.__file__).with_name("template.yaml").read_text()
    named = re.findall(r"Handler: lambdas\.(\w+)\.handler", template)
    assert sorted(named) == ["make_label", "send_email"]
