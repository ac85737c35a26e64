"""Back ends against a plain loop over windows."""

import pytest
import torch

from model.dit import attention
from model.dit.packing import LayerWindows, packing_plan
from model.dit.windows import fixed_windows

HEADS, HEAD_DIM = 3, 16
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: none here")
needs_flash = pytest.mark.skipif(
    attention.flash_attn_varlen_func is None or not torch.cuda.is_available(),
    reason="needs flash-attn and a CUDA GPU: not here",
)


def loop(q, k, v, q_lengths, kv_lengths):
    """Softmax attention sequence by sequence, head by head, written out."""
    out = []
    for qs, ks, vs in zip(q.split(q_lengths), k.split(kv_lengths), v.split(kv_lengths), strict=True):
        scores = torch.einsum("nhd,mhd->hnm", qs, ks) * q.shape[-1] ** -0.5
        out.append(torch.einsum("hnm,mhd->nhd", scores.softmax(-1), vs))
    return torch.cat(out)


def window_loop(video, text, layout):
    """Window attention by its definition (paper section 3.1)."""
    video_out, text_out = [], []
    windows = [list(x.split(layout.window_lengths)) for x in video]
    index = 0
    texts = [x.split(layout.text_lengths) for x in text]
    for sample, count in enumerate(layout.windows_per_sample):
        text_q, text_k, text_v = (x[sample] for x in texts)
        per_window = []
        for _ in range(count):
            q, k, v = (part[index] for part in windows)
            k, v = torch.cat([k, text_k]), torch.cat([v, text_v])
            video_out.append(loop(q, k, v, [len(q)], [len(k)]))
            per_window.append(loop(text_q, k, v, [len(text_q)], [len(k)]))
            index += 1
        text_out.append(sum(per_window) / count)
    return torch.cat(video_out), torch.cat(text_out)


@pytest.fixture(params=[False, True], ids=["regular", "shifted"])
def layout(request):
    layers = (LayerWindows(fixed_windows, (2, 3, 4), request.param),)
    shapes = [(5, 7, 9), (1, 3, 3), (4, 6, 8)]
    return packing_plan(layers, shapes, [6, 2, 0], torch.device("cpu")).layouts[0]


def random_qkv(layout):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    video = [torch.randn(sum(layout.window_lengths), HEADS, HEAD_DIM, requires_grad=True) for _ in range(3)]
    text = [torch.randn(sum(layout.text_lengths), HEADS, HEAD_DIM, requires_grad=True) for _ in range(3)]
    return video, text


def test_cpu_equals_a_loop_over_windows_with_gradients(layout):
    results = []
    for attend in (attention.window_attention, window_loop):
        video, text = random_qkv(layout)
        outs = attend(tuple(video), tuple(text), layout)
        weights = [torch.linspace(-1, 1, out.numel()).reshape(out.shape) for out in outs]
        sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True)).backward()
        results.append([*outs, *(x.grad for x in (*video, *text))])
    for ours, expected in zip(*results, strict=True):
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() <= 1e-5


def test_without_text_queries_the_video_is_the_same(layout):
    video, text = random_qkv(layout)
    full, _ = attention.window_attention(tuple(video), tuple(text), layout)
    only, none = attention.window_attention(tuple(video), (None, *text[1:]), layout)
    assert none is None and torch.equal(only, full)


def test_long_runs_are_cut_into_batches_that_fit(monkeypatch):
    q_lengths, kv_lengths = [4] * 9 + [2] * 3, [5] * 9 + [7] * 3
    q, k, v = (torch.randn(sum(n), HEADS, HEAD_DIM) for n in (q_lengths, kv_lengths, kv_lengths))
    whole = attention.packed_attention(q, k, v, q_lengths, kv_lengths)
    monkeypatch.setattr(attention, "CPU_BATCH_TOKENS", 12)
    cut = attention.packed_attention(q, k, v, q_lengths, kv_lengths)
    expected = loop(q, k, v, q_lengths, kv_lengths)
    assert (whole - expected).abs().max() <= 1e-5 and (cut - expected).abs().max() <= 1e-5


def test_backend_is_chosen_by_device_and_installation(monkeypatch):
    attention.attention_backend.cache_clear()
    assert attention.attention_backend("cpu") is attention.cpu_attention
    monkeypatch.setattr(attention, "flash_attn_varlen_func", None)
    assert attention.attention_backend("cuda") is attention.torch_varlen_attention
    attention.attention_backend.cache_clear()
    monkeypatch.setattr(attention, "flash_attn_varlen_func", object())
    assert attention.attention_backend("cuda") is attention.flash_varlen_attention
    attention.attention_backend.cache_clear()


def test_a_further_backend_is_one_entry(layout, monkeypatch):
    calls = []

    def toy(q, k, v, q_lengths, kv_lengths):
        calls.append(len(q))
        return loop(q, k, v, list(q_lengths), list(kv_lengths))

    video, text = random_qkv(layout)
    expected, _ = attention.window_attention(tuple(video), tuple(text), layout)
    entry = attention.Backend("toy", lambda device_type: device_type == "cpu", toy)
    monkeypatch.setattr(attention, "BACKENDS", (entry, *attention.BACKENDS))
    attention.attention_backend.cache_clear()
    ours, _ = attention.window_attention(tuple(video), tuple(text), layout)
    assert calls and (ours - expected).abs().max() <= 1e-5
    monkeypatch.setattr(attention, "BACKENDS", (entry,))
    attention.attention_backend.cache_clear()
    with pytest.raises(ValueError, match="no attention back end runs on 'cuda' here; known: toy"):
        attention.attention_backend("cuda")
    attention.attention_backend.cache_clear()


def assert_cuda_backend_equals_loop(backend):
    """bf16 on the GPU against the loop in fp32 on the same (rounded) inputs, to 2e-2; gradients too."""
    torch.manual_seed(0)
    q_lengths, kv_lengths = [64, 64, 33, 1, 200], [80, 80, 40, 9, 216]
    inputs = [torch.randn(sum(n), 4, 64, dtype=torch.bfloat16) for n in (q_lengths, kv_lengths, kv_lengths)]
    on_gpu = [x.cuda().requires_grad_() for x in inputs]
    in_fp32 = [x.float().requires_grad_() for x in inputs]
    ours, expected = backend(*on_gpu, q_lengths, kv_lengths), loop(*in_fp32, q_lengths, kv_lengths)
    ours.float().square().mean().backward()
    expected.square().mean().backward()
    assert ours.dtype == torch.bfloat16 and (ours.cpu().float() - expected).abs().max() <= 2e-2
    for a, b in zip(on_gpu, in_fp32, strict=True):
        assert (a.grad.cpu().float() - b.grad).abs().max() <= 2e-2 * b.grad.abs().max()


@needs_cuda
def test_torch_varlen_equals_loop():
    assert_cuda_backend_equals_loop(attention.torch_varlen_attention)


@needs_flash
def test_flash_attn_equals_loop():
    assert_cuda_backend_equals_loop(attention.flash_varlen_attention)


@needs_cuda
def test_fp32_on_cuda_comes_back_as_fp32():
    q = torch.randn(40, 2, 64, device="cuda")
    out = attention.packed_attention(q, q, q, [30, 10], [30, 10])
    assert out.dtype == torch.float32
    assert (out.cpu() - loop(*[q.cpu()] * 3, [30, 10], [30, 10])).abs().max() <= 2e-2
