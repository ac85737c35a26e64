"""What every job shares: its config and command line, its summary, plans of shards, Prometheus gauges.

May import store.
"""
