"""Savings of window attention: one Swin-MMDiT layer at the paper's width against its alternatives.

    python -m benchmarks.attention                  (about 10 minutes on 2 cores; nothing else should run)
    python -m benchmarks.attention --only vs_full   (or vs_masked_swin, vs_flex, peak_share, table3)

fp32 on the CPU, latents of 21 frames at 720p (6 x 90 x 160, so 21,600 tokens), 154 text tokens. Prints tables
and writes out/bench/attention.json:

vs_full             2 x (a layer of full attention) / (a regular + a shifted layer), by time; also counted
vs_masked_swin      the same windows by padding, cyclic shift and mask / ours, mean of regular and shifted
vs_flex             the same windows by torch's compiled flex_attention with a block mask / ours, likewise
                    (compiling, a minute, is not counted)
peak_share_forward  FLOP/s of the two layers / those of the matrix products timed beside them
peak_share_train    the same, forward and backward
table3              seconds by window size, beside the paper's table 3; and of a layer that repeats the text
                    for every window all the way (projections and MLP too), which is where the paper's 19x
                    between the largest and the smallest window comes from and which ours does not do
"""

import argparse
import ctypes
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.memory import reset_peak, status_bytes
from model.dit.attention import window_attention
from model.dit.packing import LayerWindows, packing_plan
from model.dit.rotary import rotate, window_rotation
from model.dit.swin_mmdit import (
    SD3_MEDIUM,
    Block,
    Stream,
    feed_forward,
    gated_residual,
    modulated_norm,
)
from model.dit.windows import Grid, WindowSize, fixed_windows
from model.flops import linear_per_token
from model.flops import window_attention as window_attention_flops

OUT = Path("out/bench/attention.json")
LIBC, M_MMAP_THRESHOLD = ctypes.CDLL(None), -3
GRID: Grid = (6, 45, 80)
"""Patch tokens of 21 frames at 720p."""
OTHER_GRIDS: dict[str, Grid] = {"1080p, 21 frames": (6, 68, 120), "720p, 81 frames": (21, 45, 80)}
"""1080p is padded to 1088 rows."""
WINDOW: WindowSize = (5, 32, 32)
WIDTH, HEAD_DIM, TEXT = SD3_MEDIUM.width, SD3_MEDIUM.head_dim, 154
PAPER_TABLE3 = {
    1: {8: 455.49, 16: 138.29, 32: 58.37, 64: 23.68},
    5: {8: 345.78, 16: 110.01, 32: 46.49, 64: 20.29},
}
"""Seconds per iteration by temporal window and spatial window (latent pixels), on the authors' machines."""


# --- FLOPs ---


def layer_flops(lengths: list[int], text: int, text_copies: int = 1) -> float:
    """Multiplications and additions of one layer's matrix products, forward.

    lengths: tokens per window; text_copies: how often the text goes through projections and MLP.
    """
    video, per_text_token = linear_per_token(SD3_MEDIUM, layer=0)
    linear = video * sum(lengths) + per_text_token * text * text_copies
    return linear + sum(window_attention_flops(WIDTH, tuple(Counter(lengths).items()), text))


def window_lengths(grid: Grid, window: WindowSize, shifted: bool) -> list[int]:
    """Tokens of each window."""
    windows = fixed_windows(grid, window, shifted)
    return [(t.stop - t.start) * (h.stop - h.start) * (w.stop - w.start) for t, h, w in windows]


def full_over_windowed(grid: Grid, text: int) -> float:
    """`vs_full` by FLOPs."""
    whole = [grid[0] * grid[1] * grid[2]]
    pair = sum(layer_flops(window_lengths(grid, WINDOW, shifted), text) for shifted in (False, True))
    return 2 * layer_flops(whole, text) / pair


# --- layers ---


class Layer:
    """One block with random weights, random inputs and one kind of window."""

    def __init__(self, grid: Grid, window: WindowSize, shifted: bool, text: int = TEXT) -> None:
        torch.manual_seed(0)
        self.grid, self.window, self.shifted, self.text_tokens = grid, window, shifted, text
        self.block = Block(SD3_MEDIUM, context_pre_only=False)
        for parameter in self.block.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        layer = LayerWindows(fixed_windows, window, shifted)
        self.layout = packing_plan((layer,), [grid], [text], torch.device("cpu")).layouts[0]
        self.rotation = window_rotation(self.layout, HEAD_DIM)
        self.x = torch.randn(grid[0] * grid[1] * grid[2], WIDTH)
        self.x_in_windows = self.x[self.layout.to_windows]
        self.c, self.conditioning = torch.randn(text, WIDTH), torch.randn(1, WIDTH)
        self.flops = layer_flops(list(self.layout.window_lengths), text)

    def ours(self) -> tuple[Tensor, Tensor]:
        """Forward, in window order."""
        return self._forward(self.x_in_windows, self.c)

    def train(self) -> None:
        """Forward and backward."""
        x, c = self._forward(self.x_in_windows.requires_grad_(), self.c.requires_grad_())
        (x.sum() + c.sum()).backward()

    def _forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.block(x, c, self.conditioning, self.layout, self.rotation)

    def _with_attention(
        self, attend: Callable[..., tuple[Tensor, Tensor]], x: Tensor, c: Tensor, rotation: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The block with another attention: attend(video q, k, v, text q, k, v) -> both results."""
        block, text_stream, tokens, text_tokens = self.block, self.block.text, [len(x)], [len(c)]
        assert isinstance(text_stream, Stream)
        shift, scale, gate, *mlp = block.video.modulation(self.conditioning).chunk(6, dim=-1)
        text_shift, text_scale, text_gate, *text_mlp = text_stream.modulation(self.conditioning).chunk(
            6, dim=-1
        )
        q, k, v = block._heads(block.video.qkv(modulated_norm(x, shift, scale, tokens)))
        text = block._heads(text_stream.qkv(modulated_norm(c, text_shift, text_scale, text_tokens)))
        attended, text_attended = attend(rotate(q, rotation), rotate(k, rotation), v, *text)
        c = gated_residual(c, text_gate, text_stream.out(text_attended.flatten(1)), text_tokens)
        x = gated_residual(x, gate, block.video.out(attended.flatten(1)), tokens)
        x = feed_forward(block.video.mlp, x, mlp, tokens)
        return x, feed_forward(text_stream.mlp, c, text_mlp, text_tokens)

    def masked_swin(self, masks: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Swin's way to the same windows: pad to whole windows, shift cyclically, mask. Packed order.

        Projections and MLP are on real tokens only. The video's result is ours; the text's queries here
        attend once per padded window (ours: once per true window).
        """
        return self._with_attention(
            lambda *qkv: masked_window_attention(self, masks, *qkv),
            self.x,
            self.c,
            self.rotation[self.layout.to_packed],
        )

    def flex(self, mask: BlockMask) -> tuple[Tensor, Tensor]:
        """Our windows through flex_attention, one call for video and text. Window order."""
        return self._with_attention(
            lambda *qkv: flex_window_attention(self, mask, *qkv), self.x_in_windows, self.c, self.rotation
        )

    def literal(self) -> tuple[Tensor, Tensor]:
        """A copy of the text for every window through the whole layer: projections, attention and MLP."""
        lengths, text = list(self.layout.window_lengths), self.text_tokens

        def attend(
            q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor
        ) -> tuple[Tensor, Tensor]:
            results, text_results, start = [], [], 0
            for i, n in enumerate(lengths):
                mine = slice(i * text, (i + 1) * text)
                joint_q, joint_k, joint_v = (
                    torch.cat([a[start : start + n], b[mine]]).transpose(0, 1)[None]
                    for a, b in ((q, tq), (k, tk), (v, tv))
                )
                out = F.scaled_dot_product_attention(joint_q, joint_k, joint_v)[0].transpose(0, 1)
                results.append(out[:n])
                text_results.append(out[n:])
                start += n
            return torch.cat(results), torch.cat(text_results)

        return self._with_attention(attend, self.x_in_windows, self.c.repeat(len(lengths), 1), self.rotation)


# --- Swin by padding and masks ---


def shifts_and_padding(layer: Layer) -> tuple[list[int], list[int]]:
    """Per axis: cyclic shift and padded length that make our windows whole ones."""
    shifts, padded = [], []
    for n, w in zip(layer.grid, layer.window, strict=True):
        assert isinstance(w, int)
        shifts.append(w // 2 if layer.shifted and n > w // 2 else 0)
        padded.append(-(-n // w) * w if not shifts[-1] else (-(-(n - shifts[-1]) // w) + 1) * w)
    return shifts, padded


def into_windows(layer: Layer, x: Tensor) -> Tensor:
    """(tokens, heads, head_dim), packed order -> (windows, heads, tokens of a whole window, head_dim)."""
    shifts, (t, h, w) = shifts_and_padding(layer)
    a, b, c = layer.grid
    x = F.pad(x.unflatten(0, layer.grid), (0, 0, 0, 0, 0, w - c, 0, h - b, 0, t - a))
    x = x.roll([-s for s in shifts], (0, 1, 2))
    wt, wh, ww = layer.window
    return rearrange(x, "(t a) (h b) (w c) heads d -> (t h w) heads (a b c) d", a=wt, b=wh, c=ww)


def out_of_windows(layer: Layer, x: Tensor) -> Tensor:
    """The inverse, padding dropped."""
    shifts, (t, h, _) = shifts_and_padding(layer)
    wt, wh, ww = layer.window
    assert isinstance(wt, int) and isinstance(wh, int) and isinstance(ww, int)
    x = rearrange(
        x, "(t h w) heads (a b c) d -> (t a) (h b) (w c) heads d",
        t=t // wt, h=h // wh, a=wt, b=wh, c=ww,
    )  # fmt: skip
    a, b, c = layer.grid
    return x.roll(shifts, (0, 1, 2))[:a, :b, :c].flatten(0, 2)


def swin_masks(layer: Layer) -> list[Tensor]:
    """Per padded window (queries, keys and text): its own true window, and the text; padding: the text."""
    owner = torch.full((len(layer.x), 1, 1), -1.0)
    for index, window in enumerate(fixed_windows(layer.grid, layer.window, layer.shifted)):
        owner.view(layer.grid)[window] = index + 1
    owners = into_windows(layer, owner).flatten(1)
    text = torch.ones(owners.shape[1], layer.text_tokens, dtype=torch.bool)
    return [torch.cat([(o[:, None] == o) & (o > 0), text], dim=1) for o in owners]


def masked_window_attention(layer: Layer, masks: list[Tensor], *qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Windows of video queries, then the text's queries once per window, averaged."""
    q, k, v = (into_windows(layer, x) for x in qkv[:3])
    tq, tk, tv = (x.transpose(0, 1) for x in qkv[3:])
    results, text_results = [], []
    for i, mask in enumerate(masks):
        keys, values = torch.cat([k[i], tk], dim=1)[None], torch.cat([v[i], tv], dim=1)[None]
        results.append(F.scaled_dot_product_attention(q[i][None], keys, values, attn_mask=mask)[0])
        real = mask.any(0).expand(layer.text_tokens, -1)
        text_results.append(F.scaled_dot_product_attention(tq[None], keys, values, attn_mask=real)[0])
    text_mean = torch.stack(text_results).mean(0).transpose(0, 1)
    return out_of_windows(layer, torch.stack(results)), text_mean


# --- flex_attention ---

compiled_flex_attention = torch.compile(flex_attention, dynamic=False)


def flex_mask(layer: Layer) -> BlockMask:
    """Queries: the video in window order, then the text once per window. Keys: the video, then the text."""
    windows = torch.arange(layer.layout.windows_per_sample[0])
    video = windows.repeat_interleave(torch.tensor(layer.layout.window_lengths))
    queries = torch.cat([video, windows.repeat_interleave(layer.text_tokens)])
    keys = torch.cat([video, torch.full((layer.text_tokens,), -1)])

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (keys[key] < 0) | (queries[query] == keys[key])

    return create_block_mask(sees, None, None, len(queries), len(keys), device="cpu")


def flex_window_attention(layer: Layer, mask: BlockMask, *qkv: Tensor) -> tuple[Tensor, Tensor]:
    """What `model.dit.attention.window_attention` computes."""
    q, k, v, tq, tk, tv = qkv
    windows = layer.layout.windows_per_sample[0]
    packed = (torch.cat([q, tq.repeat(windows, 1, 1)]), torch.cat([k, tk]), torch.cat([v, tv]))
    out = compiled_flex_attention(*(x.transpose(0, 1)[None] for x in packed), block_mask=mask)
    video, text = out[0].transpose(0, 1).split([len(q), windows * len(tq)])
    return video, text.unflatten(0, (windows, -1)).mean(0)


# --- measuring ---


def measure(call: Callable[[], Any], repeats: int = 1) -> tuple[float, float]:
    """(best seconds, peak GiB above what was there before).

    The peak is the kernel's own count, reset before each call. glibc keeps freed blocks below a limit that
    grows up to 32 MiB, which blurs the peak by some percent: with 1 MiB fixed it is that of the tensors.
    """
    LIBC.mallopt(M_MMAP_THRESHOLD, 2**20)
    best, peak = float("inf"), 0.0
    for _ in range(repeats):
        LIBC.malloc_trim(0)
        before, start = reset_peak(), time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
        peak = max(peak, (status_bytes("VmHWM") - before) / 2**30)
    return best, peak


def product_rate(width: int, hidden: int) -> float:
    """FLOP/s of a layer's largest matrix products, its MLP's, fp32, now (some seconds)."""
    rows = 4096
    pairs = [
        (torch.randn(rows, inner), torch.randn(columns, inner))
        for inner, columns in ((width, hidden), (hidden, width))
    ]
    seconds = min(measure(lambda: [F.linear(a, b) for a, b in pairs])[0] for _ in range(2))
    return 2 * 2 * rows * width * hidden / seconds


def share_of_product_rate(
    call: Callable[[], Any], counted: float, repeats: int, width: int = WIDTH, hidden: int = 4 * WIDTH
) -> tuple[float, list[float]]:
    """Median share of the peak, and the product rates behind it.

    The speed of a shared machine changes by the minute, so each run is compared with the products timed just
    before and just after it, not with those of the best minute.
    """
    shares, rates = [], [product_rate(width, hidden)]
    for _ in range(repeats):
        seconds, _ = measure(call)
        rates.append(product_rate(width, hidden))
        shares.append(counted / seconds / ((rates[-1] + rates[-2]) / 2))
    return statistics.median(shares), rates


def vs_full() -> dict[str, Any]:
    """(a) A pair of our layers against two of full attention."""
    regular, shifted = (Layer(GRID, WINDOW, s) for s in (False, True))
    full = Layer(GRID, ("full", "full", "full"), False)
    seconds, gib = {}, {}
    with torch.no_grad():
        for name, layer in (("regular", regular), ("shifted", shifted), ("full", full)):
            seconds[name], gib[name] = measure(layer.ours, 1 if name == "full" else 2)
    ratio = 2 * seconds["full"] / (seconds["regular"] + seconds["shifted"])
    counted = {
        f"{name}, {text} text tokens": full_over_windowed(grid, text)
        for name, grid in {"720p, 21 frames": GRID, **OTHER_GRIDS}.items()
        for text in (154, 333)
    }
    print(
        f"(a) seconds {rounded(seconds)}, GiB {rounded(gib)}: {ratio:.2f} times; counted {rounded(counted)}"
    )
    return {"vs_full": ratio, "vs_full_seconds": seconds, "vs_full_gib": gib, "vs_full_counted": counted}


def vs_masked_swin() -> dict[str, Any]:
    """(b) The same windows by padding and masks."""
    result: dict[str, Any] = {"vs_masked_swin_layers": {}}
    ratios = []
    for shifted in (False, True):
        layer, name = Layer(GRID, WINDOW, shifted), "shifted" if shifted else "regular"
        masks = swin_masks(layer)
        with torch.no_grad():
            check_equal(layer, masks)
            ours, ours_gib = measure(layer.ours, 2)
            theirs, theirs_gib = measure(lambda layer=layer, masks=masks: layer.masked_swin(masks))  # type: ignore[misc]
        padded = len(masks) * 4 * WIDTH * (masks[0].shape[0] + TEXT) ** 2
        linear = linear_per_token(SD3_MEDIUM, layer=0)[0] * (len(layer.x) + TEXT)
        ratios.append(theirs / ours)
        result["vs_masked_swin_layers"][name] = {
            "seconds": ours, "masked_seconds": theirs, "gib": ours_gib, "masked_gib": theirs_gib,
            "ratio": theirs / ours, "ratio_counted": (padded + linear) / layer.flops,
        }  # fmt: skip
        print(f"(b) {name}: {rounded(result['vs_masked_swin_layers'][name])}")
    return {"vs_masked_swin": sum(ratios) / 2, **result}


def vs_flex() -> dict[str, Any]:
    """(c) The same windows by flex_attention."""
    result: dict[str, Any] = {"vs_flex_layers": {}}
    for name, shifted in (("regular", False), ("shifted", True)):
        layer = Layer(GRID, WINDOW, shifted)
        mask = flex_mask(layer)
        with torch.no_grad():
            ours, ours_gib = measure(layer.ours, 2)
            compiling, _ = measure(lambda layer=layer, mask=mask: layer.flex(mask))  # type: ignore[misc]
            for a, b in zip(layer.flex(mask), layer.ours(), strict=True):
                assert torch.allclose(a, b, atol=1e-3), "flex_attention's windows are not ours"
            theirs, theirs_gib = measure(lambda layer=layer, mask=mask: layer.flex(mask), 2)  # type: ignore[misc]
        result["vs_flex_layers"][name] = {
            "seconds": ours, "flex_seconds": theirs, "gib": ours_gib, "flex_gib": theirs_gib,
            "ratio": theirs / ours, "first_call_seconds": compiling,
        }  # fmt: skip
        print(f"(c) {name}: {rounded(result['vs_flex_layers'][name])}")
    ratios = [layer["ratio"] for layer in result["vs_flex_layers"].values()]
    return {"vs_flex": statistics.mean(ratios), **result}


def check_equal(layer: Layer, masks: list[Tensor]) -> None:
    """Check that both ways give the video the same attention; otherwise the comparison would mean nothing."""
    heads = 2
    qkv = [torch.randn(len(layer.x), heads, HEAD_DIM) for _ in range(3)]
    text = [torch.randn(layer.text_tokens, heads, HEAD_DIM) for _ in range(3)]
    order = layer.layout.to_windows
    ours, _ = window_attention(
        (qkv[0][order], qkv[1][order], qkv[2][order]), (None, text[1], text[2]), layer.layout
    )
    theirs, _ = masked_window_attention(layer, masks, *qkv, *text)
    assert torch.allclose(ours[layer.layout.to_packed], theirs, atol=1e-4), "the masked windows are not ours"


def peak_share() -> dict[str, Any]:
    """Measure (d), the share of matrix products' speed, as the mean of a regular and a shifted layer."""
    forward, train, rates = [], [], []
    for shifted in (False, True):
        layer = Layer(GRID, WINDOW, shifted)
        with torch.no_grad():
            share, seen = share_of_product_rate(layer.ours, layer.flops, 3)
        forward.append(share)
        # backward is two products for each forward one
        share, seen_training = share_of_product_rate(layer.train, 3 * layer.flops, 1)
        train.append(share)
        rates += seen + seen_training
    result = {
        "peak_share_forward": statistics.mean(forward),
        "peak_share_train": statistics.mean(train),
        "product_gflops_lowest": min(rates) / 1e9,
        "product_gflops_highest": max(rates) / 1e9,
    }
    print(f"(d) {rounded(result)}")
    return result


def table3() -> dict[str, Any]:
    """(e) Seconds by window, on one window's area (5 x 32 x 32 tokens) so that the smallest fits."""
    grid, rows = (5, 32, 32), []
    for frames in (1, 5):
        for side in (8, 16, 32, 64):
            layer = Layer(grid, (frames, side // 2, side // 2), shifted=False)
            lengths = list(layer.layout.window_lengths)
            with torch.no_grad():
                ours, _ = measure(layer.ours, 2)
                literal, _ = measure(layer.literal)
            counted = {
                f"literal_counted_{text}": layer_flops(lengths, text, len(lengths)) for text in (TEXT, 333)
            }
            row = {"t": frames, "window": side, "windows": len(lengths), "ours_seconds": ours}
            row |= {"literal_seconds": literal, "ours_counted": layer_flops(lengths, TEXT), **counted}
            rows.append(row | {"paper_seconds": PAPER_TABLE3[frames][side]})
    for row in rows:
        largest = next(r for r in rows if r["t"] == row["t"] and r["window"] == 64)
        for kind in ("ours_seconds", "literal_seconds", "literal_counted_333", "paper_seconds"):
            row[f"{kind}_over_64"] = row[kind] / largest[kind]
        print(f"(e) {rounded(row)}")
    return {"table3": rows}


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """For printing."""
    return {
        key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in values.items()
    }


def main() -> None:
    parts = {
        "vs_full": vs_full, "vs_masked_swin": vs_masked_swin, "vs_flex": vs_flex, "peak_share": peak_share,
        "table3": table3,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=parts, help="one part; the others keep their last recorded numbers")
    only = parser.parse_args().only
    torch.set_num_threads(os.cpu_count() or 1)
    result = json.loads(OUT.read_text()) if OUT.exists() else {}
    result |= {"width": WIDTH, "grid": GRID, "text_tokens": TEXT, "threads": torch.get_num_threads()}
    for name, part in parts.items():
        if only in (None, name):
            result |= part() | {f"load_before_{name}": os.getloadavg()[0]}
            OUT.parent.mkdir(parents=True, exist_ok=True)
            OUT.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
