"""Generating token ids: cached passes, sampling, compressed weights."""
