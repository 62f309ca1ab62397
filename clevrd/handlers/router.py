"""Which endpoint answers which path and method. Paths are compared as sent, never decoded."""

from __future__ import annotations

from collections.abc import Mapping

from clevrd.errors import MethodNotAllowed, NotFound
from clevrd.exchange import Endpoint, Request

Routes = Mapping[str, Mapping[str, Endpoint]]


class PathRouter:
    """Routes of the form path -> method -> endpoint; HEAD is answered wherever GET is."""

    def __init__(self, routes: Routes) -> None:
        self._routes = {path: _with_head(methods) for path, methods in routes.items()}

    def find(self, request: Request) -> Endpoint:
        """Return what answers ``request``.

        Raises:
            NotFound: no such path.
            MethodNotAllowed: the path exists, the method does not.
        """
        methods = self._routes.get(request.path)
        if methods is None:
            raise NotFound("No such path; see / for those there are.")
        endpoint = methods.get(request.method)
        if endpoint is None:
            raise MethodNotAllowed(request.method, request.path, tuple(methods))
        return endpoint


def _with_head(methods: Mapping[str, Endpoint]) -> dict[str, Endpoint]:
    if "GET" not in methods:
        return dict(methods)
    return {"GET": methods["GET"], "HEAD": methods["GET"], **methods}
