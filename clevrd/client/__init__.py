"""A client for clevrd, for asyncio: publishes, and subscribes across lost connections.

Without asyncio: clevrd.client.sync. How to use both: docs/python.md.
"""

from clevrd.client.client import Client
from clevrd.client.errors import (
    BadAnswer,
    BadData,
    BadRecord,
    BadUrl,
    ClientError,
    Closed,
    Misuse,
    NoToken,
    Refused,
    Unauthorized,
    Unreachable,
)
from clevrd.client.history import History
from clevrd.client.position import Position
from clevrd.client.publisher import Publisher, Receipt
from clevrd.client.publishing import RETRY_FOR_S
from clevrd.client.subscription import Subscription
from clevrd.client.topics import ListedTopic, Presence, PresentId, TopicInfo
from clevrd.client.wire import Gap, Message, Outgoing, Published, Refusal

__all__ = [
    "RETRY_FOR_S",
    "BadAnswer",
    "BadData",
    "BadRecord",
    "BadUrl",
    "Client",
    "ClientError",
    "Closed",
    "Gap",
    "History",
    "ListedTopic",
    "Message",
    "Misuse",
    "NoToken",
    "Outgoing",
    "Position",
    "Presence",
    "PresentId",
    "Published",
    "Publisher",
    "Receipt",
    "Refusal",
    "Refused",
    "Subscription",
    "TopicInfo",
    "Unauthorized",
    "Unreachable",
]
