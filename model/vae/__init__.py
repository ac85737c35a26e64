"""The causal video autoencoder."""

from model.vae.autoencoder import FULL_CONFIG, AutoencoderConfig, CausalVideoAutoencoder, posterior_noise
from model.vae.causal_conv import StreamMemory

__all__ = ["FULL_CONFIG", "AutoencoderConfig", "CausalVideoAutoencoder", "StreamMemory", "posterior_noise"]
