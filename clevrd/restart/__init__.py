"""Saves topics at a planned stop and restores them at the next start: format, file, topics."""
