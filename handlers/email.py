"""Have the customer told how an order ended. The event's id is the mail's token: a repeat sends nothing twice."""


def order_confirmed(event, services):
    _send_mail(event, services)


def order_failed(event, services):
    _send_mail(event, services)


def order_cancelled(event, services):
    _send_mail(event, services)


def _send_mail(event, services):
    if "email" in event.order:
        mail = {"token": event.id, "to": event.order["email"], "template": event.type, "order": event.order}
        services.invoke("send_email", mail)
