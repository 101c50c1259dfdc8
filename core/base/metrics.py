"""Every metric there is, in Prometheus' format; `docs/operations.md` says what to watch."""

from prometheus_client import Counter, Gauge, Histogram

HTTP_SECONDS = Histogram("orderproc_http_request_seconds", "Time to answer a request", ["route", "method", "status"])
REQUEST_QUEUE = Histogram("orderproc_request_queue_seconds", "Time a request waited for a thread")
SHED = Counter("orderproc_shed_total", "Requests refused as they had waited too long for a thread")
ORDERS = Counter("orderproc_orders_total", "Orders that reached a status", ["status"])
EVENTS = Counter("orderproc_events_total", "Events sent to the broker", ["type", "outcome"])
OUTBOX_EVENTS = Gauge("orderproc_outbox_events", "Events waiting in outboxes, seen by the last sweep")
OUTBOX_OLDEST = Gauge("orderproc_outbox_oldest_seconds", "Age of the oldest event in an outbox, seen by the last sweep")
DELIVERIES = Counter("orderproc_deliveries_total", "Deliveries by their outcome", ["handler", "outcome"])
HANDLER_SECONDS = Histogram("orderproc_handler_seconds", "Time a handler took", ["handler"])
DEAD_MESSAGES = Gauge("orderproc_dead_messages", "Messages in a dead-letter queue", ["handler"])
BATCH_SIZE = Histogram("orderproc_batch_size", "Items in one bulk", ["what"], buckets=(1, 2, 4, 8, 16, 32, 64, 128))
STORE_COMMANDS = Counter("orderproc_store_commands_total", "Commands sent to the store", ["command"])
SWEEP_RESENT = Counter("orderproc_sweep_resent_total", "Events the sweep sent again", ["handler"])
