"""Restoration of any video, chunk by chunk and resumable.

May import data and what lies below it; never training.
"""
