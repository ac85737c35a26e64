"""Which samples a step sees, in which order, packed on which rank, and how they are read.

May import training.state.
"""
