"""When the loop does what: timers, deadlines, shares of its turns, and queues of small steps."""
