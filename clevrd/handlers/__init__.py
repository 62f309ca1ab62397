"""What each endpoint answers. Handlers take a request value and return an answer value."""
