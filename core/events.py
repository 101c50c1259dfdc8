"""What a plug-in handler imports: `from core.events import Event`."""

from core.order.events import Event

__all__ = ["Event"]
