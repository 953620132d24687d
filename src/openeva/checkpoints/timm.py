"""Names of timm's `Eva` (EVA-g) and `VisionTransformer` (EVA-L, any plain ViT) <-> names of openeva.

timm kept the official names of fine-tuned models; its `VisionTransformer` only names layer scale differently. timm has
neither the mask token nor the prediction head nor a relative position bias in these classes.

A model that takes what `to_timm` returns for a pre-trained student, with its final norm over all tokens:
`timm.create_model("eva_giant_patch14_224", num_classes=0, global_pool="")`.

Source: `timm/models/eva.py` and `timm/models/vision_transformer.py` of timm 1.0.31. Deliberate difference: timm's own
converter moves `norm` to `fc_norm`; here it stays `norm`.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from openeva.checkpoints.files import StateDict
from openeva.checkpoints.official import from_official, to_official

_LAYER_SCALE = re.compile(r"\.ls([12])\.gamma$")
_LAYER_SCALE_OPENEVA = re.compile(r"\.gamma_([12])$")

DROPPED = {
    "backbone.mask_token": "timm's model has no mask token",
    "head.": "timm's model has no prediction head",
    "decoder.": "timm's model has no decoder",
}
"""Start of an openeva name -> why timm's model cannot hold it."""


def is_timm(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether names are used that only timm has; without them, timm's names are the official ones."""
    return any(_LAYER_SCALE.search(key) for key in state_dict)


def from_timm(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Give the weights of timm's `Eva` or `VisionTransformer` openeva's names."""
    return from_official({_LAYER_SCALE.sub(r".gamma_\1", key): tensor for key, tensor in state_dict.items()})


def to_timm(state_dict: Mapping[str, Tensor]) -> tuple[StateDict, dict[str, str]]:
    """Give weights timm's names: of its `VisionTransformer` where qkv has one full bias, else of its `Eva`.

    Returns:
        The weights, and what timm's model has no place for: openeva's name -> reason.

    Raises:
        ValueError: The model has relative positions; without them it would compute something else.
    """
    relative = [key for key in state_dict if "relative_position" in key]
    if relative:
        raise ValueError(
            f"timm's Eva and VisionTransformer have no relative position bias, but the weights hold {relative[0]}"
            + (f" and {len(relative) - 1} more" if len(relative) > 1 else "")
            + "; convert to 'official' instead"
        )
    dropped = {key: why for key in state_dict for start, why in DROPPED.items() if key.startswith(start)}
    names = to_official({key: tensor for key, tensor in state_dict.items() if key not in dropped})
    if any(key.endswith("attn.qkv.bias") for key in names):
        names = {_LAYER_SCALE_OPENEVA.sub(r".ls\1.gamma", key): tensor for key, tensor in names.items()}
    return names, dropped
