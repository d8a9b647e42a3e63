"""Batched kernels of feed-forward nets. `reference` is the definition that every faster path is
tested against."""
