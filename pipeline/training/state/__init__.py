"""What survives a kill: checkpoints, fp32 weights and moving averages; skipped steps; what ranks agree on.

Imports no other part of training."""
