"""Where a person or a program talks with a model."""
