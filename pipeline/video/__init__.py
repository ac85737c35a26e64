"""Media files: probing, decoding in a sandbox, colour, encoding, muxing.

May import runtime and store.
"""
