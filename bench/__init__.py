"""Measurements of clevrd against its targets and its alternatives, all in the same run.

`python -m bench` runs every scenario, `python -m bench NAME...` some. Not shipped with the daemon;
what is measured, how, and how to read it: README.md beside this file.
"""
