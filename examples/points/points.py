"""Thank loyal customers."""


def order_confirmed(event, services):
    services.log.info("points awarded", extra={"points": int(event.order["total"])})
