"""Storage on file:// and s3://, the tables' schemas, ids and hashes, caches.

Imports nothing else of the pipeline.
"""
