"""Checks, measures and reports on implementations."""
