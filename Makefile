# One place to run it all; `make` alone prints this list.

PYTHON ?= python3
BIN := .venv/bin
COMPOSE := env -u API_KEYS docker compose  # secrets come from .env, not from the default below
export DATA_DIR ?= ./data
export API_KEYS ?= demo:demo-key:admin
export HOST ?= 127.0.0.1
export AMQP_URL ?= embedded
RATE ?= 10
SECONDS ?= 30
PACE ?= 1
URL ?= http://127.0.0.1:8080
KEY ?= demo-key
export MONGODB_URL ?= $(shell test -x $(BIN)/secantusd-py && echo embedded || echo memory)

help:  ## print this list
	@sed -n 's/^lesson-%/lesson-N/; s/^\([a-zN-]*\):.*##/  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

run: .venv  ## start it: API, handlers and store in one process; two processes where both URLs name servers
	@$(MAKE) --no-print-directory start

start:
ifeq ($(filter embedded memory,$(MONGODB_URL) $(AMQP_URL)),)
	@$(BIN)/python consumer.py & consumer=$$!; trap 'kill $$consumer 2>/dev/null; wait $$consumer' EXIT; $(BIN)/python orderproc.py
else
	@test "$(MONGODB_URL)" != memory || echo "MONGODB_URL=memory: orders vanish on exit"
	@RETRY_DELAYS="$${RETRY_DELAYS-2,8,20}" exec $(BIN)/python orderproc.py  # short, as somebody watches
endif

demo: .venv  ## tell the story of some orders in two minutes, with a kill -9 in it; PACE=2 tells it slower
	@$(BIN)/python -m tools.demo --pace $(PACE)

load: .venv  ## place RATE orders a second for SECONDS at what `make run` runs, or at URL with KEY
	@$(BIN)/python -m tools.load --rate $(RATE) --seconds $(SECONDS) --url $(URL) --key $(KEY)

lesson-%: .venv  ## say whether lesson 1 to 7 of docs/lessons is done, or what is missing; HINT=1 says how
	@$(BIN)/python -m tools.lessons.check $* $(if $(HINT),--hint)

test: .venv/dev  ## run every test; those that need RabbitMQ run where AMQP_URL answers
	@unset DATA_DIR API_KEYS HOST MONGODB_URL; $(if $(filter embedded,$(AMQP_URL)),unset AMQP_URL;) $(BIN)/python -m pytest $(ARGS)

planted-bugs: .venv/dev  ## plant bugs in a copy, one by one, and see which test notices; BUGS="fence lease" for some
	@unset DATA_DIR API_KEYS HOST MONGODB_URL; $(if $(filter embedded,$(AMQP_URL)),unset AMQP_URL;) $(BIN)/python -m tests.planted_bugs $(BUGS)

lint: .venv/dev  ## check style and types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

up: .env  ## start it all in containers, on real servers (needs Docker with Compose)
	@$(COMPOSE) up --build --detach --wait

down: .env  ## stop the containers; data stays
	@$(COMPOSE) down

logs: .env  ## follow what the containers say
	@$(COMPOSE) logs --follow

.env:
	cp .env.example .env

stack-test:  ## start containers of its own, break them under load and see that every order ends
	@$(PYTHON) -m tools.chaos.stack

pictures: .venv/dev  ## make the README's pictures of the live page anew (needs Chromium)
	@$(BIN)/python -m tools.pictures

chaos-store: .venv/dev  ## a store that is overrun, refuses writes or lags, and what becomes of the orders (12 minutes)
	@$(if $(filter embedded,$(AMQP_URL)),unset AMQP_URL;) for each in overload refusing stale; do $(BIN)/python -m tools.chaos.store $$each || exit 1; done

check-deploy: .venv-deploy/ready  ## run every validator of the image, Compose, Kubernetes, Lambda, workflow and alert files
	@PATH=.venv-deploy/bin:$$PATH tools/check-deploy.sh

.venv-deploy/ready: requirements-deploy.txt
	$(PYTHON) -m venv .venv-deploy
	.venv-deploy/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

check: .venv  ## print which handler takes what
	@$(BIN)/python consumer.py check

.venv: .venv/ready  ## make the virtual environment

.venv/ready: requirements.txt requirements-embedded.txt requirements-memory.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --only-binary :all: -r requirements-embedded.txt || \
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-memory.txt
	@touch $@

.venv/dev: .venv/ready requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:  ## remove the virtual environment and caches; data stays
	rm -rf .venv .venv-deploy .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

reset:  ## remove all data of `make run`, after asking
	@printf 'Remove %s with all orders, mails and labels in it? [y/N] ' '$(DATA_DIR)'; read answer; test "$$answer" = y && rm -rf '$(DATA_DIR)'

.PHONY: help run start demo load up down logs stack-test pictures chaos-store test planted-bugs lint check check-deploy .venv clean reset
