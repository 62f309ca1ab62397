"""The journal in Redis Streams: one log that several nodes share."""
