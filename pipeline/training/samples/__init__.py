"""Which samples a step sees, in which order, packed on which rank, and how they are read.

Imports no other part of training."""
