"""What a checkpoint scores."""
