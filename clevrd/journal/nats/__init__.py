"""The journal in NATS JetStream: one log that several nodes share."""
