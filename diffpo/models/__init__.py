"""Masked diffusion language models: one transformer for every size, checkpoints, and the learned threshold."""
