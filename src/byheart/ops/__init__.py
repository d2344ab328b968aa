"""Floor: ops."""
