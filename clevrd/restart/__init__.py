"""What of the topics goes over a planned restart: its bytes, its file, and whose it is."""
