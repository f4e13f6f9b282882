"""Attacks that edit weights."""
