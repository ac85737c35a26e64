"""The three text encoders of SD3: CLIP-L, OpenCLIP bigG and T5-XXL, kept apart until a sample is made.

Each caption is encoded alone, at its true length (SD3 pads to 77 and 256 tokens), so that a result never
depends on what else is in the batch, to the last bit. Training replaces each encoder's part on its own by
that encoder's encoding of the empty prompt, so the parts are stored separately and joined by `join`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from open_clip.transformer import TextTransformer

Module = TypeVar("Module", bound=nn.Module)

P_DROP = 0.464
"""SD3's chance (appendix B.3) that an encoder's part is replaced by its encoding of the empty prompt."""
CLIP_MAX_TOKENS = 77
T5_MAX_TOKENS = 256
TINY = "tiny"


@dataclass(frozen=True)
class TextEncoderConfig:
    """Which encoders: a Hugging Face id or a folder each, or `tiny`, small and random, without download.

    SD3's are timm/vit_large_patch14_clip_224.openai, laion/CLIP-ViT-bigG-14-laion2B-39B-b160k and
    google/t5-v1_1-xxl.
    """

    clip_l: str
    """CLIP-L as open_clip reads it: a Hugging Face id, an absolute folder that every node has, or the word
    tiny for a small random encoder without a download."""
    clip_g: str
    """OpenCLIP bigG as open_clip reads it: a Hugging Face id, an absolute folder that every node has, or the
    word tiny for a small random encoder without a download."""
    t5: str
    """T5 encoder with its tokenizer as transformers reads it: a Hugging Face id, an absolute folder that
    every node has, or the word tiny for a small random encoder without a download."""


TINY_ENCODERS = TextEncoderConfig(clip_l=TINY, clip_g=TINY, t5=TINY)
"""Widths 16, 32 and 64: `text_dim` 64 and `pooled_dim` 48 of `swin_mmdit.TINY`."""


@dataclass(frozen=True)
class TextEmbedding:
    """One caption's embeddings, fp32 on the CPU, without padding."""

    clip_l: Tensor
    """(n_l, d_l) states after the last layer but one"""
    clip_g: Tensor
    """(n_g, d_g) states after the last layer but one"""
    t5: Tensor
    """(n_t, D) final states"""
    pooled_l: Tensor
    """(p_l,) projected end-of-text state"""
    pooled_g: Tensor
    """(p_g,) projected end-of-text state"""


def join(
    embedding: TextEmbedding, null: TextEmbedding, drop_l: bool, drop_g: bool, drop_t5: bool
) -> tuple[Tensor, Tensor]:
    """The network's text input: (L, D) tokens and (P,) pooled vector, D being T5's width.

    As in SD3, CLIP-L and bigG stand side by side in the channels, padded with zeros to D, and T5 follows
    along the sequence; the shorter CLIP is padded with zeros. A dropped encoder gives its part of `null` (the
    encoding of ''), at that one's length, its pooled vector too; all three dropped is guidance's negative.
    """
    from_l, from_g, from_t5 = (null if drop else embedding for drop in (drop_l, drop_g, drop_t5))
    clip_l, clip_g, t5 = from_l.clip_l, from_g.clip_g, from_t5.t5
    length, width = max(len(clip_l), len(clip_g)), t5.shape[-1]
    clip = torch.cat(
        [F.pad(clip_l, (0, 0, 0, length - len(clip_l))), F.pad(clip_g, (0, 0, 0, length - len(clip_g)))],
        dim=-1,
    )
    if clip.shape[-1] > width:
        raise ValueError(f"CLIP-L and bigG together are {clip.shape[-1]} wide, more than T5's {width}")
    text = torch.cat([F.pad(clip, (0, width - clip.shape[-1])), t5])
    return text, torch.cat([from_l.pooled_l, from_g.pooled_g])


def draw_drops(generator: torch.Generator) -> tuple[bool, bool, bool]:
    """Which of (CLIP-L, bigG, T5) this training sample drops: each on its own with `P_DROP`."""
    drop_l, drop_g, drop_t5 = (torch.rand(3, generator=generator, device=generator.device) < P_DROP).tolist()
    return drop_l, drop_g, drop_t5


class TextEncoders:
    """The three encoders, loaded once and frozen; fp32 on the CPU, bf16 on CUDA."""

    def __init__(self, config: TextEncoderConfig, device: torch.device | str | None = None) -> None:
        import open_clip  # takes seconds to import, in every worker, and only these encoders need it

        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.clip_tokenizer = open_clip.SimpleTokenizer(context_length=CLIP_MAX_TOKENS)
        self.clip_l = self._place(_clip_text_tower(config.clip_l, tiny_width=16, seed=1), dtype)
        self.clip_g = self._place(_clip_text_tower(config.clip_g, tiny_width=32, seed=2), dtype)
        t5, self.t5_tokens = _t5(config.t5, dtype, tiny_width=64, seed=3)
        self.t5 = self._place(t5, dtype)

    def _place(self, module: Module, dtype: torch.dtype) -> Module:
        return module.to(self.device, dtype).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[TextEmbedding]:
        """One embedding per caption; '' is the empty prompt, which is also what a missing caption means."""
        return [self._encode_one(caption) for caption in captions]

    def _encode_one(self, caption: str) -> TextEmbedding:
        clip_tokens = self.clip_tokenizer([caption])
        length = int(clip_tokens[0].argmax()) + 1  # the end-of-text token has the largest id
        clip_l, pooled_l = self._encode_clip(self.clip_l, clip_tokens, length)
        clip_g, pooled_g = self._encode_clip(self.clip_g, clip_tokens, length)
        t5_ids = torch.tensor([self.t5_tokens(caption)], device=self.device)
        t5 = self.t5(input_ids=t5_ids).last_hidden_state[0].float().cpu()
        return TextEmbedding(clip_l, clip_g, t5, pooled_l, pooled_g)

    def _encode_clip(self, tower: "TextTransformer", tokens: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """((length, width) penultimate states, (projection,) pooled). tokens: (1, 77), zeros after the text.

        CLIP's text tower is causal: the zeros change nothing before them.
        """
        out = tower.forward_intermediates(
            tokens.to(self.device), indices=[len(tower.transformer.resblocks) - 2], output_fmt="NLC"
        )
        states = out["text_intermediates"][0][0, :length]
        return states.float().cpu(), out["text_features"][0].float().cpu()


def _clip_text_tower(name: str, tiny_width: int, seed: int) -> "TextTransformer":
    """The text tower of a CLIP."""
    import open_clip
    from open_clip.transformer import TextTransformer

    if name == TINY:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return TextTransformer(
                context_length=CLIP_MAX_TOKENS, width=tiny_width, heads=2, layers=2, output_dim=tiny_width
            )
    source = f"local-dir:{name}" if Path(name).is_dir() else f"hf-hub:{name}"
    # With the text tower as its own module, the image tower is not kept; weights are read as tensors only.
    model = open_clip.create_model(source, force_custom_text=True, require_pretrained=True, weights_only=True)
    return model.text


def _t5(
    name: str, dtype: torch.dtype, tiny_width: int, seed: int
) -> tuple[nn.Module, Callable[[str], list[int]]]:
    """T5's encoder and caption -> token ids (with the end token, at most 256)."""
    # transformers takes seconds to import and only this needs it
    from transformers import AutoTokenizer, ByT5Tokenizer, T5Config, T5EncoderModel

    if name == TINY:
        config = T5Config(
            vocab_size=384, d_model=tiny_width, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = T5EncoderModel(config)
        tokenizer: Any = ByT5Tokenizer()
    else:
        model = T5EncoderModel.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    return model, lambda caption: tokenizer(caption, truncation=True, max_length=T5_MAX_TOKENS).input_ids
