"""Tests on a real RabbitMQ, or on a server that speaks MongoDB's protocol."""
