"""The velocity of a steepest flow at a tie or a kink."""
