"""Training: rollouts, the update, evaluation, checkpoints and logs."""
