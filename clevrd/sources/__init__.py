"""Sources: records of existing streams, taken into topics in their order, each once."""
