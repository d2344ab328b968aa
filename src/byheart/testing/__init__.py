"""Floor: testing."""
