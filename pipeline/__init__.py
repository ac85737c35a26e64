"""The stages of the system: data, training, restoration and evaluation, and what they share.

Sub-packages, each importing only those after it: evaluation; training and restoration (never each other);
data; metrics; weights; video; runtime; store. Below all of them: model and degradations.
"""
