"""The same classifier built by openeva and by timm's own EVA class; `finetune_step.py` and `inference.py` time them."""

from typing import Any

import timm
import torch
from torch import nn

from openeva.backbones.vit import Config
from openeva.config import validate
from openeva.heads.classifier import ImageClassifier

NUM_CLASSES = 1000
MODELS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "eva_s_16": (
        {"variant": "eva_s_16"},
        "eva_giant_patch14_224",
        {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6, "mlp_ratio": 4.0},
    ),
    "eva_l_14": ({"variant": "eva_l_14"}, "eva_large_patch14_196", {"img_size": 224}),
    "eva_g_14": ({"variant": "eva_g_14"}, "eva_giant_patch14_224", {}),
    "eva02_ti_14": ({"variant": "eva02_ti_14"}, "eva02_tiny_patch14_224", {}),
    "eva02_s_14": ({"variant": "eva02_s_14"}, "eva02_small_patch14_224", {}),
    "eva02_b_14": ({"variant": "eva02_b_14"}, "eva02_base_patch14_224", {}),
}
"""Name -> our config, timm's model and its arguments."""


def ours(name: str, image_size: int, drop_path: float = 0.0) -> ImageClassifier:
    """Our classifier: mean pooling, `fc_norm`, linear."""
    config = {**MODELS[name][0], "image_size": image_size, "final_norm": False, "drop_path": drop_path}
    return ImageClassifier(validate(Config, config).build(), NUM_CLASSES)


def timms(name: str, image_size: int, drop_path: float = 0.0) -> nn.Module:
    """timm's, as a library user gets it."""
    _, model, arguments = MODELS[name]
    arguments = {**arguments, "img_size": image_size, "num_classes": NUM_CLASSES, "drop_path_rate": drop_path}
    return timm.create_model(model, global_pool="avg", **arguments)


def same_size(own: nn.Module, peer: nn.Module) -> None:
    """Make sure that the two are the same model.

    Raises:
        ValueError: They are not.
    """
    own_count = sum(p.numel() for key, p in own.named_parameters() if not key.endswith("mask_token"))
    peer_count = sum(p.numel() for p in peer.parameters())
    if own_count != peer_count:
        raise ValueError(f"ours has {own_count:,} parameters, timm's {peer_count:,}: not the same model")


def random_images(batch: int, image_size: int, device: torch.device) -> torch.Tensor:
    """Normalised images of noise `[B, 3, Y, X]`."""
    return torch.randn(batch, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(device)
