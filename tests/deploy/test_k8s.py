"""k8s.yaml against itself and against the code: what would be noticed only once it runs in a cluster."""

import re
from urllib.parse import unquote, urlsplit

import boto3
import pytest
import yaml

import consumer
from core.base.ids import digest
from core.base.settings import DEMO, ROOT, VARIABLES, load
from core.bus.topology import main_queue
from core.http.serving import DRAIN_SECONDS
from core.running.discovery import discover

TEXT = (ROOT / "k8s.yaml").read_text()
OBJECTS = list(yaml.safe_load_all(TEXT))
EXAMPLES = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/scaling.md").read_text(), re.S)
SCALING = [each for text in EXAMPLES for each in yaml.safe_load_all(text) if "kind" in each]
OURS = ("api", "consumer", "email")
# boto3 reads these
AWS = {"AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_LAMBDA", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}


def named(kind: str) -> dict[str, dict]:
    return {each["metadata"]["name"]: each for each in OBJECTS if each["kind"] == kind}


WORKLOADS = named("Deployment") | named("StatefulSet")
CONFIG = {name: each["data"] for name, each in named("ConfigMap").items()}
SECRET = named("Secret")["orderproc"]["stringData"]


def pod(name: str) -> dict:
    return WORKLOADS[name]["spec"]["template"]["spec"]


def container(name: str) -> dict:
    (only,) = pod(name)["containers"]
    return only


def labels(name: str) -> dict[str, str]:
    return WORKLOADS[name]["spec"]["template"]["metadata"]["labels"]


def environment(name: str) -> dict[str, str]:
    """What the container finds; a reference to nothing is a KeyError, unless it is optional."""
    found: dict[str, str] = {}
    for source in container(name).get("envFrom", []):
        found |= CONFIG[source["configMapRef"]["name"]]
    for variable in container(name).get("env", []):
        where = variable.get("valueFrom", {}).get("secretKeyRef")
        if where is None:
            found[variable["name"]] = variable["value"]
        elif not where.get("optional") or where["key"] in SECRET:
            assert where["name"] == "orderproc"
            found[variable["name"]] = SECRET[where["key"]]
    return found


def secrets(name: str) -> set[str]:
    return {each["name"] for each in container(name).get("env", []) if "valueFrom" in each}


def selects(selector: dict, found: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {}).items() <= found.items()
    return wanted and all(found.get(rule["key"]) in rule["values"] for rule in selector.get("matchExpressions", []))


def open_to(name: str, direction: str, other: str, port: int) -> bool:
    """Whether a NetworkPolicy lets pods of `name` send to, or hear from, pods of `other` in this namespace."""
    side = {"ingress": "from", "egress": "to"}[direction]
    rules = [
        rule
        for each in named("NetworkPolicy").values()
        if selects(each["spec"]["podSelector"], labels(name))
        for rule in each["spec"].get(direction, [])
        if port in [each["port"] for each in rule["ports"]]
    ]
    peers = [peer for rule in rules for peer in rule[side]]
    here = [peer for peer in peers if "podSelector" in peer or peer.get("namespaceSelector") == {}]
    return any(selects(peer.get("podSelector", {}), labels(other)) for peer in here)


# --- the program finds what it needs


@pytest.mark.parametrize("name", OURS)
def test_the_settings_of_each_process_are_accepted_and_spelt_right(name):
    given = environment(name)
    settings = load(given, need=("MONGODB_URL", "AMQP_URL", *(["API_KEYS"] if name == "api" else [])))
    assert not settings.single_process
    assert set(given) <= set(VARIABLES) | AWS
    assert given.get("HANDLERS", "") == ",".join(settings.handlers)


def test_the_key_in_the_walk_through_may_set_stock():
    (secret,) = re.findall(r"Authorization: Bearer (\S+)'", TEXT)
    assert load(environment("api")).api_keys[digest(secret)].role == "admin"


def test_each_pod_gets_the_secrets_it_needs_and_no_other():
    servers, aws = {"MONGODB_URL", "AMQP_URL"}, {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    root = {"MONGO_INITDB_ROOT_USERNAME", "MONGO_INITDB_ROOT_PASSWORD", "MONGODB_USER", "MONGODB_PASSWORD"}
    assert {name: secrets(name) for name in WORKLOADS} == {
        "api": servers | {"API_KEYS"},
        "consumer": servers | aws,
        "email": servers | aws,
        "functions": {"SMTP_URL"},
        "mongodb": root,
        "rabbitmq": {"RABBITMQ_DEFAULT_USER", "RABBITMQ_DEFAULT_PASS"},
    }


def test_every_handler_is_run_by_exactly_one_deployment():
    run = [handler for name in ("consumer", "email") for handler in load(environment(name)).handlers]
    assert sorted(run) == sorted(discover(ROOT / "handlers"))


def test_the_urls_name_the_services_and_users_of_the_servers():
    mongodb, rabbitmq = urlsplit(SECRET["MONGODB_URL"]), urlsplit(SECRET["AMQP_URL"])
    for url, kind in ((mongodb, "mongodb"), (rabbitmq, "rabbitmq")):
        assert (unquote(url.username), unquote(url.password)) == (SECRET[f"{kind}-user"], SECRET[f"{kind}-password"])
        (port,) = named("Service")[kind]["spec"]["ports"]
        assert url.port == port["port"]
    assert rabbitmq.hostname == "rabbitmq.orderproc.svc"
    # The driver is told the member's name by the set: the two must be one, and the pod know it as its own.
    assert f'host: "{mongodb.hostname}:{mongodb.port}"' in CONFIG["mongodb"]["started.js"]
    assert pod("mongodb")["hostAliases"] == [{"ip": "127.0.0.1", "hostnames": [mongodb.hostname]}]
    assert mongodb.query == "replicaSet=rs0" and "--replSet rs0" in container("mongodb")["args"][0]
    given = environment("mongodb") | environment("rabbitmq")
    scripts = CONFIG["mongodb"]["make-user.js"] + CONFIG["mongodb"]["started.js"]
    assert set(re.findall(r"process\.env\.(\w+)", scripts)) <= set(given)
    assert given["RABBITMQ_DEFAULT_PASS"] == SECRET["rabbitmq-password"]
    assert given["MONGODB_PASSWORD"] == SECRET["mongodb-password"]


def test_every_secret_is_a_demo_value_that_processes_warn_of():
    known = {key for key in SECRET if not key.endswith("-user")}
    assert {key for key in known if DEMO not in SECRET[key]} == {"mongodb-keyfile"}
    assert re.fullmatch("[A-Za-z0-9+/=]{6,1024}", SECRET["mongodb-keyfile"]), "mongod takes base64 letters only"


def test_uncommenting_the_three_aws_lines_calls_aws(monkeypatch):
    config = TEXT[TEXT.index("metadata: {name: lambda") :].split("\n---\n")[0]
    switched, count = re.subn(r"# (?=[A-Z_]+: )", "", config)
    for name, value in yaml.safe_load(switched)["data"].items():
        monkeypatch.setenv(name, value)
    assert count == 3
    assert boto3.client("lambda").meta.endpoint_url == "https://lambda.eu-west-1.amazonaws.com"
    monkeypatch.delenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS")
    assert boto3.client("lambda").meta.endpoint_url == CONFIG["lambda"]["AWS_ENDPOINT_URL_LAMBDA"]


# --- the objects fit each other


def test_services_budgets_and_autoscalers_find_their_pods_and_ports():
    for name, service in named("Service").items():
        assert service["spec"]["selector"].items() <= labels(name).items()
        ports = {port["name"]: port["containerPort"] for port in container(name)["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= set(ports)
    for name, workload in WORKLOADS.items():
        assert selects(workload["spec"]["selector"], labels(name))
        for spread in pod(name).get("topologySpreadConstraints", []):
            assert selects(spread["labelSelector"], labels(name)) and spread["whenUnsatisfiable"] == "ScheduleAnyway"
    for name, scaler in named("HorizontalPodAutoscaler").items():
        assert scaler["spec"]["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
        assert "replicas" not in WORKLOADS[name]["spec"], "every apply would undo what the autoscaler did"
    for each in named("StatefulSet").values():
        assert named("Service")[each["spec"]["serviceName"]]["spec"]["clusterIP"] == "None"


def test_what_pods_mount_is_there():
    for name, workload in WORKLOADS.items():
        claimed = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
        volumes = {volume["name"]: volume for volume in pod(name)["volumes"]}
        assert {mount["name"] for mount in container(name)["volumeMounts"]} == claimed | set(volumes)
        for volume in volumes.values():
            source = SECRET if "secret" in volume else CONFIG.get(volume.get("configMap", {}).get("name", ""), {})
            for item in volume.get("secret", volume.get("configMap", {})).get("items", []):
                assert item["key"] in source
        for volume in [each for each in volumes.values() if "persistentVolumeClaim" in each]:
            assert volume["persistentVolumeClaim"]["claimName"] in named("PersistentVolumeClaim")
        for mount in [each for each in container(name)["volumeMounts"] if "subPath" in each]:
            assert mount["subPath"] in CONFIG[volumes[mount["name"]]["configMap"]["name"]]
    assert environment("functions")["DATA_DIR"] in {
        mount["mountPath"] for mount in container("functions")["volumeMounts"]
    }


NEEDED = {(name, "mongodb", 27017) for name in OURS} | {(name, "rabbitmq", 5672) for name in OURS}
NEEDED |= {("consumer", "functions", 9001), ("email", "functions", 9001), ("mongodb", "mongodb", 27017)}


def test_pods_reach_what_they_need_and_nothing_else():
    ports = {name: [port["containerPort"] for port in container(name)["ports"]] for name in WORKLOADS}
    pairs = {(one, other, port) for one in WORKLOADS for other in WORKLOADS for port in ports[other]}
    heard = {(one, other, port) for one, other, port in pairs if open_to(other, "ingress", one, port)}
    assert {(one, other, port) for one, other, port in pairs if open_to(one, "egress", other, port)} == NEEDED
    assert heard == NEEDED | {(name, "api", 8080) for name in WORKLOADS}, "any pod may call the API"
    assert urlsplit(CONFIG["lambda"]["AWS_ENDPOINT_URL_LAMBDA"]).port == 9001
    deny = named("NetworkPolicy")["default-deny"]["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_no_list_is_empty_because_every_diff_would_show_it():
    def empty(value) -> bool:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return value == [] or any(map(empty, inner))

    assert [each["metadata"]["name"] for each in OBJECTS if empty(each)] == []


def test_prometheus_reaches_what_asks_to_be_scraped():
    policies = [each["spec"] for each in named("NetworkPolicy").values()]
    for name, workload in WORKLOADS.items():
        scraped = workload["spec"]["template"]["metadata"].get("annotations", {}).get("prometheus.io/port")
        rules = [
            rule for each in policies if selects(each["podSelector"], labels(name)) for rule in each.get("ingress", [])
        ]
        opened = {port["port"] for rule in rules if rule["from"][0].get("namespaceSelector") for port in rule["ports"]}
        assert opened == ({int(scraped)} if scraped else set())
        assert opened <= {port["containerPort"] for port in container(name)["ports"]}


def test_the_smallest_whole_asks_for_one_cpu_at_most():
    scaled = {name: each["spec"]["minReplicas"] for name, each in named("HorizontalPodAutoscaler").items()}
    requests = {name: container(name)["resources"]["requests"]["cpu"].removesuffix("m") for name in WORKLOADS}
    assert sum(int(cpu) * scaled.get(name, 1) for name, cpu in requests.items()) <= 1000


# --- every workload behaves


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_pod_is_restricted_and_probed_and_can_be_drained(name):
    spec, only = pod(name), container(name)
    assert (
        spec["securityContext"].items() >= {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}.items()
    )
    rights = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert only["securityContext"] == rights
    assert spec["automountServiceAccountToken"] is spec["enableServiceLinks"] is False
    assert named("ServiceAccount")[spec["serviceAccountName"]]["automountServiceAccountToken"] is False
    assert set(only["resources"]["requests"]) == {"cpu", "memory"} and set(only["resources"]["limits"]) == {"memory"}
    ports = {port["name"] for port in only["ports"]}
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        request = only[kind].get("httpGet") or only[kind].get("tcpSocket") or {}
        assert request.get("port") in ports or only[kind]["exec"]["command"]
    assert only["livenessProbe"].get("httpGet", {"path": "/healthz"})["path"] == "/healthz", "never a dependency"
    budget = named("PodDisruptionBudget")[name]["spec"]
    assert selects(budget.pop("selector"), labels(name))
    assert budget == {"maxUnavailable": 1, "unhealthyPodEvictionPolicy": "AlwaysAllow"}


@pytest.mark.parametrize("name", OURS)
def test_probes_and_scrapes_go_to_the_port_of_their_own(name):
    ports = {port["name"]: str(port["containerPort"]) for port in container(name)["ports"]}
    assert environment(name).get("API_METRICS_PORT" if name == "api" else "METRICS_PORT", "9090") == ports["metrics"]
    probes = [container(name)[f"{kind}Probe"]["httpGet"]["port"] for kind in ("startup", "readiness", "liveness")]
    assert probes == ["metrics"] * 3
    annotations = WORKLOADS[name]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == ports["metrics"]


def test_the_documented_scrapes_are_of_ports_that_pods_announce():
    jobs = re.findall(r"regex: \(?([\w|]+)\)?;(\d+)", (ROOT / "docs/operations.md").read_text())
    scraped = {name: port for names, port in jobs for name in names.split("|")}
    annotations = {
        name: each["spec"]["template"]["metadata"].get("annotations", {}) for name, each in WORKLOADS.items()
    }
    announced = {name: each["prometheus.io/port"] for name, each in annotations.items() if each}
    assert scraped == announced


@pytest.mark.parametrize(("name", "drain"), [("api", DRAIN_SECONDS), *[(n, consumer.GRACE) for n in OURS[1:]]])
def test_a_pod_gets_time_to_drain_and_is_replaced_beforehand(name, drain):
    pause = container(name).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    assert pod(name)["terminationGracePeriodSeconds"] >= pause + drain + 5
    assert WORKLOADS[name]["spec"]["strategy"] == {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    assert container(name)["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert pause or name != "api"


def test_the_local_lambda_runtime_is_one_and_never_two():
    spec = named("Deployment")["functions"]["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    assert "functions" not in named("HorizontalPodAutoscaler")
    read = "".join(path.read_text() for path in (ROOT / "lambdas").glob("*.py"))
    assert all(f'"{name}"' in read for name in {*environment("functions"), *secrets("functions")})


# --- docs/scaling.md


def test_the_documented_scalers_watch_the_queues_of_what_they_scale():
    scalers = {
        each["spec"]["scaleTargetRef"]["name"]: each["spec"] for each in SCALING if each["kind"] == "ScaledObject"
    }
    (access,) = [each for each in SCALING if each["kind"] == "TriggerAuthentication"]
    assert set(scalers) == {"consumer", "email"}
    for name, spec in scalers.items():
        queues = [trigger["metadata"]["queueName"] for trigger in spec["triggers"]]
        assert queues == [main_queue(handler) for handler in load(environment(name)).handlers]
        assert {trigger["metadata"]["mode"] for trigger in spec["triggers"]} == {"QueueLength"}
        assert {t["authenticationRef"]["name"] for t in spec["triggers"]} == {access["metadata"]["name"]}
    (target,) = access["spec"]["secretTargetRef"]
    assert target["parameter"] == "host" and SECRET[target["key"]].startswith("amqp://")
    (policy,) = [each for each in SCALING if each["kind"] == "NetworkPolicy"]
    assert selects(policy["spec"]["podSelector"], labels("rabbitmq"))
