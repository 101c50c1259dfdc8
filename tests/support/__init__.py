"""What the tests share, one of each kind.

samples: orders and events, a line each.
api: the API without a server, and clients that call it.
buses: a bus that only remembers, and what tests do with any bus.
consumer: one worker driven by hand, a whole consumer on a thread, and one as a process.
servers: the store servers and RabbitMQ nodes that tests start, stop, freeze and look into.
simulator: worker, sweep and stores under a scheduler that chooses, by a seed, what goes wrong next.
lambda_runtimes: the two runtimes that functions run on.
next_release: a release that does not exist yet, beside today's.
"""
