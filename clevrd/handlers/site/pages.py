"""GET /: explains the daemon and its endpoints to a person who opened its address."""

from __future__ import annotations

import html
from collections.abc import Generator
from typing import Final

from clevrd import __version__
from clevrd.admission import Admitted, Gate, Later, admit_anybody
from clevrd.handlers.operate.figures import Figures
from clevrd.http_values import HTML, NOT_STORED, TEXT, Request, Response
from clevrd.metrics.snapshot import TenantSnapshot
from clevrd.scheduling.fair_turns import FairTurns

# Topics that the page lists.
_TOPICS: Final = 20

_TEXT = """clevrd {version}: publish JSON over HTTP, receive it over WebSocket or streams.

Subscribe to a topic:
    clevrd subscribe orders --url {url}
    websocat '{ws_url}/subscribe?topic=orders'      (or any WebSocket client)
    curl -N -H 'Accept: application/x-ndjson' '{url}/subscribe?topic=orders'
    new EventSource("/subscribe?topic=orders")      (text/event-stream)
    curl '{url}/subscribe?topic=orders&poll=1'      (long-poll)

    and in a page's script, coming back by itself and told of every gap:
    import {{ Clevrd }} from "{url}/clevrd.js";
    for await (const event of new Clevrd().subscribe("orders")) console.log(event);

Publish to it:
    curl {url}/publish -d '{{"topic":"orders","data":{{"id":1}}}}'

    with "key":"EUR/USD" beside them, policy=latest keeps the newest of each key
    many at once: POST NDJSON or a JSON array of these to {url}/publish/batch
    a stream of them: WebSocket text frames to {ws_url}/publish

Look at it:
    {url}/health     state, uptime, memory; /health/live, /health/ready for probes
    {url}/metrics    topics, subscribers, drops, throttling (JSON)
    {url}/config     the settings in force, for operators (JSON)

Options of /subscribe:
    topic=NAME      required
    last=N          recent messages to begin with (50 unless configured otherwise)
    policy=P        drop_oldest (default), drop_newest, circuit_breaker or latest: what you lose
    buffer=N        when you lag by more than N messages (at most 100 to 1000, by memory)
    tenant=NAME     whose topic; the header X-Tenant-ID does the same, for /publish too

Each message: {{"id","topic","tenant_id","data","timestamp","offset"}}, and "key" where it was
published with one. A hole in offset is what you lost. Nothing is kept on a disk.
"""

_PAGE = """<!doctype html><meta charset="utf-8"><title>clevrd</title>
<meta name="viewport" content="width=device-width">
<style>body{{font:15px/1.5 system-ui;max-width:50rem;margin:3rem auto;padding:0 1rem}}
pre{{white-space:pre-wrap}}</style>
<pre>{text}</pre>
"""


_ADMIN_TEXT = """clevrd {version}, for its operators: who reaches this address sees all tenants.

    /metrics                              topics, subscribers, drops, throttling (JSON, or as
                                          Prometheus asks); ?topics=N for the N busiest topics
    /metrics/tenants                      tenants: connections, subscribers, memory
    /admin/top                            who is slow, who is loud, what is large, who is refused
    /admin/explain                        why, of the last 15 minutes; ?tenant=NAME for one tenant
    /admin/subscribers                    subscriptions; DELETE with id=ID ends a connection
    /admin/messages?topic=NAME            the newest messages; DELETE clears the topic
    /admin/topics?topic=NAME              DELETE drops the topic
    /config                               every setting, its source, and the rules of access
    /health, /health/live, /health/ready  state, and for probes
"""


class HomeEndpoint:
    """The home page, as HTML for browsers and as text for other clients.

    A client that may subscribe to topics of its tenant sees which there are.
    """

    serves_while_draining = True

    def __init__(
        self, gate: Gate, figures: Figures, turns: FairTurns, *, is_secure: bool = False
    ) -> None:
        """Args: is_secure: the daemon speaks TLS; said in the URLs."""
        self._s = "s" if is_secure else ""
        self._gate = gate
        self._figures = figures
        self._turns = turns

    def admit(self, head: Request) -> Admitted:
        """Refuse no request but one with two credentials or a malformed query."""
        return self._gate.admit_visitor(head)

    def answer(self, admitted: Admitted, body: bytes) -> Response | Later:
        """Return the page with the address that the client used."""
        host = admitted.head.headers.get("host", "localhost:8080")
        s = self._s
        text = _TEXT.format(version=__version__, url=f"http{s}://{host}", ws_url=f"ws{s}://{host}")
        if not admitted.tenant.subscribe:
            return _page(admitted.head, text)
        return self._turns.carry_out(self._with_topics(admitted, text))

    def _with_topics(self, admitted: Admitted, text: str) -> Generator[None, None, Response]:
        tenant = admitted.tenant
        snapshot = yield from self._figures.of_tenant(tenant.name, tenant.subscribe.allows, _TOPICS)
        yield
        return _page(admitted.head, text + _list_of(snapshot))


class AdminHomeEndpoint:
    """The list of endpoints at the admin listener."""

    serves_while_draining = True

    def admit(self, head: Request) -> Admitted:
        """Refuse no request."""
        return admit_anybody(head)

    def answer(self, admitted: Admitted, body: bytes) -> Response:
        """Return the list of endpoints."""
        return _page(admitted.head, _ADMIN_TEXT.format(version=__version__))


def _page(head: Request, text: str) -> Response:
    if "text/html" in head.headers.get("accept", ""):
        return Response(200, _PAGE.format(text=html.escape(text)).encode(), HTML, NOT_STORED)
    return Response(200, text.encode(), TEXT, NOT_STORED)


def _list_of(snapshot: TenantSnapshot) -> str:
    """Return the busiest topics, a line for each; names hold no control characters."""
    if not snapshot.topics:
        return ""
    prefix = f"{snapshot.tenant_id}:"
    lines = [
        f"    {view.name.removeprefix(prefix)}    messages: {view.messages_published},"
        f" subscribers: {view.total_subscribers}"
        for view in snapshot.topics
    ]
    title = f"Topics of {snapshot.tenant_id} now, {len(lines)} of {snapshot.total_topics}:"
    return "\n".join(["", title, *lines, ""])
