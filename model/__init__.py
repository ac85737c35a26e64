"""The networks and the diffusion process; knows nothing of Ray or Parquet.

Imports nothing else of the project; only checkpoints and parity open files."""
