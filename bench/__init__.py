"""Measurements of clevrd against its targets and its alternatives, all in the same run.

`python -m bench` runs every scenario, `python -m bench NAME...` the named ones. Not shipped with
the daemon. README.md beside this file says what is measured, how, and how to read the results.
"""
