"""What survives a kill: checkpoints, fp32 fragments of ZeRO, moving averages; how a run is stopped and guarded.

Imports no other part of training."""
