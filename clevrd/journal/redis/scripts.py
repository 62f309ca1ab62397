"""Scripts that run inside Redis: a record is taken only by the log that it was made for.

Keys of a partition begin with `{prefix:pN}`, a hash tag, so that in a cluster all of them are on
one node. The log is a stream with one entry for each record. Its first entry has the ID 0-1, so
that everybody can tell whether the log still has its beginning.

The stamp is ``master_replid``, which is new after each restart and each failover, and the log's own
id, which is in a hash beside the stream: so FLUSHALL, a stream that was deleted and a Redis without
its data are noticed too. Both are looked at inside of the append, since a connection may outlive a
failover. INFO is cheap for one section: 2 us.
"""

from __future__ import annotations

from hashlib import sha1
from typing import Final

_REPLID: Final = """
local replid = string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)')
"""

# KEYS: the stream, its hash. ARGV: the stamp, the record, entries at most. Returns the entry's ID.
_APPEND: Final = (
    _REPLID
    + """
local known = redis.call('HMGET', KEYS[2], 'log', 'began')
if not known[1] or replid .. known[1] ~= ARGV[1] then
  return redis.error_reply('FENCED another stamp')
end
if redis.call('EXISTS', KEYS[1]) == 0 then
  if known[2] then
    redis.call('HDEL', KEYS[2], 'log', 'began')
    return redis.error_reply('FENCED the stream is gone')
  end
  redis.call('HSET', KEYS[2], 'began', '1')
  return redis.call('XADD', KEYS[1], '0-1', 'd', ARGV[2])
end
return redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[3], '*', 'd', ARGV[2])
"""
)

# KEYS: the hash. ARGV: an id for the log if it has none, the number of partitions. Returns the
# replid, the log's id and its number of partitions.
_STAMP: Final = (
    _REPLID
    + """
redis.call('HSETNX', KEYS[1], 'log', ARGV[1])
redis.call('HSETNX', KEYS[1], 'partitions', ARGV[2])
return {replid, redis.call('HGET', KEYS[1], 'log'), redis.call('HGET', KEYS[1], 'partitions')}
"""
)

# KEYS: the list of checkpoints, the new one's list, and the lists of those that are forgotten.
# ARGV: the new one's entry, and the entries that are forgotten.
_KEEP_CHECKPOINT: Final = """
redis.call('PERSIST', KEYS[2])
redis.call('LPUSH', KEYS[1], ARGV[1])
for index = 2, #ARGV do
  redis.call('LREM', KEYS[1], 0, ARGV[index])
  redis.call('UNLINK', KEYS[index + 1])
end
return 1
"""


class Script:
    """A script, and the digest that it is called by once the server knows it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = sha1(text.encode(), usedforsecurity=False).hexdigest()


APPEND: Final = Script(_APPEND)
STAMP: Final = Script(_STAMP)
KEEP_CHECKPOINT: Final = Script(_KEEP_CHECKPOINT)
ALL: Final = (APPEND, STAMP, KEEP_CHECKPOINT)


class PartitionKeys:
    """The keys of one partition."""

    __slots__ = ("checkpoints", "log", "meta", "tag")

    def __init__(self, prefix: str, partition: int) -> None:
        # The part that the slot in a cluster is reckoned from stands in the braces.
        self.tag = f"{{{prefix}:p{partition}}}"
        self.log = f"{self.tag}:log"
        self.meta = f"{self.tag}:meta"
        self.checkpoints = f"{self.tag}:checkpoints"

    def checkpoint(self, name: str) -> str:
        """Return the key of a checkpoint's parts."""
        return f"{self.tag}:checkpoint:{name}"


def position_of(entry: bytes) -> int:
    """Return an entry's ID as a number, in the same order."""
    milliseconds, _, sequence = entry.partition(b"-")
    return int(milliseconds) << 64 | int(sequence)


def entry_of(position: int) -> str:
    """Return the ID of the entry at ``position``."""
    return f"{position >> 64}-{position & 0xFFFF_FFFF_FFFF_FFFF}"
