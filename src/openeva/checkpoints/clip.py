"""Names of CLIP files <-> names of openeva: the official EVA-CLIP layouts and open_clip's.

`visual.blocks.0...`, `text.transformer...`, `logit_scale` <-> `backbone.blocks.0...`, `text.transformer...`

An image tower is named as `official.py` or `timm.py` say, under `visual.` in official files and `visual.trunk.` in
open_clip's; its `head` is the projection to the joint space, not a classifier. The text tower has the same names
everywhere, under `text.` or, in the flat layout that OpenAI's CLIP began, under nothing. `logit_scale` is a scalar,
which EVA-01's code keeps in the text tower. What a file does is its style, so that it can be written again.

Source: spec sections 1.1 and 5 of EVA-CLIP.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from openeva.checkpoints.files import StateDict
from openeva.checkpoints.official import from_official, to_official
from openeva.checkpoints.timm import from_timm, to_timm

Place = Literal["", "/flat", "/scale_in_text", "/image_only"]
"""Where the text tower or `logit_scale` is, if not under `text.` and at the top; or that there is none."""
STYLES = tuple(family + place for family in ("official", "open_clip") for place in get_args(Place))
"""Whose names the image tower has, and the place of the rest."""

IMAGE, TRUNK, TEXT = "visual.", "visual.trunk.", "text."
PROJECTION = "backbone.projection."
SCALARS = ("logit_scale", "logit_bias")
"""Vectors of one here, scalars in files for others."""

_TEXT_MODULES = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")
"""What the text tower is made of; in the flat layout these stand at the top."""

TEXT_HEAD_WIDTH = 64
"""Head width of the text towers of all released CLIPs."""


def is_clip(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether these are names of a CLIP of others (openeva's own begin with `backbone.`)."""
    return any(key.startswith(IMAGE) for key in state_dict)


def holds_text(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether weights with openeva's names hold a text tower."""
    return any(key.startswith(TEXT) for key in state_dict)


def style_of(state_dict: Mapping[str, Tensor]) -> str:
    """The style of a CLIP file, one of `STYLES`."""
    family = "open_clip" if any(key.startswith(TRUNK) for key in state_dict) else "official"
    place: Place = "" if holds_text(state_dict) else "/image_only"
    if any(_is_flat(key) for key in state_dict):
        place = "/flat"
    elif f"{TEXT}logit_scale" in state_dict:
        place = "/scale_in_text"
    return family + place


def from_clip(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Give the weights of a CLIP file of any style openeva's names."""
    trunk = any(key.startswith(TRUNK) for key in state_dict)
    prefix = TRUNK if trunk else IMAGE
    image = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    result = as_projection(from_timm(image) if trunk else from_official(image))
    for key, tensor in state_dict.items():
        name = key.removeprefix(TEXT)
        if name in SCALARS:
            result[name] = tensor.reshape(1)
        elif not key.startswith(prefix):
            result[TEXT + key if _is_flat(key) else key] = tensor
    return result


def as_projection(state_dict: Mapping[str, Tensor]) -> StateDict:
    """What official names call a `head` is a CLIP tower's projection."""
    return {
        PROJECTION + key.removeprefix("classifier.") if key.startswith("classifier.") else key: tensor
        for key, tensor in state_dict.items()
    }


def to_clip(state_dict: Mapping[str, Tensor], style: str = "official") -> StateDict:
    """Give weights with openeva's names those of a CLIP file of a style of `STYLES`.

    Raises:
        ValueError: They hold no text tower, or something that the layout has no place for.
    """
    family, _, place = style.partition("/")
    if not holds_text(state_dict) and place != "image_only":
        raise ValueError("these weights hold no text tower, so they are no CLIP; convert to 'official' or 'timm'")
    image = {key: tensor for key, tensor in state_dict.items() if key.startswith("backbone.")}
    if family == "open_clip":
        prefix, (tower, dropped) = TRUNK, to_timm(image)
        if not any(key.startswith(PROJECTION) for key in image) or dropped:
            text = (
                f"no place for {', '.join(dropped)}" if dropped else "a projection in the image tower, which lacks one"
            )
            raise ValueError(f"open_clip's models have {text}; convert to 'official' instead")
    else:
        prefix, tower = IMAGE, to_official(image)
    result = {prefix + key: tensor for key, tensor in tower.items()}
    for key, tensor in state_dict.items():
        if key in SCALARS:
            result[TEXT + key if place == "scale_in_text" else key] = tensor.reshape(())
        elif key not in image:
            result[key.removeprefix(TEXT) if place == "flat" else key] = tensor
    return result


def to_official_file(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Official names of any weights with openeva's: those of a CLIP where there is a text tower."""
    return to_clip(state_dict) if holds_text(state_dict) else to_official(state_dict)


def infer_text_config(state_dict: Mapping[str, Tensor], *, num_heads: int | None = None) -> dict[str, Any]:
    """Read a text tower off the shapes, as keyword arguments for `TextConfig`.

    Args:
        state_dict: Weights with openeva's names.
        num_heads: Heads, where they are not of 64 channels; no shape tells.

    Raises:
        ValueError: Tensors are missing, or the number of heads cannot be told.
    """
    needed = [TEXT + name for name in ("token_embedding.weight", "positional_embedding", "text_projection")]
    missing = [key for key in needed if key not in state_dict]
    if missing:
        raise ValueError(f"the text tower lacks {', '.join(missing)}")
    vocab_size, width = state_dict[needed[0]].shape
    if num_heads is None and width % TEXT_HEAD_WIDTH:
        raise ValueError(
            f"the number of the text tower's heads cannot be told: its width of {width} is not a multiple of "
            f"{TEXT_HEAD_WIDTH}; pass text_heads"
        )
    num_heads = num_heads or width // TEXT_HEAD_WIDTH
    if width % num_heads:
        raise ValueError(
            f"{num_heads} heads do not divide the text tower's width of {width}; pass the right text_heads"
        )
    numbers = {int(key.split(".")[3]) for key in state_dict if key.startswith(f"{TEXT}transformer.resblocks.")}
    return {
        "context_length": state_dict[needed[1]].shape[0],
        "vocab_size": vocab_size,
        "width": width,
        "num_heads": num_heads,
        "depth": len(numbers),
    }


def text_of(state_dict: Mapping[str, Tensor]) -> StateDict:
    """The text tower of a file in any layout, with openeva's names; empty where there is none.

    Layouts: under `text.`, flat (OpenAI's CLIP), and that of transformers' CLIP.
    """
    if any(key.startswith("text_model.") for key in state_dict):
        return _from_transformers(state_dict)
    names = {key: key if key.startswith(TEXT) else TEXT + key for key in state_dict if _is_text(key)}
    return {name: state_dict[key] for key, name in names.items()}


def _is_flat(key: str) -> bool:
    return key.split(".", 1)[0] in _TEXT_MODULES


def _is_text(key: str) -> bool:
    """A text tower's weight; `text.logit_scale` and OpenAI's buffers are none."""
    return _is_flat(key) or (key.startswith(TEXT) and key.removeprefix(TEXT) not in (*SCALARS, "attn_mask"))


_TRANSFORMERS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
"""Within a block: transformers' name -> official."""

_TRANSFORMERS_TOP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}


def _from_transformers(state_dict: Mapping[str, Tensor]) -> StateDict:
    """The text tower of transformers' CLIP: q, k and v apart, the projection transposed."""
    result: StateDict = {}
    for key, tensor in state_dict.items():
        block, _, rest = key.removeprefix("text_model.encoder.layers.").partition(".")
        module, _, kind = rest.rpartition(".")
        into = f"{TEXT}transformer.resblocks.{block}."
        if key in _TRANSFORMERS_TOP:
            result[TEXT + _TRANSFORMERS_TOP[key]] = tensor
        elif key == "text_projection.weight":
            result[f"{TEXT}text_projection"] = tensor.T
        elif key.startswith("text_model.encoder.layers.") and module == "self_attn.q_proj":
            qkv = [state_dict.get(key.replace(".q_proj.", f".{name}_proj.")) for name in "qkv"]
            if all(part is not None for part in qkv):  # else what is missing is told by the model
                result[f"{into}attn.in_proj_{kind}"] = torch.cat([part for part in qkv if part is not None])
        elif key.startswith("text_model.encoder.layers.") and module in _TRANSFORMERS:
            result[f"{into}{_TRANSFORMERS[module]}.{kind}"] = tensor
        elif key.startswith("text_model.") and "position_ids" not in key and not module.startswith("self_attn."):
            result[key] = tensor  # nothing that is known: told as surplus
    return result
