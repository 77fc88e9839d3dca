"""Batches, gradients, optimizers, the loop, checkpoints."""
