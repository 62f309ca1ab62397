"""Commands over one WebSocket, which publishes and subscribes."""
