"""Endpoints: each takes a request value and returns an answer value."""
