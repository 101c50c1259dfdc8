"""What goes through RabbitMQ while the program runs is what `asyncapi.json` says."""

import json

import pytest
from jsonschema import Draft202012Validator

from tests.support.servers import channel_to
from tools.chaos.system import ROOT, wait_for

SPEC = json.loads((ROOT / "asyncapi.json").read_text())
DELAYS = (0.2, 0.5)
BINDINGS = {channel["address"]: channel["bindings"]["amqp"] for channel in SPEC["channels"].values()}
QUEUES = {address: binding for address, binding in BINDINGS.items() if binding["is"] == "queue"}
BY_KEY = {address: binding["exchange"] for address, binding in BINDINGS.items() if binding["is"] == "routingKey"}
CANNOT_BE_SENT = {"name": "Ada", "line1": "1 Main St", "city": "Jam!", "postalCode": "N1", "country": "GB"}


@pytest.fixture
def running(system):
    return system(RETRY_DELAYS=",".join(map(str, DELAYS)))


@pytest.fixture
def tap(running, rabbit):
    """A channel, and a queue on it that gets all that is published."""
    with channel_to(rabbit) as channel:
        queue = channel.queue_declare("", exclusive=True).method.queue
        for key, exchange in BY_KEY.items():
            channel.queue_bind(queue, exchange["name"], key)
        yield channel, queue


def taken(channel, queue):
    """All that lies in a queue: (method, properties, body)."""
    return [*iter(lambda: channel.basic_get(queue, auto_ack=True), (None, None, None))]


def place(running, **fields):
    _, order = running.call("POST", "/orders", running.order() | fields)
    return order["id"]


def test_what_is_published_is_what_asyncapi_says(running, tap):
    running.call("PUT", "/stock/A1", {"available": 2})
    running.call("POST", f"/orders/{place(running, shippingAddress=CANNOT_BE_SENT)}/cancel")
    place(running)
    place(running, items=[{"sku": "none", "quantity": 1, "price": 1}])
    messages = []

    def every_type_came():
        messages.extend(taken(*tap))
        return {method.routing_key for method, _, _ in messages} == set(BY_KEY)

    wait_for(every_type_came, 20, "an event of every type")
    for method, properties, body in messages:
        event, channel = json.loads(body), SPEC["channels"][method.routing_key]
        [message] = [SPEC["components"]["messages"][name] for name in channel["messages"]]
        payload = SPEC["components"]["schemas"][message["payload"]["$ref"].rpartition("/")[2]]
        assert not list(Draft202012Validator(payload).iter_errors(event)), event
        assert method.exchange == channel["bindings"]["amqp"]["exchange"]["name"]
        assert properties.type == message["bindings"]["amqp"]["messageType"] == message["name"] == event["type"]
        assert properties.content_type == SPEC["defaultContentType"]
        operation = SPEC["operations"][f"{event['type']}_is_sent"]
        assert properties.delivery_mode == operation["bindings"]["amqp"]["deliveryMode"]
        assert properties.message_id == event["id"]


def test_exchange_and_queues_are_declared_as_asyncapi_says(running, tap):
    channel, _ = tap
    for exchange in BY_KEY.values():  # another type or argument than it has would close the channel
        channel.exchange_declare(
            exchange["name"], exchange["type"], durable=exchange["durable"], auto_delete=exchange["autoDelete"]
        )
    for address, binding in QUEUES.items():
        for seconds in DELAYS if "{seconds}" in address else (0,):
            queue, arguments = binding["queue"], dict(binding["x-arguments"])
            name = queue["name"].replace("{seconds}", str(seconds))
            if seconds:
                arguments["x-message-ttl"] = round(seconds * 1000)
            channel.queue_declare(name, passive=True)
            channel.queue_declare(
                name, durable=queue["durable"], exclusive=queue["exclusive"], auto_delete=queue["autoDelete"],
                arguments=arguments,
            )  # fmt: skip


def test_what_is_published_reaches_the_queues_that_asyncapi_says(running, tap):
    channel, _ = tap
    running.stop("consumer")
    for key, exchange in BY_KEY.items():
        channel.basic_publish(exchange["name"], key, b"")
    wait_for(lambda: channel.queue_declare("orders.email", passive=True).method.message_count == 3, 5, "all are there")
    for address in QUEUES:
        if "{seconds}" not in address:
            keys = {method.routing_key for method, _, _ in taken(channel, address)}
            assert keys == (set() if address.endswith(".dead") else set(SPEC["channels"][address]["messages"]))
