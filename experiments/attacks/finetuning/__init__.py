"""Attacks that train."""
