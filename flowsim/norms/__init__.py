"""Norms on flat weights: their duals, their steepest directions, and the faces of ties."""
