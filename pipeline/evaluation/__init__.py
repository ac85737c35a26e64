"""Comparison of restored video with the truth, other methods and the paper's tables; sets and studies.

May import everything else of the pipeline.
"""
