"""The pure core: messages, rings, cursors, topics. No asyncio, no sockets, no clock here."""
