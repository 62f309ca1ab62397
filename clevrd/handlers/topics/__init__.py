"""Endpoints below /topics: which topics there are, one topic, and its messages."""
