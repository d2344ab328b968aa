"""Floor: training."""
