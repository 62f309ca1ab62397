"""WebSocket connections below aiohttp: what all have in common, subscribers', publishers'."""
