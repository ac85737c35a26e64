"""Weights on disk: our own weights folders, released models, perceptual networks, hashes.

May import video, runtime and store, and model.
"""
