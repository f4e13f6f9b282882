"""Measuring a model: replies, judges, refusal margin, likelihoods, rates with intervals."""
