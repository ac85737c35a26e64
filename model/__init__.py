"""The networks, the diffusion process, and weights in and out.

Imports nothing else of the project, and neither Ray nor Parquet; only `checkpoints` opens files of weights.
"""
