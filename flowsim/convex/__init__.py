"""Convex programmes: boxes, splitting, linear, conic, and interior points in the ball of a norm."""
