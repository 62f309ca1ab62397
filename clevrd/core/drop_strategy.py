"""DropStrategy: the names of the policies, as clients spell them. The policies: core/policies."""

from __future__ import annotations

import enum
from typing import Final


class DropStrategy(enum.Enum):
    """Policies by name: which messages a reader that lags beyond its window loses."""

    DROP_OLDEST = "drop_oldest"
    DROP_NEWEST = "drop_newest"
    CIRCUIT_BREAKER = "circuit_breaker"
    LATEST = "latest"


DROP_OLDEST: Final = DropStrategy.DROP_OLDEST
DROP_NEWEST: Final = DropStrategy.DROP_NEWEST
CIRCUIT_BREAKER: Final = DropStrategy.CIRCUIT_BREAKER
LATEST: Final = DropStrategy.LATEST
