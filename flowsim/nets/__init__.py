"""Positively homogeneous nets with flat weights."""
