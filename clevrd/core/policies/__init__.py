"""What a reader that lags beyond its window loses: a module for each policy, none with a state."""
