"""What survives a kill: checkpoints, fp32 fragments of ZeRO, moving averages; what ranks agree on.

Imports no other part of training."""
