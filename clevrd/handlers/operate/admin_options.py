"""AdminOptions: the query of a request under /admin, by the letter.

Elsewhere an option that is not known is ignored. Here it is refused, since a misspelt ``tenant``
would have another tenant's topic cleared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from clevrd.core.names import check_topic
from clevrd.errors import InvalidRequest
from clevrd.tenants import DEFAULT_TENANT
from clevrd.tenants.tenant import check_tenant_name

Options = Mapping[str, list[str]]

# Options that say who asks, and not what is asked for.
_OF_CREDENTIALS: Final = frozenset({"token", "ticket"})


class AdminOptions:
    """The options of one endpoint.

    Args:
        names: those that are text.
        numbers: those that are whole numbers, with the least and the largest.
    """

    def __init__(
        self,
        names: tuple[str, ...] = (),
        numbers: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        self._numbers = numbers or {}
        self._names = (*names, *self._numbers)

    def check(self, options: Options) -> None:
        """Raise InvalidRequest for an option that is not known, is there twice, or is no number."""
        for name, values in options.items():
            if name in _OF_CREDENTIALS:
                continue
            if name not in self._names:
                known = ", ".join(self._names) or "none"
                raise InvalidRequest(
                    f"The option {name[:40]!a} is not known here; those that are: {known}."
                )
            if len(values) > 1:
                raise InvalidRequest(f"The option {name} is given twice; give it once.")
            if name in self._numbers:
                self._check_number(name, values[0])
        if "tenant" in self._names:
            check_tenant_name(self.tenant(options))

    def _check_number(self, name: str, value: str) -> None:
        least, most = self._numbers[name]
        is_number = value.isascii() and value.isdecimal() and len(value) <= 18
        if not is_number or not least <= int(value) <= most:
            raise InvalidRequest(
                f"The option {name} must be a whole number from {least} to {most}."
            )

    def number(self, options: Options, name: str, otherwise: int) -> int:
        """Return a number that was checked."""
        values = options.get(name)
        return otherwise if values is None else int(values[0])

    def tenant(self, options: Options) -> str:
        """Return the tenant that is meant, by default the one of requests that name none."""
        return options.get("tenant", [DEFAULT_TENANT])[0]

    def topic(self, options: Options) -> str:
        """Return the topic that is meant; raises InvalidRequest where it is missing, or no name."""
        values = options.get("topic")
        if values is None:
            raise InvalidRequest("The option topic is missing; name the topic.")
        check_topic(values[0])
        return values[0]
