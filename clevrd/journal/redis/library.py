"""redis-py as the engine uses it: single connections, and its errors in a sentence.

No pool: in one, commands that are sent at once take several connections and lose their order. No
``socket_timeout``: with one, redis-py loses cancellations on Python 3.11. Answers that take too
long are noticed elsewhere (`pipeline`).
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from typing import Any, Final

from clevrd.errors import ConfigError, JournalFull, JournalUnavailable
from clevrd.journal.library_versions import refuse_older
from clevrd.journal.redis.settings import RedisSettings
from clevrd.journal.tls import tls_context
from clevrd.journal.url_parts import Host

try:
    import hiredis  # noqa: F401  # without it redis-py parses in Python, at ten times the cost
    import redis.asyncio.connection as redis_connection
    import redis.exceptions
except ImportError as error:
    refuse_older("redis")
    raise ConfigError(
        "The journal is in Redis, and the Python packages redis and hiredis are not installed;"
        ' install them: pip install "clevrd[redis]".'
    ) from error

refuse_older("redis")

# How long a connection may take until commands can be sent over it.
CONNECT_S: Final = 4.0

_TLS_HINT: Final = (
    "rediss is for servers that speak TLS, and they may ask for a certificate (client_cert_file)"
)

# The rights that a user of the server has to have, as they stand in an ACL.
ACL_RULES: Final = (
    "~{clevrd:* +@read +@write +@scripting +@connection +info +wait +xinfo +time"
    " +memory|usage +cluster|slots +config|get"
)


class RedisFault(Exception):
    """The server refused a command, or the connection broke; ``code`` is Redis's word for it."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code} {text}".strip())
        self.code = code
        self.text = text


# Codes that say that the server we speak to is not the one that takes records, or not yet.
MOVED_CODES: Final = frozenset(
    {
        "READONLY",
        "LOADING",
        "MASTERDOWN",
        "MOVED",
        "ASK",
        "TRYAGAIN",
        "CLUSTERDOWN",
        "UNBLOCKED",
        "NOAUTH",
    }
)
# The connection is gone, or was never made.
LOST: Final = "LOST"
# The answer of our scripts when the log has another stamp.
FENCED: Final = "FENCED"


def fault_of(error: BaseException) -> RedisFault:
    """Return an error of redis-py's with Redis's own word for it."""
    if isinstance(error, RedisFault):
        return error
    text = str(error)
    code = getattr(error, "status_code", None)
    if isinstance(error, redis.exceptions.ResponseError) or code:
        if not code:
            code, _, text = text.partition(" ")
        return RedisFault(str(code), text)
    if isinstance(error, redis.exceptions.AuthenticationError):
        return RedisFault("WRONGPASS", text)
    if isinstance(error, redis.exceptions.InvalidResponse):
        return RedisFault("PROTOCOL", text)
    if "[SSL" in text:
        return RedisFault(LOST, f"TLS failed ({text}); {_TLS_HINT}")
    return RedisFault(LOST, text or type(error).__name__)


def sentence_of(fault: RedisFault, shown: str) -> str:
    """Return what happened and what to do about it; ``shown`` is the URL without its secret."""
    code, text = fault.code, fault.text
    if code in ("WRONGPASS", "NOAUTH") or (code == "ERR" and "AUTH" in text):
        return (
            f"Redis at {shown} refuses the user or the password ({text}); give them in the URL, or"
            " the password in a file (password_file)."
        )
    if is_denied(fault):
        return (
            f"Redis at {shown} does not allow its user what the journal needs ({text}); an ACL for"
            f" it is: {ACL_RULES}."
        )
    if code == "WRONGTYPE":
        return (
            f"In Redis at {shown} a key of another kind is in the place of one of the journal's;"
            " remove it, or give the journal another prefix."
        )
    if code == "OOM":
        return (
            f"Redis at {shown} has no memory left for messages (maxmemory); give it more, or keep"
            " less (retention_bytes, retention_s)."
        )
    if code == "MISCONF":
        return f"Redis at {shown} can't write to its disk and takes nothing ({text}); see to it."
    if code == "NOREPLICAS":
        return (
            f"Redis at {shown} takes nothing, since it has too few replicas"
            " (min-replicas-to-write); see to them."
        )
    if code == "LOADING":
        return f"Redis at {shown} is still loading its data; it answers when that is done."
    if code == "READONLY":
        return (
            f"Redis at {shown} is a read-only replica; name its primary, or its Sentinels"
            " (redis+sentinel://)."
        )
    if code in ("MOVED", "ASK", "CROSSSLOT"):
        return (
            f"Redis at {shown} is a node of a cluster; write the URL as"
            " redis+cluster://host:port,host:port."
        )
    if code == "CLUSTERDOWN":
        return f"The Redis Cluster at {shown} is down ({text}); see to its nodes."
    if code == "PROTOCOL":
        return f"What answers at {shown} is not Redis ({text}); look at host and port."
    if code == LOST:
        return f"Redis at {shown} can't be reached: {text.rstrip('.')}{_hint_of_lost(text, shown)}."
    if "DB index is out of range" in text:
        return f"Redis at {shown} has no such database; write the number of one that it has."
    if "cluster support disabled" in text:
        return f"Redis at {shown} is no cluster; write redis:// in place of redis+cluster://."
    if "unknown command 'SENTINEL'" in text:
        return (
            f"What answers at {shown} is no Sentinel; write the addresses of the Sentinels (port"
            " 26379), or redis:// for a server by itself."
        )
    return f"Redis at {shown} refuses what the journal asks: {str(fault).rstrip(' .')}."


def _hint_of_lost(text: str, shown: str) -> str:
    """Return what to look at where a connection broke or was not made, unless ``text`` says it."""
    if ";" in text:
        return ""
    is_tls = shown.startswith("rediss")
    is_cut = "closed" in text.lower() or "reset" in text.lower()
    if is_cut and not is_tls:
        return "; if it speaks TLS, write rediss"
    return f"; see whether it runs there{' and speaks TLS' if is_tls else ''}"


def is_denied(fault: RedisFault) -> bool:
    """Return whether the user may not do this, by itself or in a script."""
    return fault.code == "NOPERM" or "can't run this command" in fault.text


def unavailable(fault: RedisFault, shown: str) -> JournalUnavailable | JournalFull:
    """Return the error that the node and its publishers understand."""
    sentence = sentence_of(fault, shown)
    return JournalFull(sentence) if fault.code == "OOM" else JournalUnavailable(sentence)


class Connector:
    """Makes connections to the servers, and to the Sentinels."""

    def __init__(self, settings: RedisSettings) -> None:
        """Raises ConfigError: a file of certificates can't be used."""
        self._settings = settings
        self._context = (
            tls_context(settings.ca_file, settings.client_cert_file, settings.client_key_file)
            if settings.address.is_tls
            else None
        )

    async def connect(self, host: Host | None, *, is_sentinel: bool = False) -> Any:
        """Return an open connection that has said who it is; ``host`` None for the socket.

        Raises:
            RedisFault: there is none.
        """
        connection = self._make(host, is_sentinel)
        try:
            async with asyncio.timeout(CONNECT_S):
                await connection.connect()
        except TimeoutError as error:
            await close(connection)
            raise RedisFault(LOST, f"no answer within {CONNECT_S:.0f} s") from error
        except BaseException as error:
            await close(connection)
            if isinstance(error, Exception):
                raise _connect_fault(error) from error
            raise
        return connection

    def _make(self, host: Host | None, is_sentinel: bool) -> Any:
        settings = self._settings
        address = settings.address
        user, password, database = address.user, address.password, address.database
        if is_sentinel:
            user, password, database = settings.sentinel_user, settings.sentinel_password, 0
        options: dict[str, Any] = {
            "username": user or None,
            "password": password or None,
            "db": database,
            "socket_timeout": None,
            "socket_connect_timeout": CONNECT_S,
            "protocol": 2,
            "driver_info": None,
            "socket_read_size": 1 << 18,
        }
        if host is None:
            return redis_connection.UnixDomainSocketConnection(path=address.path, **options)
        options.update(host=host[0], port=host[1], socket_keepalive=True)
        if self._context is None:
            return redis_connection.Connection(**options)
        return _TlsConnection(self._context, **options)


class _TlsConnection(redis_connection.Connection):
    """A connection over TLS whose context is made once, with what the settings name."""

    def __init__(self, context: ssl.SSLContext, **options: Any) -> None:
        super().__init__(**options)
        self._context = context

    def _connection_arguments(self) -> Any:
        return {**super()._connection_arguments(), "ssl": self._context}


async def close(connection: Any) -> None:
    """Close a connection without waiting for its peer."""
    # An error that a broken connection has at its end is of no use any more.
    with suppress(Exception):
        await connection.disconnect(nowait=True)


def _connect_fault(error: Exception) -> RedisFault:
    """Return why no connection was made, with a cause that TLS or the resolver gave."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return RedisFault(
                LOST,
                f"its certificate is not trusted ({cause.verify_message}); name its CA (ca_file),"
                " and the host as the certificate does",
            )
        if isinstance(cause, ssl.SSLError):
            return RedisFault(
                LOST,
                f"TLS failed ({cause.reason or cause}); {_TLS_HINT}",
            )
        cause = cause.__cause__ or cause.__context__
    return fault_of(error)
