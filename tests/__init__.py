"""The tests, in folders by what they need.

fast: this process, or short ones, and no server.
servers: a real RabbitMQ, or a server that speaks MongoDB's protocol.
processes: the program, or a part of it, as processes of its own; a browser.
deploy: the files that are deployed, held against the program. deploy/stack is for `make stack-test`.
support: what they share. fakes.py is for authors of handlers: `from tests.fakes import event, services`.
"""
