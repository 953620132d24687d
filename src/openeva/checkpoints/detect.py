"""Which layout a state dict has, and which architecture its shapes describe.

state dict -> `detect_layout` -> renamed to openeva's names (`to_openeva`) -> `infer_vit_config`

Source: spec sections 1.1, 1.5 and 1.8 of EVA-01, 1.1 of EVA-CLIP, 4.1 and 5 of EVA-02.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from openeva.checkpoints.clip import IMAGE, TRUNK, from_clip, is_clip, style_of
from openeva.checkpoints.files import StateDict
from openeva.checkpoints.official import from_official
from openeva.checkpoints.resize import NUM_CLS_ROWS, AnyGrid, Grid, square_grid
from openeva.checkpoints.timm import from_timm, is_timm
from openeva.layers.rope import THETA

Names = Literal["openeva", "official", "timm", "open_clip"]

NUM_HEADS_OF_WIDTH = {1408: 16, 1280: 16, 1792: 16, 4096: 32, 5120: 40}
"""Heads of released models whose head width is not 64 (EVA-g: 88, the MAE-style huge one: 80, EVA-02 E: 112, 8B and
18B: 128)."""

POST_NORM_WIDTH = 1792
"""Width that only EVA-02 E has, the one released model with post-norm blocks."""

HEAD_WIDTH = 64
"""Head width of all other released models."""

INDEX_BUFFER = re.compile(r"\.(relative_position_(high_|width_)?index|rope\.freqs_(cos|sin))$")
"""Tables that official files store and that are computed from the grid alone."""

ROPE_GRID = 16
"""Pre-training grid of all released EVA-02."""

GATED = "backbone.blocks.0.mlp.w12.weight"
"""Gate and value of SwiGLU, which only EVA-02 has (with RoPE)."""

MIN_ROPE_LENGTH = 2
"""Patches per axis that a rotary table must have to tell the angle between two of them."""

_KNOWN = re.compile(
    r"""logit_(scale|bias) | projection\.(weight|bias)
    | text\.(
        token_embedding\.weight | positional_embedding | text_projection | ln_final\.(weight|bias)
        | transformer\.resblocks\.\d+\.(
            ln_[12]\.(weight|bias) | attn\.(in_proj_(weight|bias) | out_proj\.(weight|bias))
            | mlp\.(c_fc|c_proj)\.(weight|bias)))
    | backbone\.(
        cls_token | mask_token | pos_embed | patch_embed\.proj\.(weight|bias) | norm\.(weight|bias)
        | projection\.(weight|bias)
        | relative_position\.relative_position_(bias_table|bias_for_high|bias_for_width)
        | blocks\.\d+\.(
            norm[12]\.(weight|bias) | gamma_[12]
            | attn\.(q_bias | v_bias | qkv\.(weight|bias) | proj\.(weight|bias) | norm\.(weight|bias))
            | attn\.position_bias\.relative_position_(bias_table|bias_for_high|bias_for_width)
            | mlp\.(fc[12] | w12 | w3 | norm)\.(weight|bias)))
    | head\.(weight|bias) | fc_norm\.(weight|bias)
    | classifier\.(weight | bias | 0\.(running_mean|running_var|num_batches_tracked) | 1\.(weight|bias))
    | decoder\.(mask_token | pos_embed | (embed|norm|pred)\.(weight|bias) | blocks\.\d+\..+)""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Layout:
    """How the weights of a file are named and what they hold.

    Attributes:
        names: Whose names they are. timm's names are the official ones, except for the layer scale of its
            `VisionTransformer` and some of EVA-02; only a file with one of these counts as "timm". open_clip puts
            its own names around them.
        parts: Which of openeva's parts are there, such as `("backbone", "head")`; see `official.py`.
    """

    names: Names
    parts: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.names} names, with {' and '.join(self.parts)}"


def detect_layout(state_dict: Mapping[str, Tensor]) -> Layout:
    """Tell the layout of a state dict by its names.

    Raises:
        ValueError: Not a plain vision transformer in a known layout; the message says what was looked for and found.
    """
    names, prefix = _names_of(state_dict)
    attention = [f"blocks.0.attn.{name}.weight" for name in ("qkv", "q_proj")]
    mlp = [f"blocks.0.mlp.{name}.weight" for name in ("fc1", "w12", "w1", "fc1_g")]
    for needed in (["patch_embed.proj.weight"], attention, mlp):
        if not any(prefix + name in state_dict for name in needed):
            raise ValueError(_unknown_layout(state_dict, prefix + needed[0]))
    shapes = {key: torch.empty_like(tensor, device="meta") for key, tensor in state_dict.items()}
    return layout_of(_rename(shapes, names), names)


def layout_of(state_dict: Mapping[str, Tensor], names: Names) -> Layout:
    """The layout of weights that have openeva's names now.

    Args:
        state_dict: Weights with openeva's names.
        names: Whose they were.
    """
    parts = {key.split(".", 1)[0] for key in state_dict}
    order = ("backbone", "text", "head", "fc_norm", "classifier", "decoder")
    return Layout(names, tuple(part for part in order if part in parts) + tuple(sorted(parts - set(order))))


def file_style(state_dict: Mapping[str, Tensor], names: Names) -> str:
    """How the names of a file are made of openeva's, for `original.py`."""
    return style_of(state_dict) if is_clip(state_dict) else "timm" if names == "timm" else "official"


def _names_of(state_dict: Mapping[str, Tensor]) -> tuple[Names, str]:
    """(whose names, what stands in front of those of the image tower)."""
    if any(key.startswith("backbone.") for key in state_dict):
        return "openeva", "backbone."
    if is_clip(state_dict):
        return ("open_clip", TRUNK) if any(key.startswith(TRUNK) for key in state_dict) else ("official", IMAGE)
    return ("timm" if is_timm(state_dict) else "official"), ""


def _unknown_layout(state_dict: Mapping[str, Tensor], missing: str) -> str:
    if f"{IMAGE}proj" in state_dict or f"{IMAGE}attnpool.c_proj.weight" in state_dict:
        return (
            "this is a CLIP whose image tower has OpenAI's architecture, which is none of EVA's; use it as a teacher "
            "with {name: open_clip, pretrained: FILE}, or its text tower with task.init_text"
        )
    found = ", ".join(list(state_dict)[:4])
    return (
        f"not a vision transformer in a known layout: {missing} is missing (found {found}, ...); known are openeva's "
        "own files, official files of EVA-01, EVA-02 and EVA-CLIP, open_clip's of EVA-CLIP, and timm's Eva and "
        "VisionTransformer"
    )


def to_openeva(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Give the weights of any known layout openeva's names, index buffers included.

    Raises:
        ValueError: Unknown layout.
    """
    return _rename(state_dict, detect_layout(state_dict).names)


def unknown_names(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Which of these (openeva's) names belong to no part of any known model."""
    return [key for key in state_dict if not _KNOWN.fullmatch(key) and not INDEX_BUFFER.search(key)]


def prediction_width(state_dict: Mapping[str, Tensor]) -> int | None:
    """V, the width of the teacher features that prediction head or decoder make; None without either."""
    weight = state_dict.get("head.weight", state_dict.get("decoder.pred.weight"))
    return None if weight is None else weight.shape[0]


def infer_vit_config(
    state_dict: Mapping[str, Tensor], *, num_heads: int | None = None, grid: AnyGrid | None = None
) -> dict[str, Any]:
    """Read the architecture off the shapes, as keyword arguments for the `Config` of `backbones/vit.py`.

    Not in any shape, so left at the config's defaults: epsilon, dropout, and the initial layer scale (its value here
    only says that there is one). Nor is pre- or post-norm: blocks are taken to be pre-norm, but for the width that only
    EVA-02 E has.

    Args:
        state_dict: Weights with openeva's names.
        num_heads: Heads, where no relative position table tells and the width's usual number is wrong.
        grid: Rows and columns of patches (of clips with the time slots in front), where positions do not tell or the
            grid is not square.

    Raises:
        ValueError: The number of heads or the grid cannot be told.
    """
    shapes = {key.removeprefix("backbone."): t.shape for key, t in state_dict.items() if key.startswith("backbone.")}
    width, _, *tubelet, patch_size, _ = shapes["patch_embed.proj.weight"]
    inner = shapes["blocks.0.attn.qkv.weight"][0] // 3
    relative_position, swiglu = _relative_position(shapes), GATED in state_dict
    num_heads = num_heads or _num_heads(shapes, width, inner)
    if inner % num_heads:
        raise ValueError(f"{num_heads} heads do not divide the {inner} channels of q; pass the right num_heads")
    grid = grid or infer_grid(state_dict)
    if grid is None:
        raise ValueError(
            "the number of frames cannot be told from the weights of a model of clips; pass num_frames"
            if tubelet
            else "the patch grid cannot be told from the weights: no positions, or not of a square grid; pass grid"
        )
    sides = grid[-2] * patch_size, grid[-1] * patch_size
    config: dict[str, Any] = {
        "patch_size": patch_size,
        "image_size": sides[0] if sides[0] == sides[1] else sides,
        "width": width,
        "depth": 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")),
        "num_heads": num_heads,
        "mlp_hidden": shapes["blocks.0.mlp.w12.weight"][0] // 2 if swiglu else shapes["blocks.0.mlp.fc1.weight"][0],
        "qkv_bias": "qv"
        if "blocks.0.attn.q_bias" in shapes
        else "full"
        if "blocks.0.attn.qkv.bias" in shapes
        else "none",
        "positions": _positions(state_dict.get("backbone.pos_embed")),
        "relative_position": relative_position,
        "final_norm": "norm.weight" in shapes,
    }
    if tubelet:
        config["num_frames"], config["tubelet"] = grid[0] * tubelet[0], tubelet[0]
    if swiglu:
        config["mlp"] = "swiglu"
        config["rope_grid"] = _rope_grid(state_dict) or ROPE_GRID
    if "blocks.0.mlp.norm.weight" in shapes:
        config["sub_norm"] = "mlp_attention" if "blocks.0.attn.norm.weight" in shapes else "mlp"
    if width == POST_NORM_WIDTH:
        config["norm_order"] = "post"
    if "projection.weight" in shapes:
        config["projection"] = shapes["projection.weight"][0]
    if inner != width:
        config["head_width"] = inner // num_heads
    if "blocks.0.gamma_1" in shapes:
        config["layer_scale"] = 1.0
    return config


USUAL_SIZE = 224
"""Pixels of the side of all released models of clips."""


def infer_grid(state_dict: Mapping[str, Tensor]) -> AnyGrid | None:
    """Patch grid by the position tables (openeva's names); None where there are none or the grid is not square.

    Decoupled tables tell the grid whatever its shape; a grid that only the others tell is taken to be square. Of a
    model of clips, time slots come first; they are told where the images have the usual size, or no other fits.
    """
    kernel = state_dict.get("backbone.patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 5:
        positions = state_dict.get("backbone.pos_embed")
        return None if positions is None else clip_grid(positions.shape[1] - 1, kernel.shape[-1])
    for key, tensor in state_dict.items():
        wide = state_dict.get(key.removesuffix("high") + "width")
        if key.endswith("relative_position_bias_for_high") and wide is not None:
            return (tensor.shape[0] - 2) // 2, (wide.shape[0] - 2) // 2
    if (positions := state_dict.get("backbone.pos_embed")) is not None:
        return square_grid(positions.shape[1] - 1)
    for key, tensor in state_dict.items():
        if key.endswith("relative_position_bias_table"):
            return joint_table_grid(tensor.shape[0])
    return None


def grid_of_clips(state_dict: Mapping[str, Tensor], num_frames: int | None) -> AnyGrid | None:
    """As `infer_grid` of a model of clips that have so many frames; None for any other, or where they do not fit."""
    kernel, positions = (state_dict.get(f"backbone.{name}") for name in ("patch_embed.proj.weight", "pos_embed"))
    if num_frames is None or kernel is None or positions is None or kernel.ndim != 5 or num_frames % kernel.shape[2]:
        return None
    return clip_grid(positions.shape[1] - 1, kernel.shape[-1], num_frames // kernel.shape[2])


def clip_grid(num_patches: int, patch_size: int, num_slots: int | None = None) -> AnyGrid | None:
    """(slots, rows, columns) of so many patches of square frames; None where it cannot be told."""
    if num_slots is not None:
        square = None if num_patches % num_slots else square_grid(num_patches // num_slots)
        return None if square is None else (num_slots, *square)
    side = USUAL_SIZE // patch_size
    if num_patches % side**2 == 0 and num_patches >= side**2:
        return num_patches // side**2, side, side
    sides = [side for side in range(1, math.isqrt(num_patches) + 1) if num_patches % side**2 == 0]
    return (num_patches // sides[0] ** 2, sides[0], sides[0]) if len(sides) == 1 else None


def joint_table_grid(rows: int) -> Grid | None:
    """The square grid of a joint relative position table with this many rows, or None."""
    side = math.isqrt(max(rows - NUM_CLS_ROWS, 0))
    return ((side + 1) // 2, (side + 1) // 2) if side % 2 and side * side == rows - NUM_CLS_ROWS else None


def _rename(state_dict: Mapping[str, Tensor], names: Names) -> StateDict:
    if names == "openeva":
        return dict(state_dict)
    if is_clip(state_dict):
        return from_clip(state_dict)
    return from_timm(state_dict) if names == "timm" else from_official(state_dict)


def _relative_position(shapes: Mapping[str, Any]) -> str:
    kinds = {
        "shared": "relative_position.relative_position_bias_table",
        "per_block": "blocks.0.attn.position_bias.relative_position_bias_table",
        "shared_decoupled": "relative_position.relative_position_bias_for_high",
        "per_block_decoupled": "blocks.0.attn.position_bias.relative_position_bias_for_high",
    }
    return next((kind for kind, key in kinds.items() if key in shapes), "none")


def _rope_grid(state_dict: Mapping[str, Tensor]) -> int | None:
    """Pre-training grid by the stored rotary tables: by the last row's angle at the lowest frequency.

    Older tables have axes for rows and columns of patches, newer ones have one for both and are of square grids.
    """
    cos, sin = (state_dict.get(f"backbone.rope.freqs_{name}") for name in ("cos", "sin"))
    if cos is None or sin is None:
        return None
    cos_NK, sin_NK = cos.flatten(0, -2).float(), sin.flatten(0, -2).float()
    length, half = math.isqrt(len(cos_NK)), cos_NK.shape[1] // 2
    if length < MIN_ROPE_LENGTH:
        return None
    patch = (length - 1) * length
    angle = math.atan2(sin_NK[patch, half - 1].item(), cos_NK[patch, half - 1].item())
    return round(angle * THETA ** (1 - 2 / half) * length / (length - 1))


def _num_heads(shapes: Mapping[str, Any], width: int, inner: int) -> int:
    tables = [shape for key, shape in shapes.items() if "relative_position_bias_" in key]
    if tables:
        return tables[0][1]
    if "rope.freqs_cos" in shapes:
        return inner // shapes["rope.freqs_cos"][-1]
    if inner == width and width in NUM_HEADS_OF_WIDTH:
        return NUM_HEADS_OF_WIDTH[width]
    if inner % HEAD_WIDTH:
        raise ValueError(
            f"the number of heads cannot be told: {inner} channels of q are not a multiple of {HEAD_WIDTH}; "
            "pass num_heads"
        )
    return inner // HEAD_WIDTH


def _positions(pos_1SD: Tensor | None) -> str:
    """Kind of absolute positions; the cls row of the fixed table is exactly zero, a learned one is not."""
    if pos_1SD is None:
        return "none"
    return "sincos" if not pos_1SD[:, 0].any() else "learned"
