"""The causal video autoencoder, what it is trained with, and the memory that its streams need.

Imports nothing else of the model.
"""

from model.vae.autoencoder import FULL_CONFIG, AutoencoderConfig, CausalVideoAutoencoder, posterior_noise
from model.vae.causal_conv import StreamMemory

__all__ = ["FULL_CONFIG", "AutoencoderConfig", "CausalVideoAutoencoder", "StreamMemory", "posterior_noise"]
