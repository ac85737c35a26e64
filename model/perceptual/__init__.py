"""Distances between pictures by networks: LPIPS, DISTS.

Imports nothing else of the model.
"""
