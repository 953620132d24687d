"""Names of timm's `Eva` (EVA-g, EVA-02) and `VisionTransformer` (EVA-L, any plain ViT) <-> names of openeva.

timm kept most official names of fine-tuned models; its `VisionTransformer` only names layer scale differently, its
EVA-02 the layers of the MLP, the norms inside MLP and attention, and the biases of separate q and v. timm has neither
the mask token nor the prediction head nor a relative position bias in these classes.

A model that takes what `to_timm` returns for a pre-trained student, with its final norm over all tokens:
`timm.create_model("eva_giant_patch14_224", num_classes=0, global_pool="")`.

Source: spec section 5.2 of EVA-02, `timm/models/eva.py` and `timm/models/vision_transformer.py` of timm 1.0.31.
Deliberate difference: timm's own converter moves `norm` to `fc_norm`; here it stays `norm`.
"""

from collections.abc import Mapping

from torch import Tensor

from openeva.checkpoints.files import StateDict
from openeva.checkpoints.official import Rules, from_official, rename, to_official

_FROM_TIMM: Rules = (
    (r"\.ls([12])\.gamma$", r".gamma_\1"),
    (r"\.attn\.([qv])_proj\.bias$", r".attn.\1_bias"),
    (r"\.attn\.norm\.", ".attn.inner_attn_ln."),
    (r"\.mlp\.norm\.", ".mlp.ffn_ln."),
    (r"\.mlp\.fc1_g\.", ".mlp.w1."),
    (r"\.mlp\.fc1_x\.", ".mlp.w2."),
)
"""Names that only timm has -> official ones."""

_FROM_TIMM_SWIGLU: Rules = (*_FROM_TIMM, (r"\.mlp\.fc1\.", ".mlp.w12."), (r"\.mlp\.fc2\.", ".mlp.w3."))

_TO_TIMM: Rules = (
    (r"\.attn\.inner_attn_ln\.", ".attn.norm."),
    (r"\.mlp\.ffn_ln\.", ".mlp.norm."),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)

DROPPED = {
    "backbone.mask_token": "timm's model has no mask token",
    "head.": "timm's model has no prediction head",
    "decoder.": "timm's model has no decoder",
    "text.": "timm's model is the image tower alone",
    "logit_scale": "timm's model is the image tower alone",
    "logit_bias": "timm's model is the image tower alone",
}
"""Start of an openeva name -> why timm's model cannot hold it."""


def is_timm(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether names are used that only timm has; without them, timm's names are the official ones."""
    return any(rename(key, _FROM_TIMM) != key for key in state_dict) or _is_packed(state_dict)


def from_timm(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Give the weights of timm's `Eva` or `VisionTransformer` openeva's names."""
    swiglu = _is_packed(state_dict) or any(".mlp.fc1_g." in key for key in state_dict)
    rules = _FROM_TIMM_SWIGLU if swiglu else _FROM_TIMM
    return from_official({rename(key, rules): tensor for key, tensor in state_dict.items()})


def _is_packed(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether `fc1` makes gate and value at once: it then has twice as many rows as `fc2` has columns."""
    first, second = (state_dict.get(f"blocks.0.mlp.{layer}.weight") for layer in ("fc1", "fc2"))
    return first is not None and second is not None and first.shape[0] == 2 * second.shape[1]


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
    rules = _TO_TIMM
    if any(key.endswith("attn.qkv.bias") for key in names):
        rules = (*rules, (r"\.gamma_([12])$", r".ls\1.gamma"))
    if any(key.endswith("attn.q_proj.weight") for key in names):
        rules = (*rules, (r"\.attn\.([qv])_bias$", r".attn.\1_proj.bias"))
    return {rename(key, rules): tensor for key, tensor in names.items()}, dropped
