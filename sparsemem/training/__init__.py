"""Training: configs, runs, checkpoints, plans, over banks and over workers."""
