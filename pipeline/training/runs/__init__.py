"""The two trainings and what a person sees of them.

May import the other parts of training."""
