"""Dockerfile, docker-compose.yml and .env.example against the program; `make stack-test` runs them for real."""

import re

import pytest
import yaml

from consumer import GRACE
from core.base.settings import DEMO, ROOT, VARIABLES, load
from core.http.serving import DRAIN_SECONDS

FOREIGN = {"HEALTH_URL", "SMTP_URL", "HANDLERS", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "PATH"}
EXAMPLE = dict(line.split("=", 1) for line in (ROOT / ".env.example").read_text().splitlines() if line[:1].isupper())
COMPOSE = re.sub(
    r"\$\{(\w+):(-|\?)([^}]*)\}",
    lambda found: EXAMPLE[found[1]] if found[2] == "?" else found[3],
    (ROOT / "docker-compose.yml").read_text(),
)
SERVICES = yaml.safe_load(COMPOSE)["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"] == "orderproc:dev"}


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


def test_every_variable_of_a_service_is_known_and_valid():
    for name, service in OURS.items():
        unknown = set(service["environment"]) - set(VARIABLES) - FOREIGN
        assert not {each for each in unknown if not each.startswith("AWS_")}, name
        load(service["environment"])


def test_every_handler_is_run_by_one_service():
    run = [name for service in OURS.values() for name in service["environment"].get("HANDLERS", "").split(",") if name]
    assert sorted(run) == sorted(path.stem for path in ROOT.glob("handlers/[a-z]*.py"))


def test_the_example_secrets_are_demo_secrets_and_fit_each_other():
    assert all(DEMO in value for value in EXAMPLE.values())
    rabbit = SERVICES["rabbitmq"]["environment"]
    account = f"{rabbit['RABBITMQ_DEFAULT_USER']}:{rabbit['RABBITMQ_DEFAULT_PASS']}"
    assert {service["environment"]["AMQP_URL"] for name, service in OURS.items() if name != "functions"} == {
        f"amqp://{account}@rabbitmq:5672/%2F"
    }


def test_nothing_is_published_beyond_this_machine():
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 3 and all(port.startswith("127.0.0.1:") for port in ports)


def test_docker_waits_longer_than_a_process_takes_to_end():
    for name, service in OURS.items():
        assert seconds(service["stop_grace_period"]) > max(GRACE, DRAIN_SECONDS) + 2, name


@pytest.mark.parametrize("name", ["api", "consumer", "email", "functions"])
def test_each_of_our_services_is_read_only_and_without_privileges(name):
    service = OURS[name]
    assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["tmpfs"] == ["/tmp"]
    assert service["security_opt"] == ["no-new-privileges:true"] and service["deploy"]["resources"]["limits"]["memory"]


def test_what_a_service_waits_for_says_when_it_is_healthy():
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            healthy = how["condition"] == "service_healthy"
            assert healthy == ("healthcheck" in SERVICES[other] or other in OURS), f"{name} -> {other}"


def test_the_image_is_given_all_that_runs_and_nothing_else():
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    left_out = {"tests", "tools", "docs", "examples", "data", "Makefile", "pyproject.toml", "Dockerfile", "k8s.yaml"}
    known = {path.name for path in ROOT.iterdir() if not path.name.startswith((".", "__"))}
    rest = {name for name in known - let_in - left_out if not re.fullmatch(r"(requirements-|docker-).*|.*\.md", name)}
    assert not rest, "neither in the image nor known not to be"
    assert let_in <= known


def test_the_image_user_is_numeric_and_commands_need_no_shell():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")] == ["USER 10001:10001"]
    assert not [line for line in lines if re.match(r"\s*(CMD|ENTRYPOINT) [^\[]", line)]
    assert not lines[0].startswith("# syntax=")


def test_the_ports_of_the_commands_are_those_that_are_checked():
    ports = {"api": "9090", "consumer": "9090", "email": "9090", "functions": "9001"}
    text = (ROOT / "Dockerfile").read_text()
    exposed = re.search(r"EXPOSE (.*)", text)[1].split()
    for name, port in ports.items():
        assert OURS[name]["environment"]["HEALTH_URL"] == f"http://127.0.0.1:{port}/healthz"
    assert set(ports.values()) | {VARIABLES["PORT"]["default"]} == set(exposed)
    assert re.search(r"HEALTH_URL=(\S+)", text)[1] == f"http://127.0.0.1:{VARIABLES['PORT']['default']}/healthz"
    assert OURS["api"]["environment"]["API_METRICS_PORT"] == VARIABLES["METRICS_PORT"]["default"] == "9090"
