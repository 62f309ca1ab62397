"""What clevrd is measured beside. Each module is a server of its own, started as a process."""
