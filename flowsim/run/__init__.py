"""Runs: the one loop, events, switches, trajectories and what is recorded of them."""
