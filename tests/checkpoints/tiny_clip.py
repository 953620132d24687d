"""Tiny CLIPs of others: open_clip's own models with timm's towers, and files in the official layouts."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import timm
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from torch import Tensor

TEXT: dict[str, Any] = {"context_length": 16, "vocab_size": 300, "width": 64, "heads": 1, "layers": 2}
EMBED, WIDTH, HEADS, DEPTH, PATCH, SIDE = 24, 32, 2, 2, 8, 32
TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "EVA01-g": ("eva_giant_patch14_224", {"mlp_ratio": 2.5}),
    "EVA02-B": ("eva02_base_patch16_clip_224", {"mlp_ratio": 2.5}),
    "EVA02-E": ("eva02_enormous_patch14_clip_224", {"mlp_ratio": 2.5}),
}
"""Style -> timm's model, which open_clip's description of the released one names, and what makes it small."""


@contextmanager
def _small(changes: dict[str, Any]) -> Iterator[None]:
    """open_clip hands no dimensions on to timm."""
    sizes = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    create = functools.partial(timm.create_model, **sizes, **changes)
    with mock.patch.object(timm, "create_model", create):
        yield


def open_clip_model(style: str, seed: int = 0, text: dict[str, Any] = TEXT) -> CustomTextCLIP:
    """open_clip's model of a style, with weights that make every tensor matter."""
    name, changes = TOWERS[style]
    vision = CLIPVisionCfg(image_size=SIDE, timm_model_name=name, timm_pool="token", timm_proj=None)
    with _small(changes):
        model = CustomTextCLIP(EMBED, vision, CLIPTextCfg(**text))
    return randomised(model, seed).eval()


def openai_model(seed: int = 0, text: dict[str, Any] = TEXT) -> CLIP:
    """The architecture and layout of OpenAI's CLIP: flat text names, another image tower."""
    vision = CLIPVisionCfg(layers=1, width=64, patch_size=16, image_size=32)
    return randomised(CLIP(48, vision, CLIPTextCfg(**text), quick_gelu=True), seed).eval()


def randomised(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs() -> tuple[Tensor, Tensor]:
    """Images, and token ids that end with the largest one."""
    generator = torch.Generator().manual_seed(5)
    text_BL = torch.randint(1, 298, (3, TEXT["context_length"]), generator=generator)
    text_BL[:, 9] = 299
    text_BL[1, 4] = 299
    return torch.randn(3, 3, SIDE, SIDE, generator=generator), text_BL
