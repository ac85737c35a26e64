"""What ranks import, for a process from which they are forked. It starts no thread."""

import importlib
import os

os.environ["DS_ACCELERATOR"] = "cpu"
_RUNS = "pipeline.training.runs"
for _name in ("deepspeed", "torch._dynamo", f"{_RUNS}.train_dit", f"{_RUNS}.train_vae"):
    importlib.import_module(_name)
