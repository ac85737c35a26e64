"""From footage to training samples: ingest, filter and its selection, text embeddings, precompute.

May import metrics and what lies below it.
"""
