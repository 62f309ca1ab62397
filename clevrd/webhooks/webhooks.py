"""All webhooks of a daemon: gives each event to those that want it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from clevrd.hub.lifecycle import Lifecycle, LifecycleEvent
from clevrd.webhooks.sender import WebhookEvent, WebhookSender
from clevrd.webhooks.settings import Webhook


class Webhooks:
    """The senders, until `stop`."""

    def __init__(
        self, webhooks: Sequence[Webhook], lifecycle: Lifecycle, loop: asyncio.AbstractEventLoop
    ) -> None:
        # Outcome -> events: those of several webhooks count once for each.
        self.counts = {"delivered": 0, "retried": 0, "dropped": 0}
        self.senders = [WebhookSender(each, self.counts, loop) for each in webhooks]
        if self.senders:
            lifecycle.listener = self.offer

    def offer(self, tenant: str, event: LifecycleEvent, message_id: str) -> None:
        """Have an event sent to the webhooks that want it."""
        posted = WebhookEvent(
            *(message_id, tenant, event.type, event.topic, event.time, event.node, event.id)
        )
        for sender in self.senders:
            sender.offer(posted)

    async def stop(self) -> None:
        """End; what waits is dropped, and counted."""
        await asyncio.gather(*(sender.stop() for sender in self.senders))
