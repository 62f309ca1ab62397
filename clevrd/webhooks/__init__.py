"""Webhooks: lifecycle events posted to URLs of the operator's choice, signed, and never in the way.

Which events there are is the hub's business (hub/lifecycle).
"""
