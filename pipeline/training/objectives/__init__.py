"""Training objectives: the autoencoder's losses, the pixel loss of the one-step transformer.

May import training.samples and training.state.
"""
