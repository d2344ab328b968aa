"""Floor: memory."""
