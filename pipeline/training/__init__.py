"""Training the transformer and the autoencoder: runs, their state, their samples, their objectives; its cost.

May import data and what lies below it; never restoration."""
