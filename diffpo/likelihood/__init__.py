"""Likelihood: trajectories in, token log-probabilities out."""
