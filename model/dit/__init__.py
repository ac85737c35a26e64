"""The two diffusion transformers and their parts: windows, rotary embedding, packing, attention.

Imports nothing else of the model.
"""
