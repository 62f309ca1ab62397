"""What the loop does and when: timers, deadlines, and shares of its turns."""
