"""Flows of nets in quadratic norms that slide along their kinks."""
