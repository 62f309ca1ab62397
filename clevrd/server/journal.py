"""The journal in the life of a daemon: read to its end at the start, closed within a time."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from clevrd.errors import CannotStart, JournalFull, JournalUnavailable
from clevrd.hub import Hub

log = logging.getLogger(__name__)

# How long the journal may take to close at least, whatever the stop has taken before.
JOURNAL_STOP_S: Final = 8.0


async def read_journal(hub: Hub, loop: asyncio.AbstractEventLoop) -> None:
    """Read the journal to its end, where there is one.

    Raises:
        CannotStart: it can't be used.
    """
    journal = hub.journal
    if journal is None:
        return
    began_s = loop.time()
    try:
        await journal.node.start()
    except (JournalUnavailable, JournalFull) as error:
        raise CannotStart(str(error)) from error
    log.info(
        "journal read engine=%s topics=%d took_s=%.3f",
        journal.engine.name,
        journal.node.topics,
        loop.time() - began_s,
    )


async def close_journal(hub: Hub, end_s: float, loop: asyncio.AbstractEventLoop) -> bool:
    """Close the journal; return False if its disk or its server holds that up.

    It is left as a kill leaves it then.

    Args:
        end_s: when the stop is to be over, on the loop's clock.
    """
    if hub.journal is None:
        return True
    hub.seal()
    closing = loop.create_task(hub.journal.node.stop())
    timeout_s = max(JOURNAL_STOP_S, end_s - loop.time())
    if (await asyncio.wait({closing}, timeout=timeout_s))[0]:
        await closing
        return True
    log.error(
        "journal not closed waited_s=%g; the process ends without it, as if it were killed:"
        " see whether its disk or its server hangs",
        timeout_s,
    )
    return False
