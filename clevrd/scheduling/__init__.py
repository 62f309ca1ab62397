"""When the loop does what: timers, deadlines, shares of turns, small steps, due answers."""
