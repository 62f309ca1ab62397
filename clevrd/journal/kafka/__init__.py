"""The journal that several nodes share, in Kafka: a topic whose partitions are the logs."""
