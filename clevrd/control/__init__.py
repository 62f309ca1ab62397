"""Control decisions: each takes a sample and returns a decision. The hub's timers ask for them."""
