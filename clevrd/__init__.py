"""clevrd: a real-time event streaming daemon. HTTP in, WebSocket out, one process."""

__version__ = "0.1.0"
