"""What no linter asks of the workflow: that it tests all it claims, and that nothing leaves the repository unasked."""

import re

import pytest
import yaml

from core.base.settings import ROOT

TEXT = (ROOT / ".github/workflows/ci.yml").read_text()
JOBS = yaml.safe_load(TEXT)["jobs"]
LEAVING = {"push": "PUSH_IMAGE", "deploy-kubernetes": "DEPLOY_K8S", "deploy-lambda": "DEPLOY_LAMBDA"}


def uses(job: str) -> list[str]:
    return [step["uses"].split("@")[0] for step in JOBS[job]["steps"] if "uses" in step]


def test_each_python_and_each_pair_of_servers_is_tested_once():
    rows = JOBS["test"]["strategy"]["matrix"]["include"]
    assert sorted(row["python"] for row in rows) == ["3.11", "3.12", "3.13", "3.14"]
    pairs = [("3.13", "6"), ("3.13", "8"), ("4", "6"), ("4", "8")]
    assert sorted((row["rabbitmq"], row["mongo"]) for row in rows) == pairs


@pytest.mark.parametrize(("job", "variable"), LEAVING.items())
def test_what_leaves_the_repository_needs_a_tag_and_a_variable(job, variable):
    assert JOBS[job]["if"] == f"startsWith(github.ref, 'refs/tags/v') && vars.{variable} == 'true'"
    assert set(JOBS[job]["needs"]) in ({"push"}, {"lint", "test", "check-deploy"})


def test_other_jobs_may_not_write_take_roles_or_see_secrets():
    for name in JOBS.keys() - LEAVING:
        assert JOBS[name]["permissions"] == {"contents": "read"}, name
        assert "environment" not in JOBS[name] and "secrets." not in str(JOBS[name]), name


def test_an_image_is_scanned_before_it_is_pushed():
    build, scan = "docker/build-push-action", "aquasecurity/trivy-action"
    assert uses("image")[-2:] == [build, scan]
    assert uses("push")[-3:] == [build, scan, build]
    assert [step.get("with", {}).get("push") for step in JOBS["push"]["steps"] if build in step.get("uses", "")] == [
        None,
        True,
    ]


def test_the_same_action_has_one_commit_and_says_its_version():
    pins = re.findall(r"uses: (\S+)@([0-9a-f]{40}) # (v\d+\.\d+\.\d+)$", TEXT, re.MULTILINE)
    assert len(pins) == TEXT.count("uses: ")
    assert len(set(pins)) == len({action for action, _, _ in pins})
