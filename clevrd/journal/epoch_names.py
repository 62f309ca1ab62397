"""Names of epochs: a partition's and a topic's, the same on every node. Pure.

A name depends on nothing before the record that begins the epoch, since nodes that begin to read
there know nothing else.
"""

from __future__ import annotations

from hashlib import blake2b

from clevrd.journal.records import Header


def partition_epoch_name(header: Header, position: int, reason: str) -> str:
    """Return the name of the partition epoch that the record at ``position`` begins.

    Args:
        reason: ``stamp`` or ``reset``; a record with another stamp may be a reset as well.
    """
    name = f"{header.stamp} {position} {header.writer} {header.sequence} {reason}"
    return blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def topic_epoch(partition_epoch: str, tenant: str, topic: str, cleared: int = 0) -> str:
    """Return the name of a topic's epoch: 12 hexadecimal digits, known before its first message.

    Args:
        cleared: the offset up to which the topic was cleared; 0 if it never was.
    """
    after = f"\0{cleared}" if cleared else ""
    name = f"{partition_epoch}\0{tenant}\0{topic}{after}".encode("utf-8", "surrogatepass")
    return blake2b(name, digest_size=6).hexdigest()
