"""LAION-Aesthetics: how much people like a picture, from its CLIP embedding. About 1 to 10, higher is better.

Both heads take the L2-normalised image embedding of OpenAI's ViT-L/14 (MIT; on the Hugging Face hub it is
`timm/vit_large_patch14_clip_224.openai`). Their published files are small and free and come with this code:
`sa_0_4_vit_l_14_linear.pth` (LAION-AI/aesthetic-predictor, MIT) and `sac+logos+ava1-l14-linearMSE.pth`
(christophschuhmann/improved-aesthetic-predictor, Apache-2.0), which is what "LAION-Aesthetics v2" means.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("weights")
LINEAR_FILE = "sa_0_4_vit_l_14_linear.pth"
MLP_FILE = "sac+logos+ava1-l14-linearMSE.pth"
EMBEDDING = 768
SIDE_PX = 224
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class AestheticMlp(nn.Module):
    """The improved predictor: linear layers with nothing between them but dropout in training."""

    def __init__(self) -> None:
        super().__init__()
        widths = {0: (EMBEDDING, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
        self.layers = nn.ModuleDict({str(i): nn.Linear(*pair) for i, pair in widths.items()})

    def forward(self, embedding: Tensor) -> Tensor:
        """(B, 768) -> (B, 1)."""
        for layer in self.layers.values():
            embedding = layer(embedding)
        return embedding


def head_for(state: Mapping[str, Tensor]) -> nn.Module:
    """An empty head of the kind that a published file holds."""
    return nn.Linear(EMBEDDING, 1) if set(state) == {"weight", "bias"} else AestheticMlp()


def aesthetic_score(head: nn.Module, embedding: Tensor) -> Tensor:
    """(B, 768) image embeddings, normalised or not, -> (B, 1). A zero embedding gives the head's bias."""
    return head(F.normalize(embedding.float(), dim=-1))


def prepare(frame: Tensor) -> Tensor:
    """Prepare a uint8 (H, W, 3) RGB picture for CLIP: (1, 3, 224, 224).

    The shorter side is resized to 224 with Pillow's bicubic, and the central square is normalised.
    """
    import torchvision.transforms.functional as TF  # takes a second to import, with torchvision.ops

    picture = TF.resize(Image.fromarray(frame.numpy()), SIDE_PX, TF.InterpolationMode.BICUBIC)
    square = TF.to_tensor(TF.center_crop(picture, [SIDE_PX, SIDE_PX]))
    return TF.normalize(square, list(CLIP_MEAN), list(CLIP_STD))[None]


@torch.no_grad()
def score(visual: nn.Module, head: nn.Module, frame: Tensor) -> float:
    """Score of a uint8 (H, W, 3) RGB frame. visual: CLIP's picture half, (1, 3, 224, 224) -> (1, 768)."""
    device = next(head.parameters()).device
    return aesthetic_score(head, visual(prepare(frame).to(device))).item()
