"""PathRouter: finds the endpoint for a path, compared as sent and not decoded, and a method."""

from __future__ import annotations

from collections.abc import Mapping

from clevrd.admission import Admitted, Endpoint, admit_anybody
from clevrd.errors import MethodNotAllowed, NotFound
from clevrd.http_values import WHOLE_SERVER, Request, Response

Routes = Mapping[str, Mapping[str, Endpoint]]


class PathRouter:
    """Routes of the form path -> method -> endpoint.

    Every path with GET also has HEAD, and every path has OPTIONS (RFC 9110 §9.3.7).
    """

    def __init__(self, routes: Routes) -> None:
        self._routes = {path: _with_head(methods) for path, methods in routes.items()}
        self._options = {
            path: OptionsEndpoint(tuple(methods)) for path, methods in self._routes.items()
        }
        every = dict.fromkeys(method for methods in self._routes.values() for method in methods)
        self._options[WHOLE_SERVER] = OptionsEndpoint(tuple(every))

    def find(self, request: Request) -> Endpoint:
        """Return the endpoint that answers ``request``.

        Raises:
            NotFound: no endpoint has this path.
            MethodNotAllowed: the path exists, but not with this method.
        """
        if request.method == "OPTIONS" and request.path in self._options:
            return self._options[request.path]
        methods = self._routes.get(request.path)
        if methods is None:
            raise NotFound(self._no_such_path(request.path))
        endpoint = methods.get(request.method)
        if endpoint is None:
            raise MethodNotAllowed(request.method, request.path, tuple(methods))
        return endpoint

    def _no_such_path(self, path: str) -> str:
        """Return the sentence about a path that is none: those beside it, or where all stand."""
        folder = path[: path.find("/", 1) + 1]
        beside = [each for each in self._routes if folder and each.startswith(folder)]
        if not beside:
            return "No such path; see / for those there are."
        return f"No such path; under {folder} are {', '.join(beside)}; see / for all."


class OptionsEndpoint:
    """Answers OPTIONS with the methods of a path."""

    serves_while_draining = True

    def __init__(self, methods: tuple[str, ...]) -> None:
        self._answer = Response(204, b"", "", (("Allow", ", ".join((*methods, "OPTIONS"))),))

    def admit(self, head: Request) -> Admitted:
        """Refuse no request."""
        return admit_anybody(head)

    def answer(self, admitted: Admitted, body: bytes) -> Response:
        """Return the 204 with the Allow field."""
        return self._answer


def _with_head(methods: Mapping[str, Endpoint]) -> dict[str, Endpoint]:
    if "GET" not in methods:
        return dict(methods)
    return {"GET": methods["GET"], "HEAD": methods["GET"], **methods}
