"""Attention over packed sequences: one function, a table of back ends, no mask and no padding.

`BACKENDS` lists what there is, and `attention_backend` takes the first that runs on a device: flash-attn's
varlen kernel where it is installed, torch's varlen attention on CUDA, scaled_dot_product_attention over
stretches of sequences of equal length elsewhere. The CUDA ones work in bf16 (fp16 tensors stay fp16).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from model.dit.packing import WindowLayout, equal_runs

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

PackedAttention = Callable[[Tensor, Tensor, Tensor, Sequence[int], Sequence[int]], Tensor]
"""`packed_attention`'s arguments and result."""

CPU_BATCH_TOKENS = 65536
"""Largest number of query or key rows in one batched call on the CPU, which bounds its scratch memory."""


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], kv_lengths: Sequence[int]
) -> Tensor:
    """Softmax attention of sequence i's queries over sequence i's keys, for all i.

    q: (sum of q_lengths, heads, head_dim); k, v: (sum of kv_lengths, heads, head_dim). Returns q's shape.
    Scale is head_dim^-0.5.
    """
    return attention_backend(q.device.type)(q, k, v, q_lengths, kv_lengths)


@lru_cache(maxsize=8)
def attention_backend(device_type: str) -> PackedAttention:
    """The first of `BACKENDS` that runs on a type of device, chosen once; ValueError where none does."""
    for backend in BACKENDS:
        if backend.runs_on(device_type):
            return backend.attend
    known = ", ".join(backend.name for backend in BACKENDS)
    raise ValueError(f"no attention back end runs on {device_type!r} here; known: {known}")


def cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], kv_lengths: Sequence[int]
) -> Tensor:
    """Stretches of sequences with equal lengths become one batched call on views of q, k and v: no copies."""
    outputs = []
    runs = [
        (min(count - done, step), n, m)
        for count, n, m in equal_runs(q_lengths, kv_lengths)
        for step in [max(1, CPU_BATCH_TOKENS // max(n, m, 1))]
        for done in range(0, count, step)
    ]
    parts = zip(
        q.split([count * n for count, n, _ in runs]),
        k.split([count * m for count, _, m in runs]),
        v.split([count * m for count, _, m in runs]),
        runs,
        strict=True,
    )
    for q_run, k_run, v_run, (count, n, m) in parts:
        if n == 0:
            continue
        batch = (
            q_run.unflatten(0, (count, n)).transpose(1, 2),
            k_run.unflatten(0, (count, m)).transpose(1, 2),
            v_run.unflatten(0, (count, m)).transpose(1, 2),
        )
        outputs.append(scaled_dot_product_attention(*batch).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs) if outputs else torch.empty_like(q)


def flash_varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], kv_lengths: Sequence[int]
) -> Tensor:
    """flash-attn's varlen kernel (bf16 or fp16)."""
    dtype = _kernel_dtype(q)
    out = flash_attn_varlen_func(
        q.to(dtype), k.to(dtype), v.to(dtype),
        _offsets(tuple(q_lengths), q.device), _offsets(tuple(kv_lengths), q.device),
        max(q_lengths), max(kv_lengths),
    )  # fmt: skip
    return out.to(q.dtype)


def torch_varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], kv_lengths: Sequence[int]
) -> Tensor:
    """torch.nn.attention.varlen (bf16 or fp16, CUDA)."""
    from torch.nn.attention.varlen import varlen_attn

    dtype = _kernel_dtype(q)
    out = varlen_attn(
        q.to(dtype), k.to(dtype), v.to(dtype),
        _offsets(tuple(q_lengths), q.device), _offsets(tuple(kv_lengths), q.device),
        max(q_lengths), max(kv_lengths),
    )  # fmt: skip
    assert isinstance(out, Tensor)  # (output, auxiliary) only where return_aux is asked for
    return out.to(q.dtype)


def _kernel_dtype(x: Tensor) -> torch.dtype:
    return torch.float16 if x.dtype == torch.float16 else torch.bfloat16


@dataclass(frozen=True)
class Backend:
    """One way to compute packed attention."""

    name: str
    runs_on: Callable[[str], bool]
    """Whether it is installed and works on a type of device ("cuda", "cpu", "meta", ...)."""
    attend: PackedAttention


BACKENDS = (
    Backend(
        "flash-attn",
        lambda device_type: device_type == "cuda" and flash_attn_varlen_func is not None,
        flash_varlen_attention,
    ),
    Backend("torch-varlen", lambda device_type: device_type == "cuda", torch_varlen_attention),
    Backend("sdpa", lambda device_type: device_type != "cuda", cpu_attention),
)
"""What there is, the best first: a further back end is one more entry."""


@lru_cache(maxsize=64)
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(sequences + 1,) int32 starts of the sequences, as the varlen kernels want them."""
    with torch.inference_mode(False):
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def window_attention(
    video: tuple[Tensor, Tensor, Tensor], text: tuple[Tensor | None, Tensor, Tensor], layout: WindowLayout
) -> tuple[Tensor, Tensor | None]:
    """Swin-MMDiT's attention (paper section 3.1): each window over [the window's keys, the text's keys].

    video: (q, k, v), each (patch tokens, heads, head_dim), in window order; text: (q, k, v), each
    (text tokens, heads, head_dim), q None where the text's result is not wanted (a last block).
    Each window's queries see its own tokens and all text of its sample. The text's queries attend with each
    window of their sample, and the results are averaged over the sample's windows, small ones counting as
    much as large ones. Returns (video result in window order, text result or None).
    """
    keys = _append_text(video[1], text[1], layout)
    values = _append_text(video[2], text[2], layout)
    texts = _text_per_window(layout)
    kv_lengths = [n + m for n, m in zip(layout.window_lengths, texts, strict=True)]
    video_out = packed_attention(video[0], keys, values, layout.window_lengths, kv_lengths)
    if text[0] is None:
        return video_out, None
    if not sum(texts):
        return video_out, torch.zeros_like(text[0])
    # Every window gets the same text queries: they are repeated, while keys and values are not copied again.
    repeated = [
        sample.repeat(count, 1, 1)
        for sample, count in zip(text[0].split(layout.text_lengths), layout.windows_per_sample, strict=True)
    ]
    text_out = packed_attention(torch.cat(repeated), keys, values, texts, kv_lengths)
    rows = [n * count for n, count in zip(layout.text_lengths, layout.windows_per_sample, strict=True)]
    means = [
        sample.unflatten(0, (count, n)).mean(0)
        for sample, count, n in zip(
            text_out.split(rows), layout.windows_per_sample, layout.text_lengths, strict=True
        )
    ]
    return video_out, torch.cat(means)


def _text_per_window(layout: WindowLayout) -> list[int]:
    return [
        n
        for n, count in zip(layout.text_lengths, layout.windows_per_sample, strict=True)
        for _ in range(count)
    ]


def _append_text(video: Tensor, text: Tensor, layout: WindowLayout) -> Tensor:
    """[window 0, its sample's text, window 1, its sample's text, ...], in one copy.

    split and cat, not index tables: their gradients are again one cat and one sum, where an index's would
    be a scattered sum over repeated rows.
    """
    windows = video.split(layout.window_lengths)
    texts = [
        sample
        for sample, count in zip(text.split(layout.text_lengths), layout.windows_per_sample, strict=True)
        for _ in range(count)
    ]
    return torch.cat([part for pair in zip(windows, texts, strict=True) for part in pair])
