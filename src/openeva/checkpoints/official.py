"""Names of the official EVA-01 files <-> names of openeva. Pure renaming: no tensor changes, nothing is lost.

`lm_head.weight` <-> `head.weight`, `blocks.0.attn.q_bias` <-> `backbone.blocks.0.attn.q_bias`, ...

openeva's parts: `backbone` (the transformer), `head` (prediction of teacher features), `fc_norm` and `classifier` (the
official `fc_norm` and `head` of fine-tuned models), `decoder` (the official `decoder_*` of MAE-style pre-training, with
its mask token).

Source: spec section 1.8.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from openeva.checkpoints.files import StateDict

Rules = tuple[tuple[str, str], ...]
"""(pattern, replacement); the first pattern that matches a name is applied."""

_TO_OPENEVA: Rules = (
    (r"^lm_head\.", "head."),
    (r"^head\.", "classifier."),
    (r"^fc_norm\.", "fc_norm."),
    (r"^decoder_", "decoder."),
    (r"^rel_pos_bias\.", "backbone.relative_position."),
    (r"^(blocks\.\d+\.attn\.)(?:rel_pos_bias\.)?relative_position_", r"backbone.\1position_bias.relative_position_"),
    (r"^", "backbone."),
)

_TO_OFFICIAL: Rules = (
    (r"^head\.", "lm_head."),
    (r"^classifier\.", "head."),
    (r"^decoder\.mask_token$", "mask_token"),
    (r"^decoder\.", "decoder_"),
    (r"^backbone\.relative_position\.", "rel_pos_bias."),
    (r"^backbone\.(blocks\.\d+\.attn\.)position_bias\.(relative_position_(?:bias_table|index))$", r"\1\2"),
    (r"^backbone\.(blocks\.\d+\.attn\.)position_bias\.", r"\1rel_pos_bias."),
    (r"^backbone\.", ""),
)


def from_official(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Give the weights of an official file (or of timm's `Eva`, which kept the names) openeva's names."""
    rules = _TO_OPENEVA
    if "decoder_embed.weight" in state_dict:  # MAE-style: the mask token belongs to the decoder and has its width
        rules = ((r"^mask_token$", "decoder.mask_token"), *rules)
    return {_rename(key, rules): tensor for key, tensor in state_dict.items()}


def to_official(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Give weights with openeva's names the official ones."""
    return {official_name(key): tensor for key, tensor in state_dict.items()}


def official_name(key: str) -> str:
    """The official name of one of openeva's weights."""
    return _rename(key, _TO_OFFICIAL)


def _rename(key: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        renamed, count = re.subn(pattern, replacement, key, count=1)
        if count:
            return renamed
    return key
