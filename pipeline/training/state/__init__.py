"""State that survives a kill: checkpoints, fp32 weights, moving averages; skipped steps; ranks' talk.

Imports no other part of training.
"""
