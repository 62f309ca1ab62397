"""Does a delivery cost the same whatever the transport?"""

from bench import runs, servers
from bench.generator import Option
from bench.results import Check, Outcome, Target, at_most, ratio
from bench.runs import Run, Variant

READERS = 100
RATE = 5_000
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
    """100 readers at 5,000/s over WebSocket, SSE and NDJSON: server CPU per delivery."""
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
                [runs.unclean(these), of_websockets(these, sockets)],
            )
            for these in streams
        ],
    )


def of_websockets(these: list[Run], sockets: list[Run]) -> Check:
    """Return the check of CPU per delivery as a multiple of a WebSocket's."""
    mine, beside = (
        runs.middle(some, lambda report: report.cpu_us_per_delivery) for some in (these, sockets)
    )
    return at_most("x a WebSocket's CPU", ratio(mine, beside), CPU_LIMIT)
