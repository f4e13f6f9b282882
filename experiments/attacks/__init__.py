"""Attacks on a finished model: what it takes to make it do harm again."""
