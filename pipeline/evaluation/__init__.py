"""Restored video against the truth, other methods, the paper's tables, benchmark sets and studies.

May import everything else of the pipeline."""
