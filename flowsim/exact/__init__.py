"""Exact answers to hold computed ones against."""
