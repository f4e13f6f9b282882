"""Attacks that send texts."""
