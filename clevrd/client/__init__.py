"""A client for clevrd, for asyncio: publishes, and subscribes across lost connections.

How to use it: docs/python.md.
"""

from clevrd.client.client import Client
from clevrd.client.errors import (
    BadAnswer,
    BadRecord,
    BadUrl,
    ClientError,
    Closed,
    Refused,
    Unreachable,
)
from clevrd.client.position import Position
from clevrd.client.publisher import Publisher, Receipt
from clevrd.client.publishing import RETRY_FOR_S
from clevrd.client.subscription import Subscription
from clevrd.client.wire import Gap, Message, Outgoing, Published, Refusal

__all__ = [
    "RETRY_FOR_S",
    "BadAnswer",
    "BadRecord",
    "BadUrl",
    "Client",
    "ClientError",
    "Closed",
    "Gap",
    "Message",
    "Outgoing",
    "Position",
    "Published",
    "Publisher",
    "Receipt",
    "Refusal",
    "Refused",
    "Subscription",
    "Unreachable",
]
