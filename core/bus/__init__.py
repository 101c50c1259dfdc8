"""The seam to the broker and its carriers: RabbitMQ, and memory in one process. Only this folder imports pika."""
