"""A program of another team, which listens: `AMQP_URL=amqp://... python examples/outside.py`. It needs only pika.

Its queue is its own, durable and named after it, so what happens while it is away waits for it. The same event may come
twice; here that would be a line printed twice. Work that must not happen twice is kept under the event's id.
"""

import json
import os

import pika

QUEUE = "accounting"


def take(channel, method, properties, body):
    event = json.loads(body)
    print(event["type"], event["subject"], event["data"]["order"]["total"], flush=True)
    channel.basic_ack(method.delivery_tag)  # after the work: what is not acked comes again


connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
channel = connection.channel()
channel.queue_declare(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
for type in ("order_confirmed", "order_cancelled"):
    channel.queue_bind(QUEUE, "orders", type)
channel.basic_qos(prefetch_count=16)
channel.basic_consume(QUEUE, take)
channel.start_consuming()
