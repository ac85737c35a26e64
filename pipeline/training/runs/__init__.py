"""The loop that all trainings share (loop.py), the two trainings that run on it, and where their numbers go.

May import the other parts of training."""
