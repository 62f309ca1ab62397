"""Policies: which messages a lagging reader loses. A module for each; none has a state."""
