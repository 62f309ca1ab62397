"""TLS: certificates and their files, and connections that are encrypted.

`settings`: the table ``[tls]``. `certificates`: what stands in a certificate, and the files.
`contexts`: which certificate a handshake gets, and the change to new ones. `server`: what all
connections share, and `connection`: one of them. Each imports only from those named before it.
`self_signed`, which needs the package cryptography, makes a certificate for a try.
"""

from clevrd.tls.connection import TlsConnection
from clevrd.tls.contexts import TlsContexts
from clevrd.tls.server import TlsServer
from clevrd.tls.settings import NO_TLS, TlsSettings, plain_tls_of, read_tls, tls_of

__all__ = [
    "NO_TLS",
    "TlsConnection",
    "TlsContexts",
    "TlsServer",
    "TlsSettings",
    "plain_tls_of",
    "read_tls",
    "tls_of",
]
