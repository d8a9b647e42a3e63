"""Steepest flows: a rule, the field that it integrates, and the methods that do it."""
