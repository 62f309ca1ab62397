"""Figures as Prometheus reads them: families of metrics, by their subjects, and the spelling."""
