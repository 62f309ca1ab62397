"""Tracing: OpenTelemetry spans of publishes and deliveries, sent to a collector over OTLP/HTTP.

Nothing here is imported but `settings` unless tracing is switched on.
"""
