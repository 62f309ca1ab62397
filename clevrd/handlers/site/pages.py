"""GET /: explains the daemon and its endpoints to a person who opened its address."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Final, NamedTuple

from clevrd import __version__
from clevrd.admission import Admitted, Gate, Later, admit_anybody
from clevrd.client_addresses import UNIX, AskedFor
from clevrd.handlers.operate.figures import Figures
from clevrd.http_values import HOST, HTML, NOT_STORED, TEXT, Request, Response
from clevrd.local_requests import is_local
from clevrd.metrics.snapshot import TenantSnapshot
from clevrd.scheduling.fair_turns import FairTurns

# Topics that the page lists.
_TOPICS: Final = 20

DOCS: Final = "https://github.com/clevrd/clevrd/tree/main/docs"

_TEXT = """clevrd {version}: publish JSON over HTTP, receive it over WebSocket or streams.
{access}

Subscribe to a topic:
    clevrd subscribe orders --url {client_url}
    {websocket}      (or any WebSocket client)
    {curl} -N -H 'Accept: application/x-ndjson' '{url}/subscribe?topic=orders'
    new EventSource("{prefix}/subscribe?topic=orders")      (text/event-stream)
    {curl} '{url}/subscribe?topic=orders&poll=1'      (long-poll)

    and in a page's script, coming back by itself and told of every gap:
    import {{ Clevrd }} from "{url}/clevrd.js";
    for await (const event of new Clevrd().subscribe("orders")) console.log(event);

Publish to it:
    {curl} {url}/publish -d '{{"topic":"orders","data":{{"id":1}}}}'

    with "key":"EUR/USD" beside them, policy=latest keeps the newest of each key;
    with "idempotency_key":"..." a repetition is known, and not published again
    with "ttl_s":60 nobody gets it who comes more than 60 seconds later
    with "headers":{{"traceparent":"...","ce-type":"..."}}, who asks for them gets them
    the data alone, as of a CloudEvent in binary mode: POST to {url}/topics/orders/messages
    many at once: POST NDJSON or a JSON array of these to {url}/publish/batch
    a stream of them: WebSocket text frames to {ws_url}/publish
    many topics, both ways, over one WebSocket: {ws_url}/ws

Look at it:
    {url}/dashboard  a live page for operators
    {url}/topics     the topics that you may subscribe to; /topics/orders has position and
                     readers, /topics/orders/messages its messages (DELETE clears them)
    {url}/health     state, uptime, memory; /health/live, /health/ready for probes
    {url}/metrics    topics, subscribers, drops, throttling (JSON, or as Prometheus asks)
    {url}/config     the settings in force, for operators (JSON)
    {url}/admin/top  who is slow, loud or refused, for operators; /admin/explain says why

Options of /subscribe:
    topic=NAME      whose messages; several times for several topics
    pattern=P       all topics that match: orders.*, orders.**, now and later
    last=N          recent messages to begin with ({catch_up_messages} unless said)
    since=WHEN      the first message of 90s, 1h, 2d ago, of a time, behind an id; or all
    offset=N&epoch=E  resume behind this position, of a message or a gap that you had
    last_event_id=E:N  the same in one word, as an EventSource sends it by itself
    policy=P        drop_oldest (default), drop_newest, circuit_breaker or latest: what you lose
    buffer=N        when you lag by more than N messages (at most 100 to 1000, by memory)
    control=1       be told of gaps, over WebSocket and NDJSON
    headers=true    be given the traceparent and the ce-* of each message as well
    subscriber_id=ID  what /topics and events of who reads call you
    poll=1, timeout=S  one JSON answer, after S seconds at most (25)
    tenant=NAME     whose topic; the header X-Tenant-ID does the same, for /publish too
    ticket=TICKET   in place of a credential, for 30 s and one request; POST {url}/ticket

Each message: {{"id","topic","tenant_id","data","timestamp","offset"}}, and "key" where it was
published with one. A hole in offset is what you lost.
{keeps}
The contract, and how to operate it: {docs}
"""

_OPEN: Final = "It asks for no credential."
_CLOSED: Final = (
    "It asks for a credential: curl -H 'Authorization: Bearer SECRET', clevrd --key-file."
)

# URLs at the beginning of a line, and the documents' address, are links where a browser asks.
_LINK: Final = re.compile(rf"(?m)(?<=^    )https?://\S+|{re.escape(DOCS)}")
_STYLE: Final = (
    ":root{color-scheme:light dark}body{font:15px/1.5 system-ui;max-width:54rem;margin:3rem auto;"
    "padding:0 1rem}pre{white-space:pre-wrap;overflow-wrap:anywhere}"
)
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>clevrd</title>
<meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,">
<style>{style}</style>
<main><pre>{text}</pre></main></html>
"""


_ADMIN_TEXT = """clevrd {version}, for its operators: who reaches this address sees all tenants.
Ask with: {curl} {url}/health

    {url}/dashboard               a live page
    {url}/metrics                 topics, subscribers, drops, throttling (JSON, or as
                                  Prometheus asks); ?topics=N for the N busiest topics
    {url}/metrics/tenants         tenants: connections, subscribers, memory
    {url}/admin/top               who is slow, who is loud, what is large, who is refused
    {url}/admin/explain           why, of the last 15 minutes; ?tenant=NAME for one tenant
    {url}/admin/subscribers       subscriptions; DELETE with id=ID ends a connection
    {url}/config                  every setting, its source, and the rules of access
    {url}/health                  state; /health/live, /health/ready for probes

    /admin/messages?topic=NAME    the newest messages; DELETE clears the topic
    /admin/topics?topic=NAME      DELETE drops the topic
"""


class Facts(NamedTuple):
    """Things that the page says of this daemon besides."""

    catch_up_messages: int
    # A sentence about messages that outlive the process.
    keeps: str


class Way(NamedTuple):
    """The way on which one client reaches the daemon, as it would have to write it."""

    # Without a slash at its end.
    url: str
    # The path below which a proxy has the daemon; empty for its root. It is part of ``url``.
    prefix: str
    # The path of the Unix socket that the client has asked at by itself; empty for another way.
    socket_path: str

    @property
    def ws_url(self) -> str:
        """The same URL for WebSockets."""
        return self.url.replace("http", "ws", 1)

    @property
    def client_url(self) -> str:
        """The URL as clevrd's own clients take it."""
        return shlex.quote(f"unix:{self.socket_path}") if self.socket_path else self.url

    @property
    def curl(self) -> str:
        """The command curl, with its option for a Unix socket."""
        path = self.socket_path
        return f"curl --unix-socket {shlex.quote(path)}" if path else "curl"

    @property
    def websocket(self) -> str:
        """A command that subscribes over WebSocket."""
        url = f"'{self.ws_url}/subscribe?topic=orders'"
        if self.socket_path:
            return f"websocat --ws-c-uri {url} - {shlex.quote(f'ws-c:unix:{self.socket_path}')}"
        return f"websocat {url}"


class Whereabouts:
    """The ways on which clients reach one listener."""

    def __init__(
        self,
        asked_for: Callable[[Mapping[str, str], str], AskedFor | None],
        *,
        is_secure: bool = False,
    ) -> None:
        """Find them.

        Args:
            asked_for: what a listed proxy says, in these header fields, that its client asked for;
                None where the address is no listed proxy's.
            is_secure: the listener speaks TLS.
        """
        self._asked_for = asked_for
        self._scheme = "https" if is_secure else "http"

    def way(self, head: Request) -> Way:
        """Return how the sender of ``head`` reaches the daemon."""
        said = self._asked_for(head.headers, head.peer) or AskedFor(None, None)
        scheme = said.scheme or self._scheme
        host = said.host if said.host and HOST.fullmatch(said.host) else head.headers.get("host")
        # A client of HTTP/1.0 need not name a host.
        own_host = (
            "localhost"
            if head.local_address.startswith(UNIX)
            else head.local_address or "localhost"
        )
        url = f"{scheme}://{host or own_host}{said.prefix}"
        return Way(url, said.prefix, _socket_path(head))


def _socket_path(head: Request) -> str:
    """Return the path of the Unix socket that ``head`` came over; empty for a proxy's, and TCP."""
    if not head.local_address.startswith(UNIX) or not is_local(head):
        return ""
    return head.local_address.removeprefix(UNIX)


def kept_sentence(journal: str, topics: Sequence[str], state_dir: str) -> str:
    """Return what becomes of messages when the process ends, in a sentence.

    Args:
        journal: the engine of the journal; empty without one.
        topics: patterns of the topics that it keeps.
        state_dir: where topics go over a planned restart; empty for nowhere.
    """
    if journal:
        which = "All messages" if list(topics) == ["**"] else "Messages of " + ", ".join(topics)
        return f"{which} are kept in a journal ({journal}); the history reaches back as far as it."
    if state_dir:
        return "Messages are kept in memory, and over a planned restart."
    return "Messages are kept in memory alone, until the process ends."


class HomeEndpoint:
    """The home page, as HTML for browsers and as text for other clients.

    A client that may subscribe to topics of its tenant sees which there are.
    """

    serves_while_draining = True

    def __init__(
        self, gate: Gate, figures: Figures, turns: FairTurns, whereabouts: Whereabouts, facts: Facts
    ) -> None:
        self._gate = gate
        self._figures = figures
        self._turns = turns
        self._whereabouts = whereabouts
        self._facts = facts

    def admit(self, head: Request) -> Admitted:
        """Refuse no request but one with two credentials or a malformed query."""
        return self._gate.admit_visitor(head)

    def answer(self, admitted: Admitted, body: bytes) -> Response | Later:
        """Return the page with the address that the client used."""
        way = self._whereabouts.way(admitted.head)
        text = _TEXT.format(
            version=__version__,
            access=_CLOSED if self._gate.is_required else _OPEN,
            url=way.url,
            prefix=way.prefix,
            ws_url=way.ws_url,
            client_url=way.client_url,
            curl=way.curl,
            websocket=way.websocket,
            catch_up_messages=self._facts.catch_up_messages,
            keeps=self._facts.keeps,
            docs=DOCS,
        )
        if not admitted.tenant.subscribe:
            return _page(admitted.head, text)
        return self._turns.carry_out(self._with_topics(admitted, text))

    def _with_topics(self, admitted: Admitted, text: str) -> Generator[None, None, Response]:
        tenant = admitted.tenant
        snapshot = yield from self._figures.of_tenant(tenant.name, tenant.subscribe.allows, _TOPICS)
        yield
        return _page(admitted.head, text, _list_of(snapshot))


class AdminHomeEndpoint:
    """The list of endpoints at the admin listener."""

    serves_while_draining = True

    def __init__(self, whereabouts: Whereabouts) -> None:
        self._whereabouts = whereabouts

    def admit(self, head: Request) -> Admitted:
        """Refuse no request."""
        return admit_anybody(head)

    def answer(self, admitted: Admitted, body: bytes) -> Response:
        """Return the list of endpoints."""
        way = self._whereabouts.way(admitted.head)
        text = _ADMIN_TEXT.format(version=__version__, url=way.url, curl=way.curl)
        return _page(admitted.head, text)


def _page(head: Request, text: str, topics: str = "") -> Response:
    """Return the page; ``topics`` follows, with names that clients chose, and without links."""
    if "text/html" in head.headers.get("accept", ""):
        linked = _LINK.sub(r'<a href="\g<0>">\g<0></a>', html.escape(text, quote=False))
        page = _PAGE.format(style=_STYLE, text=linked + html.escape(topics))
        return Response(200, page.encode(), HTML, NOT_STORED)
    return Response(200, (text + topics).encode(), TEXT, NOT_STORED)


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
