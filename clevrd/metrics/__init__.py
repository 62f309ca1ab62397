"""Figures: what is counted, and views of it."""
