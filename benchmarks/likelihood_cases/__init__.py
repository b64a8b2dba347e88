"""The update of diffpo beside a plain one, and what both need: a model, rollouts, and a way to measure memory."""
