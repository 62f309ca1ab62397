"""Endpoints for browsers: the home page and the JavaScript client."""
