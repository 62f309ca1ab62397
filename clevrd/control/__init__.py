"""Control decisions: a sample in, a decision out. The hub owns the timers that ask them."""
