"""Training with transformers' Trainer: settings, the Trainer, checkpoints, and the whole job in one call."""
