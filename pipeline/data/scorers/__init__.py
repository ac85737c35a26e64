"""Quality scores of a clip: the technical ones, those by networks, and which of these a run asks for.

May import metrics and what lies below it.
"""
