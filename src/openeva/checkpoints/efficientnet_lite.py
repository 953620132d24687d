"""EfficientNet-Lite weights under the names of the EfficientNet-PyTorch family -> timm's `tf_efficientnet_lite*` names.

`_blocks.7._depthwise_conv.weight` -> `blocks.3.2.conv_dw.weight`: flat block numbers become (stage, block), and a
block's norms are counted from its first convolution, where blocks without expansion lack one.
"""

import re

from torch import Tensor

STAGE_OUTER = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
INVERTED_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
SEPARABLE_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}

_BLOCK_KEY = re.compile(r"_blocks\.(\d+)\.(\w+)\.(.+)")


def is_efficientnet_lite(state_dict: dict[str, Tensor]) -> bool:
    """Whether these are weights under the foreign names that `convert_efficientnet_lite` reads."""
    return "_conv_stem.weight" in state_dict and "_blocks.0._depthwise_conv.weight" in state_dict


def convert_efficientnet_lite(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict under timm's names, with the same tensors.

    Raises:
        ValueError: A name that does not belong to this family.
    """
    place = _stage_of_block(state_dict)
    converted: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        if match := _BLOCK_KEY.fullmatch(key):
            number, part, rest = int(match[1]), match[2], match[3]
            expands = f"_blocks.{number}._expand_conv.weight" in state_dict
            names, prefix = INVERTED_BLOCK if expands else SEPARABLE_BLOCK, "blocks.{}.{}.".format(*place[number])
        else:
            (part, _, rest), names, prefix = key.partition("."), STAGE_OUTER, ""
        if part not in names:
            raise ValueError(f"{key!r} is not a name of an EfficientNet-Lite state dict; is this another architecture?")
        converted[f"{prefix}{names[part]}.{rest}"] = tensor
    return converted


def _stage_of_block(state_dict: dict[str, Tensor]) -> dict[int, tuple[int, int]]:
    """Flat block number -> (stage, block in stage); a stage starts where the number of output channels changes."""
    place: dict[int, tuple[int, int]] = {}
    stage, block, width = -1, 0, -1
    number = 0
    while (project := state_dict.get(f"_blocks.{number}._project_conv.weight")) is not None:
        stage, block = (stage + 1, 0) if project.shape[0] != width else (stage, block + 1)
        width = project.shape[0]
        place[number] = (stage, block)
        number += 1
    return place
