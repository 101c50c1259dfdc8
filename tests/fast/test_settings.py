"""The environment: what is taken, and which line stops the start."""

import subprocess
import sys
from pathlib import Path

import pytest

from core.base.ids import digest
from core.base.settings import ROOT, VARIABLES, ApiKey, SettingInvalid, load, warn_of_demo_values
from core.bus.topology import retry_queue

REQUIRED = ("MONGODB_URL", "AMQP_URL", "API_KEYS")
GOOD = {"MONGODB_URL": "memory", "AMQP_URL": "embedded", "API_KEYS": "demo:demo-key:admin"}


def complaint(**env: str) -> str:
    with pytest.raises(SettingInvalid) as stopped:
        load(GOOD | env, REQUIRED)
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


def test_without_any_setting_the_defaults_are_those_of_the_design():
    settings = load({})
    assert (settings.host, settings.port, settings.metrics_port) == ("127.0.0.1", 8080, 9090)
    assert (settings.concurrency, settings.retry_delays) == (16, (2.0, 15.0, 90.0, 900.0))
    assert (settings.handlers, settings.handlers_dir.name, settings.data_dir) == ((), "handlers", Path("data"))
    assert (settings.log_level, settings.log_format) == ("info", "")


def test_settings_cannot_be_changed():
    with pytest.raises(AttributeError):
        load({}).port = 1


@pytest.mark.parametrize("value", ["", " "])
@pytest.mark.parametrize("variable", REQUIRED)
def test_a_missing_variable_is_named_with_what_it_must_be(variable, value):
    assert complaint(**{variable: value}).startswith(f"{variable}: is not set; it must be ")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MONGODB_URL", "localhost:27017"),
        ("MONGODB_URL", "amqp://localhost"),
        ("AMQP_URL", "http://localhost"),
        ("AMQP_URL", "memory"),
        ("AMQP_URL", "amqp:"),
        ("PORT", "eighty"),
        ("PORT", "-1"),
        ("PORT", "65536"),
        ("PORT", "8080.5"),
        ("PORT", "٨٠"),
        ("CONCURRENCY", "0"),
        ("WEB_THREADS", "0"),
        ("METRICS_PORT", "1e3"),
        ("RETRY_DELAYS", "2,soon"),
        ("RETRY_DELAYS", "0"),
        ("RETRY_DELAYS", "-1"),
        ("RETRY_DELAYS", "inf"),
        ("LOG_LEVEL", "loud"),
        ("LOG_FORMAT", "xml"),
    ],
)
def test_a_wrong_value_is_named_shown_and_set_right(variable, value):
    text = complaint(**{variable: value})
    shown = "" if variable in ("MONGODB_URL", "AMQP_URL") else f"not {value!r}; "
    assert text.startswith(f"{variable}: {shown}it must be")


@pytest.mark.parametrize("variable", ["MONGODB_URL", "AMQP_URL"])
def test_a_url_is_never_shown(variable):
    assert "s3cret" not in complaint(**{variable: "http://user:s3cret@host"})
    assert "s3cret" not in complaint(**{variable: "mongodb://[user:s3cret@host", "AMQP_URL": "amqp://[user:s3cret@h"})


@pytest.mark.parametrize("rest", ["user:s3cret@h\u2100/", "user:[s3cret]@h/", "user:p[s3cret]x@h/", "s3cret@[h/"])
@pytest.mark.parametrize(("variable", "scheme"), [("MONGODB_URL", "mongodb"), ("AMQP_URL", "amqp")])
def test_why_a_url_is_none_never_shows_its_password(variable, scheme, rest):
    text = complaint(**{variable: f"{scheme}://{rest}"})
    assert text.startswith(f"{variable}: it must be") and "s3cret" not in text


@pytest.mark.parametrize("rest", ["user:s3cret@h:port/", "user:s3cret@h:99999/", "user:s3cret#@h/", "user:s3c/ret@h/"])
def test_a_brokers_port_is_a_number(rest):
    text = complaint(AMQP_URL=f"amqp://{rest}")
    assert text.startswith("AMQP_URL: it must be") and "s3c" not in text


def test_a_url_may_name_several_hosts():
    assert load({"MONGODB_URL": "mongodb://u:p%40@a:27017,b:27018/x"}).mongodb_url.endswith("/x")


def test_a_port_for_the_apis_metrics_is_optional():
    assert load({}).api_metrics_port is None and load({"API_METRICS_PORT": "0"}).api_metrics_port == 0
    assert complaint(API_METRICS_PORT="-1").endswith("it must be a whole number from 0 to 65535 or empty")


def test_an_empty_value_is_the_default():
    assert load({"PORT": "", "LOG_LEVEL": " "}).port == 8080


def test_an_empty_retry_delays_list_means_no_retries():
    assert load({"RETRY_DELAYS": ""}).retry_delays == ()


def test_delays_that_are_the_same_number_have_the_same_queue():
    delays = load({"RETRY_DELAYS": "2.0, 02 ,0.50,100000"}).retry_delays
    assert delays == (2.0, 2.0, 0.5, 100_000.0)
    assert [retry_queue("email", delay).removeprefix("orders.email.retry.") for delay in delays] == [
        "2", "2", "0.5", "100000"
    ]  # fmt: skip


def test_words_are_taken_in_any_case():
    assert load({"LOG_LEVEL": "DEBUG", "LOG_FORMAT": "Json"}).log_level == "debug"


def test_handlers_are_a_list_of_names():
    assert load({"HANDLERS": "email, shipping,"}).handlers == ("email", "shipping")


@pytest.mark.parametrize(
    ("mongodb", "amqp", "single"),
    [
        ("memory", "embedded", True),
        ("embedded", "amqp://rabbit", True),
        ("mongodb://mongo/shop", "embedded", True),
        ("mongodb://mongo/shop", "amqps://rabbit", False),
    ],
)
def test_an_embedded_store_or_bus_makes_a_single_process(mongodb, amqp, single):
    assert load({"MONGODB_URL": mongodb, "AMQP_URL": amqp}).single_process is single


# --- keys


def test_a_key_has_name_and_secret_and_defaults_to_client():
    keys = load({"API_KEYS": "shop:s3cret, eyes:look:read ,"}).api_keys
    assert keys == {
        digest("s3cret"): ApiKey("shop", "client", "s3cret"), digest("look"): ApiKey("eyes", "read", "look")
    }  # fmt: skip


def test_a_name_may_have_several_secrets_with_one_role():
    assert len(load({"API_KEYS": "shop:old,shop:new"}).api_keys) == 2


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ("shop", "entry 1"),
        ("shop:", "entry 1"),
        ("shop:s3cret:king", "entry 1"),
        ("shop:s3cret:admin:more", "entry 1"),
        ("a:s3cret,sho p:other", "entry 2"),
        ("shop:sec ret", "entry 1"),
        ("shop:s3cret,shop:other:admin", "second role"),
        ("a:s3cret,b:s3cret", "repeats a secret"),
        (" , ", "there is no entry"),
    ],
)
def test_a_bad_key_is_named_by_place_and_never_shown(keys, why):
    text = complaint(API_KEYS=keys)
    assert why in text and "s3cret" not in text and "ret:" not in text


def test_secrets_do_not_show_in_the_settings():
    settings = load(GOOD)
    [key] = settings.api_keys.values()
    assert "demo-key" not in repr(settings) + str(settings) + repr(key)


def test_every_variable_in_the_table_is_a_settings_field():
    assert {name.lower() for name in VARIABLES} == set(vars(load({})))


# --- demo secrets


def test_a_warning_names_a_demo_secrets_variable_never_its_value(caplog):
    warn_of_demo_values(
        {"API_KEYS": "shop:change-me-1", "AMQP_URL": "amqp://u:change-me-2@h/", "MONGODB_URL": "mongodb://h"}
    )
    assert [(record.levelname, record.variable) for record in caplog.records] == [
        ("WARNING", "AMQP_URL"),
        ("WARNING", "API_KEYS"),
    ]
    assert "change-me" not in caplog.text


@pytest.mark.parametrize("program", ["orderproc.py", "consumer.py"])
def test_each_process_warns_at_start_of_demo_secrets_in_use(program, tmp_path):
    environment = {
        **GOOD,
        "API_KEYS": "shop:change-me",
        "DATA_DIR": str(tmp_path),
        "HANDLERS": "nobody",
    }  # which ends it
    run = subprocess.run(
        [sys.executable, program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 2 and "a demo secret is in use" in run.stderr and '"variable": "API_KEYS"' in run.stderr
