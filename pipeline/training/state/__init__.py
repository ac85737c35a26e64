"""What survives a kill: checkpoints, fp32 fragments of ZeRO, moving averages; stopping and guarding a run.

Imports no other part of training."""
