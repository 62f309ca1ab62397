"""Does the load generator see faults? A measurement of nothing but itself."""

from bench import runs, servers
from bench.results import Outcome, Target, exactly

READERS = 3


@runs.scenario("selfcheck")
def selfcheck(_settings: runs.Settings) -> Outcome:
    """A server that loses, repeats, reorders and misroutes: is each of its faults reported?"""
    return Outcome(targets=[told_by(proto) for proto in ("ws", "events", "lines")])


def told_by(proto: str) -> Target:
    """Return whether readers of ``proto`` notice each fault."""
    liar = runs.Variant("liar", servers.LIAR, {"proto": proto})
    found = runs.run(liar, subs=READERS, pub_kind="http", pubs=1, rate=100, seconds=1, drain=0.5)
    fast = found.report.fast
    checks = [
        # The misrouted one is missing, too: it did not come where it was due.
        exactly("missing", fast.missing, 2 * READERS),
        exactly("duplicates", fast.duplicates, READERS),
        exactly("reordered", fast.reordered, READERS),
        exactly("misrouted", fast.misrouted, READERS),
        exactly("malformed", fast.malformed, 0),
    ]
    return Target(f"the generator reports every fault, {proto}", checks)
