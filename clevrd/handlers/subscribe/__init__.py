"""Endpoints that subscribe: a WebSocket, a stream, a poll; one topic or several."""
