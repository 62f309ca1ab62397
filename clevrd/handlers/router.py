"""PathRouter: finds the endpoint for a path, compared as sent and not decoded, and a method."""

from __future__ import annotations

from collections.abc import Mapping

from clevrd.admission import Admitted, Endpoint, admit_anybody
from clevrd.errors import MethodNotAllowed, NotFound
from clevrd.http_values import WHOLE_SERVER, Request, Response

Routes = Mapping[str, Mapping[str, Endpoint]]


class PathRouter:
    """Routes of the form path -> method -> endpoint.

    In a path like ``/topics/*/messages`` the asterisk, as the second segment, stands for any one.

    Every path with GET also has HEAD, and every path has OPTIONS (RFC 9110 §9.3.7).
    """

    def __init__(self, routes: Routes) -> None:
        self._routes = {path: _with_head(methods) for path, methods in routes.items()}
        self._options = {
            path: OptionsEndpoint(tuple(methods)) for path, methods in self._routes.items()
        }
        every = dict.fromkeys(method for methods in self._routes.values() for method in methods)
        self._options[WHOLE_SERVER] = OptionsEndpoint(tuple(every))
        # First segments of paths whose second segment may be anything.
        self._open = frozenset(
            path.split("/")[1] for path in routes if path.split("/")[2:3] == ["*"]
        )

    def find(self, request: Request) -> Endpoint:
        """Return the endpoint that answers ``request``.

        Raises:
            NotFound: no endpoint has this path.
            MethodNotAllowed: the path exists, but not with this method.
        """
        path = self._route_of(request.path)
        if request.method == "OPTIONS" and path in self._options:
            return self._options[path]
        methods = self._routes.get(path)
        if methods is None:
            raise NotFound(self._no_such_path(request.path))
        endpoint = methods.get(request.method)
        if endpoint is None:
            raise MethodNotAllowed(request.method, request.path, tuple(methods))
        return endpoint

    def _route_of(self, path: str) -> str:
        """Return ``path`` as it stands among the routes."""
        if path in self._routes:
            return path
        segments = path.split("/", 4)
        if len(segments) < 3 or segments[1] not in self._open:
            return path
        segments[2] = "*"
        return "/".join(segments)

    def _no_such_path(self, path: str) -> str:
        """Return the sentence about a path that is none: those beside it, or where all stand."""
        folder = path[: path.find("/", 1) + 1]
        beside = [each for each in self._routes if folder and each.startswith(folder)]
        if not beside:
            return "No such path; see / for those there are."
        shown = ", ".join(beside).replace("*", "TOPIC")
        return f"No such path; under {folder} are {shown}; see / for all."


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
