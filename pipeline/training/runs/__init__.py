"""The loop that all trainings share (loop.py), the two trainings that run on it, and their loggers.

May import the other parts of training.
"""
