"""Training of the transformer and the autoencoder: runs, state, samples, objectives; its cost.

May import data and what lies below it; never restoration.
"""
