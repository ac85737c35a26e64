"""Weights on disk: folders of ours, released backbones, the perceptual networks' files, hashes.

May import video, runtime and store, and model."""
