"""CLIP: an image tower and a text tower that meet in a joint space.

image[B,3,Y,X] -> backbone with projection -> image[B,E]; text[B,L] -> text tower -> text[B,E]; exp(logit_scale)

Paper: EVA section 3.4; EVA-CLIP (arXiv 2303.15389). Source: spec section 1 of EVA-CLIP. Names: `backbone.*` (the
official `visual.*`, with `backbone.projection.*` for its `head.*`), `text.*`, `logit_scale`, and `logit_bias` of the
sigmoid loss. Deliberate difference: `logit_scale` is a vector of one (sharded training cannot divide a scalar); files
for others hold a scalar.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from openeva.backbones.base import Backbone
from openeva.config import Backbone as BackboneField
from openeva.config import Config
from openeva.registry import did_you_mean
from openeva.text.tokenizer import Tokenizer
from openeva.text.tower import TextConfig, TextTower

INITIAL_SCALE = 1 / 0.07
MAX_LOGIT_SCALE = math.log(100.0)
"""Largest value of `logit_scale`, which is a logarithm; the least is 0."""
SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0
"""Initial values of the sigmoid loss (SigLIP)."""

_TEXT_B16: dict[str, Any] = {"width": 512, "num_heads": 8, "depth": 12}
_TEXT_L14: dict[str, Any] = {"width": 768, "num_heads": 12, "depth": 12}
_TEXT_H14: dict[str, Any] = {"width": 1024, "num_heads": 16, "depth": 24}
_TEXT_BIG_G14: dict[str, Any] = {"width": 1280, "num_heads": 20, "depth": 32}
_EVA02_B16: dict[str, Any] = {"variant": "eva02_b_14", "patch_size": 16, "sub_norm": "mlp_attention"}
_EVA02_L14: dict[str, Any] = {"variant": "eva02_l_14", "sub_norm": "mlp_attention"}

CLIP_VARIANTS: dict[str, dict[str, Any]] = {
    "eva01_clip_b_16": {
        "embed_dim": 512, "backbone": {"variant": "eva_b_16", "layer_scale": 0.1}, "text": _TEXT_B16,
    },
    "eva01_clip_g_14": {"embed_dim": 1024, "backbone": {"variant": "eva_g_14"}, "text": _TEXT_L14},
    "eva01_clip_g_14_plus": {"embed_dim": 1024, "backbone": {"variant": "eva_g_14"}, "text": _TEXT_H14},
    "eva02_clip_b_16": {"embed_dim": 512, "backbone": _EVA02_B16, "text": _TEXT_B16},
    "eva02_clip_l_14": {"embed_dim": 768, "backbone": _EVA02_L14, "text": _TEXT_L14},
    "eva02_clip_l_14_336": {"embed_dim": 768, "backbone": {**_EVA02_L14, "image_size": 336}, "text": _TEXT_L14},
    "eva02_clip_e_14": {"embed_dim": 1024, "backbone": {"variant": "eva02_e_14"}, "text": _TEXT_H14},
    "eva02_clip_e_14_plus": {"embed_dim": 1024, "backbone": {"variant": "eva02_e_14"}, "text": _TEXT_BIG_G14},
    "eva_clip_8b": {"embed_dim": 1280, "backbone": {"variant": "eva_8b_14"}, "text": _TEXT_BIG_G14},
    "eva_clip_18b": {"embed_dim": 1536, "backbone": {"variant": "eva_18b_14"}, "text": _TEXT_BIG_G14},
    "eva_clip_ti_16": {
        "embed_dim": 256, "backbone": {"variant": "eva_ti_16"}, "text": {"width": 192, "num_heads": 3, "depth": 6},
    },
    "eva_clip_micro_8": {
        "embed_dim": 128,
        "backbone": {
            "image_size": 64, "patch_size": 8, "width": 128, "depth": 6, "num_heads": 4, "mlp_hidden": 512,
        },
        "text": {"width": 128, "num_heads": 4, "depth": 3, "context_length": 32},
    },
}  # fmt: skip
"""Pairs of towers by name: spec section 1.1, the two largest by their paper's dimensions, and two for CPUs."""


class ClipConfig(Config):
    """A pair of towers: a variant's name, or both towers, or a variant with some keys overridden."""

    variant: str | None = Field(
        None, description=f"one of {', '.join(CLIP_VARIANTS)}; its values are defaults for the keys below"
    )
    embed_dim: int = Field(gt=0, description="E, width of the joint space of images and texts")
    backbone: BackboneField = Field(description="the image tower")
    text: TextConfig = Field(description="the text tower")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_variant(cls, values: Any) -> Any:
        """Values of the variant, and what every image tower of CLIP is: projected, drawn as the official one."""
        if not isinstance(values, dict):
            return values
        variant = values.get("variant")
        known = CLIP_VARIANTS.get(variant, {}) if isinstance(variant, str) else {}
        if variant is not None and not known:
            raise ValueError(
                f"unknown variant {variant!r}{did_you_mean(str(variant), list(CLIP_VARIANTS))}"
                f" ({', '.join(CLIP_VARIANTS)})"
            )
        values = {**known, **values}
        for tower in ("backbone", "text"):
            given = values.get(tower)
            if isinstance(given, str):
                values[tower] = given = {"name": given}
            if isinstance(given, dict) and not (tower == "backbone" and given.get("name", "vit") != "vit"):
                values[tower] = {**known.get(tower, {}), **given}
        backbone = values.get("backbone")
        if isinstance(backbone, dict) and backbone.get("name", "vit") == "vit":
            values["backbone"] = {
                "name": "vit",
                "init": "classifier",
                "projection": values.get("embed_dim"),
                **backbone,
            }
        return values

    @model_validator(mode="after")
    def _one_joint_space(self) -> "ClipConfig":
        if getattr(self.backbone, "num_frames", None) is not None:
            raise ValueError("the image tower of a CLIP sees images: leave out num_frames")
        projection = getattr(self.backbone, "projection", self.embed_dim)
        if isinstance(projection, int) and not isinstance(projection, bool) and projection != self.embed_dim:
            raise ValueError(f"backbone.projection {projection} is not embed_dim {self.embed_dim}; leave it out")
        return self


class ClipModel(nn.Module):
    """Both towers and the temperature; what a CLIP run trains.

    Args:
        config: Both towers.
        bias: Add the bias of the sigmoid loss, and start the scale as that loss wants it.
    """

    logit_bias: nn.Parameter | None

    def __init__(self, config: ClipConfig, *, bias: bool = False) -> None:
        super().__init__()
        self.config, self.embed_dim = config, config.embed_dim
        backbone: Backbone = config.backbone.build()
        if isinstance(getattr(backbone, "mask_token", None), nn.Parameter):  # nothing is hidden here
            backbone.register_parameter("mask_token", None)
        self.backbone = backbone
        # towers without a projection of their own get one
        joint = backbone.width == config.embed_dim
        self.projection: nn.Module = nn.Identity() if joint else nn.Linear(backbone.width, config.embed_dim)
        self.text: TextTower = config.text.build(config.embed_dim)
        scale = SIGMOID_SCALE if bias else INITIAL_SCALE
        self.logit_scale = nn.Parameter(torch.tensor([math.log(scale)]))
        self.register_parameter("logit_bias", nn.Parameter(torch.tensor([SIGMOID_BIAS])) if bias else None)
        self.tokenizer = Tokenizer(config.text.context_length)

    def forward(
        self, image_BCYX: Float[Tensor, "B C Y X"], text_BL: Int[Tensor, "B L"]
    ) -> tuple[Float[Tensor, "B E"], Float[Tensor, "B E"], Float[Tensor, "1"], Float[Tensor, "1"] | None]:
        """Features of length 1 of images and texts, the scale of their products, and the bias if there is one."""
        image_BE, text_BE = self.encode_image(image_BCYX), self.encode_text(text_BL)
        return F.normalize(image_BE.float(), dim=-1), F.normalize(text_BE.float(), dim=-1), self.scale, self.logit_bias

    @property
    def scale(self) -> Float[Tensor, "1"]:
        """What products of features are multiplied with: exp(logit_scale)."""
        return self.logit_scale.float().exp()

    def encode_image(self, image_BCYX: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B E"]:
        """Features of normalised images, not of length 1."""
        return self.projection(self.backbone(image_BCYX).pooled)

    def encode_text(self, text: Int[Tensor, "B L"] | Sequence[str]) -> Float[Tensor, "B E"]:
        """Features of texts, not of length 1.

        Args:
            text: Token ids, or the texts themselves.
        """
        if not isinstance(text, Tensor):
            text = self.tokenizer(list(text)).to(self.logit_scale.device)
        return self.text(text)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Bring the temperature back to where it may be (spec section 2.2), in full precision."""
        self.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)
