"""Corpora, conversations and tokens: from where they come to the shards that training reads."""
