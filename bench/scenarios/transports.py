"""Does a delivery cost the same whatever the transport?"""

from bench import runs, servers
from bench.generator import Option
from bench.results import Check, Outcome, Target, at_most, ratio
from bench.runs import Run, Variant

READERS = 100
# A third of what keeps the server busy all the time: beyond that each write carries more, whatever
# it costs, and the CPU says nothing.
RATE = 500
LOAD: dict[str, Option] = {
    "subs": READERS,
    "rate": RATE,
    "pub_kind": "ws",
    "pubs": 1,
    "seconds": 3,
    "warmup": 0.5,
}
# Of a WebSocket's CPU: ids make events some 20 bytes longer, and each form is made once a round.
CPU_LIMIT = 1.1
# Of several topics an id is some 16 bytes longer for each, and its end is the reader's own.
CPU_LIMIT_OF_PLACES = 1.3
# The topic that is published to, and others that are silent.
SEVERAL = "/subscribe?topic=%t&last=0" + "".join(f"&topic=silent{n}" for n in range(4))
TRANSPORTS: dict[str, dict[str, Option]] = {
    "ws": {"proto": "ws"},
    "sse": {"proto": "events"},
    "ndjson": {"proto": "lines"},
    # Each event's id has five positions, and is its reader's own.
    "sse of five topics": {"proto": "events", "sub_path": SEVERAL},
    "ndjson of five topics": {"proto": "lines", "sub_path": SEVERAL},
}


@runs.scenario("transports")
def transports(_settings: runs.Settings) -> Outcome:
    """100 readers at 500/s over WebSocket, SSE and NDJSON: server CPU per delivery."""
    variants = [
        Variant(f"clevrd {name}", servers.CLEVRD, options) for name, options in TRANSPORTS.items()
    ]
    found = runs.in_turn(variants, 5, **LOAD)
    sockets, *streams = found.values()
    return Outcome(
        figures=[each for these in found.values() for each in runs.delivery_figures(these)],
        targets=[
            Target(
                f"{these[0].name}: {READERS} readers at {RATE:,}/s, CPU per delivery",
                [runs.unclean(these), of_websockets(these, sockets, limit_of(these))],
            )
            for these in streams
        ],
    )


def limit_of(these: list[Run]) -> float:
    """Return what a delivery may cost, as a multiple of a WebSocket's."""
    return CPU_LIMIT_OF_PLACES if these[0].name == "clevrd sse of five topics" else CPU_LIMIT


def of_websockets(these: list[Run], sockets: list[Run], limit: float) -> Check:
    """Return the check of CPU per delivery as a multiple of a WebSocket's."""
    mine, beside = (
        runs.middle(some, lambda report: report.cpu_us_per_delivery) for some in (these, sockets)
    )
    return at_most("x a WebSocket's CPU", ratio(mine, beside), limit)
