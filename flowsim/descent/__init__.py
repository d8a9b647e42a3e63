"""Discrete rules: steepest descent with a learning rate, and the optimisers of practice."""
