"""Endpoints that publish: one message, a batch, a socket."""
