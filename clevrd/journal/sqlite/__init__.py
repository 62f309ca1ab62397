"""The engine of one machine: the log in SQLite files, one for each stretch of time."""
