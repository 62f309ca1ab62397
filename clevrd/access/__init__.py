"""Access: rules that change while the daemon runs, and what becomes of open connections then."""
