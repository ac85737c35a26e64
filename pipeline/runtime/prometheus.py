"""Metrics that the stages export to Prometheus, with all their names in one place.

Ray serves them on each node's metrics port with the prefix `ray_`, so `openseedvr_rows` is
`ray_openseedvr_rows_total` in Prometheus. The tag `table` is the folder that a stage writes (clips, scores,
selection, text, latents); `model` is the model that ran (vae, text) or, in training, the one being trained
(vae, dit).
"""

import functools
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

ROWS = "openseedvr_rows"
ERRORS = "openseedvr_error_rows"
REJECTED = "openseedvr_rejected_clips"
BYTES = "openseedvr_written_bytes"
MODEL_SECONDS = "openseedvr_model_seconds"
TRAIN_SAMPLES = "openseedvr_train_samples"

_TAGS = {
    ROWS: ("rows written", ("table",)),
    ERRORS: ("rows written with their error set", ("table",)),
    REJECTED: ("clips that the filter rejected in its last pass, by reason", ("table", "reason")),
    BYTES: ("bytes of columns written, before compression", ("table",)),
    MODEL_SECONDS: ("seconds within a network", ("model",)),
}
_TRAINING = {
    "step": "steps done",
    "loss": "mean over the newest step's samples",
    "gradient_norm": "of all weights, before clipping",
    "learning_rate": "of the newest step",
    "seconds": "of the newest step",
    "tokens_per_second": "video tokens of all workers",
    "utilisation": "counted operations over the peak, 0 to 1",
    "wait_share": "share of the step that waited for data, 0 to 1",
    "imbalance": "(max - mean) / mean of the workers' counted operations",
}
"""Gauges of a training, named as in its log; `loss` is `openseedvr_train_loss`."""


@functools.cache
def _counter(name: str) -> Counter:
    description, tags = {**_TAGS, TRAIN_SAMPLES: ("samples trained on, of all workers", ("model",))}[name]
    return Counter(name, description=description, tag_keys=tags)


@functools.cache
def _gauge(key: str) -> Gauge:
    return Gauge(f"openseedvr_train_{key}", description=_TRAINING[key], tag_keys=("model",))


def count(name: str, amount: float, **tags: str) -> None:
    """Add to a counter; 0 is not reported."""
    if amount > 0:
        _counter(name).inc(amount, tags=tags)


def count_shard(table: str, rows: int, errors: int, size_bytes: int) -> None:
    """Count a finished shard of a table."""
    count(ROWS, rows, table=table)
    count(ERRORS, errors, table=table)
    count(BYTES, size_bytes, table=table)


def count_rejected(reasons: Mapping[str, int]) -> None:
    """reasons: clips by reason, as in a summary."""
    for reason, clips in reasons.items():
        count(REJECTED, clips, table="selection", reason=reason)


def show_training(model: str, step: int, samples: int, values: Mapping[str, float]) -> None:
    """Set the gauges of a training step from those of `values` that have one."""
    count(TRAIN_SAMPLES, samples, model=model)
    for key, value in {**values, "step": step + 1}.items():
        if key in _TRAINING:
            _gauge(key).set(value, tags={"model": model})
