"""Connections below HTTP: transports, what subscribers read over them, and the registry of all."""
