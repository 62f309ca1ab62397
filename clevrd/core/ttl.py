"""The time to live that a message may have, in seconds. The same for clients: docs/wire.md."""

from __future__ import annotations

from typing import Final

# A millisecond to three years.
MIN_TTL_S: Final = 0.001
MAX_TTL_S: Final = 100_000_000
TTL_ADVICE: Final = (
    f"The ttl_s must be a number of seconds from {MIN_TTL_S} to {MAX_TTL_S}; leave it out for a"
    " message that does not expire."
)
