"""Names of the official EVA-01 and EVA-02 files <-> names of openeva. No number changes, nothing is lost.

`lm_head.weight` <-> `head.weight`, `blocks.0.attn.q_bias` <-> `backbone.blocks.0.attn.q_bias`, ...

Only one thing is more than renaming: official models with sub-LN (`mlp.ffn_ln`: base and large EVA-02) store q, k and
v, and gate and value of SwiGLU, as matrices of their own. They are stacked on reading and divided again on writing.

openeva's parts: `backbone` (the transformer; `backbone.projection`, the `head` of a CLIP tower, is told from a
classifier in `clip.py`), `head` (prediction of teacher features), `fc_norm` and `classifier` (the
official `fc_norm` and `head` of fine-tuned models), `decoder` (the official `decoder_*` of MAE-style pre-training, with
its mask token).

The rotary tables of EVA-02 (`rope.freqs_cos`, the same again in every block) are computed from the grid and not read;
`rope_buffers` computes those of a file, as the official loader wants to find them there.

Source: spec sections 1.8 of EVA-01 and 5.1 of EVA-02.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openeva.checkpoints.files import StateDict
from openeva.layers.rope import rope_angles

Rules = tuple[tuple[str, str], ...]
"""(pattern, replacement); the first pattern that matches a name is applied."""

_TO_OPENEVA: Rules = (
    (r"^lm_head\.", "head."),
    (r"^head\.", "classifier."),
    (r"^fc_norm\.", "fc_norm."),
    (r"^decoder_", "decoder."),
    (r"^rel_pos_bias\.", "backbone.relative_position."),
    (r"^(blocks\.\d+\.attn\.)(?:rel_pos_bias\.)?relative_position_", r"backbone.\1position_bias.relative_position_"),
    (r"^(blocks\.\d+\.attn\.)inner_attn_ln\.", r"backbone.\1norm."),
    (r"^(blocks\.\d+\.mlp\.)ffn_ln\.", r"backbone.\1norm."),
    (r"^", "backbone."),
)

_TO_OFFICIAL: Rules = (
    (r"^head\.", "lm_head."),
    (r"^classifier\.", "head."),
    (r"^decoder\.mask_token$", "mask_token"),
    (r"^decoder\.", "decoder_"),
    (r"^backbone\.projection\.", "head."),
    (r"^backbone\.relative_position\.", "rel_pos_bias."),
    (r"^backbone\.(blocks\.\d+\.attn\.)position_bias\.(relative_position_(?:bias_table|index))$", r"\1\2"),
    (r"^backbone\.(blocks\.\d+\.attn\.)position_bias\.", r"\1rel_pos_bias."),
    (r"^backbone\.(blocks\.\d+\.attn\.)norm\.", r"\1inner_attn_ln."),
    (r"^backbone\.(blocks\.\d+\.mlp\.)norm\.", r"\1ffn_ln."),
    (r"^backbone\.", ""),
)

_STACKED = {
    "attn.qkv.weight": ("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"),
    "mlp.w12.weight": ("mlp.w1.weight", "mlp.w2.weight"),
    "mlp.w12.bias": ("mlp.w1.bias", "mlp.w2.bias"),
}
"""Within a block: one matrix (or bias) -> official ones where there is sub-LN, in the order of their rows."""

_SUB_NORM = ".mlp.ffn_ln."


def from_official(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Give the weights of an official file (or of timm's `Eva`, which kept the names) openeva's names."""
    rules = _TO_OPENEVA
    if "decoder_embed.weight" in state_dict:  # MAE-style: the mask token belongs to the decoder and has its width
        rules = ((r"^mask_token$", "decoder.mask_token"), *rules)
    return {rename(key, rules): tensor for key, tensor in _stack(state_dict).items()}


def to_official(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Give weights with openeva's names the official ones."""
    renamed = {official_name(key): tensor for key, tensor in state_dict.items()}
    return _unstack(renamed) if any(_SUB_NORM in key for key in renamed) else renamed


def official_name(key: str) -> str:
    """The official name of one of openeva's weights."""
    return rename(key, _TO_OFFICIAL)


def rope_buffers(backbone: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> StateDict:
    """The rotary tables that an official file of EVA-02 stores: one of the model, and a copy in every block.

    Args:
        backbone: Config of the transformer: `rope_grid`, `image_size`, `patch_size`, `width`, `num_heads`, `depth`.
        dtype: Of the file's weights.
    """
    if not backbone.get("rope_grid"):
        return {}
    size, patch_size = backbone["image_size"], backbone["patch_size"]
    height, width = (size, size) if isinstance(size, int) else size
    head_width = backbone.get("head_width") or backbone["width"] // backbone["num_heads"]
    angle_NP = rope_angles((height // patch_size, width // patch_size), head_width, backbone["rope_grid"])
    angle_NK = angle_NP.repeat_interleave(2, dim=1)
    modules = ["rope", *(f"blocks.{number}.attn.rope" for number in range(backbone["depth"]))]
    return {
        f"{module}.freqs_{name}": table.to(dtype).clone()
        for module in modules
        for name, table in (("cos", angle_NK.cos()), ("sin", angle_NK.sin()))
    }


def _stack(state_dict: Mapping[str, Tensor]) -> StateDict:
    """One matrix from several where the file holds all of them; it comes in the place of the first."""
    result: StateDict = {}
    for key, tensor in state_dict.items():
        block, name = _in_block(key)
        whole = next((whole for whole, parts in _STACKED.items() if name in parts), None)
        parts = [block + part for part in _STACKED.get(whole or "", ())]
        if whole is None or not all(part in state_dict for part in parts):
            result[key] = tensor
        elif key == parts[0]:
            result[block + whole] = torch.cat([state_dict[part] for part in parts])
    return result


def _unstack(state_dict: Mapping[str, Tensor]) -> StateDict:
    result: StateDict = {}
    for key, tensor in state_dict.items():
        block, name = _in_block(key)
        parts = _STACKED.get(name, ())
        # copies: tensors that share memory cannot be saved, or are saved whole
        matrices = [matrix.clone() for matrix in tensor.chunk(len(parts))] if parts else [tensor]
        result |= zip([block + part for part in parts] or [key], matrices, strict=True)
    return result


def _in_block(key: str) -> tuple[str, str]:
    """("blocks.0.", "attn.qkv.weight") of an official name; what is in no block has no first part."""
    match = re.match(r"(blocks\.\d+\.)?(.*)", key)
    assert match
    return match[1] or "", match[2]


def rename(key: str, rules: Rules) -> str:
    """A name after the first rule that matches it."""
    for pattern, replacement in rules:
        renamed, count = re.subn(pattern, replacement, key, count=1)
        if count:
            return renamed
    return key
