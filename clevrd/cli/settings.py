"""The settings on a command line, for serve and checkconfig."""

from __future__ import annotations

import argparse
import os

from clevrd.config import SETTINGS, Loaded, load


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` a flag for each setting."""
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings (CLEVRD_CONFIG)")
    for setting in SETTINGS:
        parser.add_argument(
            setting.flag,
            dest=setting.field,
            default=argparse.SUPPRESS,  # a flag that was not given is absent, not None
            metavar="VALUE",
            help=f"{setting.help} {setting.allowed.capitalize()};"
            f" default {value_text(setting.default) or 'none'}; {setting.env}",
        )


def load_settings(options: argparse.Namespace) -> Loaded:
    """Return the effective settings from flags, environment, file and defaults.

    Raises:
        ConfigError: settings are wrong; the message has a line for each.
    """
    given = vars(options)
    overrides = {s.field: given[s.field] for s in SETTINGS if s.field in given}
    return load(overrides, os.environ, options.config)


def value_text(value: object) -> str:
    """Return a setting's value as the environment and the flags spell it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.15g}" if isinstance(value, float) else str(value)
