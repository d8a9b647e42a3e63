"""Flows of convex objectives in polyhedral norms, piece by piece."""
