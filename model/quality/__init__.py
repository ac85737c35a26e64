"""Networks that judge a picture or a clip: the scorers that the paper filters its data with, and DOVER.

Imports nothing else of the model.
"""
