"""The options --publish, --subscribe and --clear of commands that make credentials."""

from __future__ import annotations

import argparse
from typing import Final

from clevrd.cli.failures import UsageError
from clevrd.errors import InvalidRequest
from clevrd.tenants.topic_permissions import TopicPermissions

# The permissions on topics, as the fields of a credential are called, and what may be done with
# such a topic.
PERMISSIONS: Final = {
    "publish": "published to",
    "subscribe": "subscribed to",
    "clear": "cleared of all its messages",
}


def add_permissions(parser: argparse.ArgumentParser) -> None:
    """Add the options for what a credential allows."""
    for field, verb in PERMISSIONS.items():
        parser.add_argument(
            f"--{field}",
            action="append",
            default=[],
            metavar="TOPIC",
            help=f"a topic, or a pattern such as 'orders.*' or '**', that may be {verb}; may be"
            " given several times",
        )


def check_permissions(options: argparse.Namespace) -> None:
    """Raise UsageError unless each entry is a topic or pattern, as in the configuration file."""
    for field in PERMISSIONS:
        for entry in getattr(options, field):
            try:
                TopicPermissions([entry])
            except InvalidRequest as error:
                raise UsageError(f"--{field} {entry[:80]!a} is not allowed: {error}") from None
