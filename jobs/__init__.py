"""One script per stage: `python -m jobs.<stage> --config configs/<scale>/<stage>.yaml`."""
