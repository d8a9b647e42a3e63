"""Flows in any norm by implicit steps."""
