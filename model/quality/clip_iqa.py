"""CLIP-IQA: how much more a picture is "Good photo." than "Bad photo." (Wang et al., AAAI 2023).

CLIP's RN50 sees the picture at its own resolution: the position embedding of its attention pool is left out,
so that any size from 32 pixels on works. Only OpenAI's CLIP (MIT) and these two prompts are needed;
`timm/resnet50_clip.openai` is its name on the Hugging Face hub. Other tools' "clipiqa" have other prompts.
"""

import open_clip
import torch
import torch.nn.functional as F
from open_clip import CLIP
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from torch import Tensor

from model.quality.aesthetic import CLIP_MEAN, CLIP_STD

PROMPTS = ("Good photo.", "Bad photo.")
MIN_SIDE_PX = 32


def pool_without_positions(pool: AttentionPool2d, features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, D): attention of the mean to itself and to every place, wherever they lie."""
    places = features.flatten(2).transpose(1, 2)
    tokens = torch.cat([places.mean(dim=1, keepdim=True), places], dim=1)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)

    query, key, value = pool.q_proj(tokens[:, :1]), pool.k_proj(tokens), pool.v_proj(tokens)
    out = F.scaled_dot_product_attention(heads(query), heads(key), heads(value))
    return pool.c_proj(out.transpose(1, 2).flatten(2)[:, 0])


def picture_features(visual: ModifiedResNet, pictures: Tensor) -> Tensor:
    """CLIP's embedding of pictures of any size: (B, 3, H, W) RGB in 0 to 1 -> (B, D)."""
    mean, std = (torch.tensor(v, device=pictures.device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    x = visual.stem((pictures - mean) / std)
    for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        x = layer(x)
    return pool_without_positions(visual.attnpool, x)


def similarities(clip: CLIP, pictures: Tensor, tokens: Tensor) -> Tensor:
    """Scaled cosines of pictures (B, 3, H, W) in 0 to 1 and prompts (P, 77): (B, P)."""
    texts = F.normalize(clip.encode_text(tokens), dim=-1)
    return clip.logit_scale.exp() * F.normalize(picture_features(clip.visual, pictures), dim=-1) @ texts.T


class ClipIQA:
    """The scorer around a loaded CLIP whose picture half is a ResNet."""

    def __init__(self, clip: CLIP) -> None:
        if not isinstance(clip.visual, ModifiedResNet):
            raise ValueError(
                f"CLIP-IQA needs a CLIP with a ResNet, such as RN50, not a {type(clip.visual).__name__}"
            )
        self.clip = clip
        self.tokens = open_clip.SimpleTokenizer()(list(PROMPTS)).to(clip.logit_scale.device)

    @torch.no_grad()
    def scores(self, frames: Tensor) -> list[float]:
        """Quality from 0 to 1 of each of uint8 (B, H, W, 3) RGB frames."""
        height, width = frames.shape[1:3]
        if min(height, width) < MIN_SIDE_PX:
            raise ValueError(
                f"a picture of {width}x{height} is too small for CLIP-IQA, which needs 32 pixels"
            )
        pictures = frames.to(self.tokens.device).permute(0, 3, 1, 2).float() / 255
        return similarities(self.clip, pictures, self.tokens).softmax(dim=-1)[:, 0].tolist()

    def score(self, frame: Tensor) -> float:
        """Quality from 0 to 1 of one uint8 (H, W, 3) RGB frame."""
        return self.scores(frame[None])[0]
