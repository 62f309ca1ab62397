"""The service manager that has started this process: what it is told, and what it hands over."""
