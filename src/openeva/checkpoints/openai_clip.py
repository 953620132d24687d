"""Image towers of CLIP in OpenAI's layout: their architecture, read off the shapes of the weights.

state dict with `visual.*` names -> `vision_weights` -> `vision_transformer_arguments` | `resnet_arguments`

Source: spec section 2.1: width = rows of conv1, heads = width / 64, layers = number of in_proj weights, grid = root of
the positions without the class token. open_clip's own towers use the same names.
"""

import math
from typing import Any

from torch import Tensor

HEAD_WIDTH = 64


def vision_weights(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The image tower's weights, which have names under `visual.`, without that prefix."""
    return {key.removeprefix("visual."): tensor for key, tensor in state_dict.items() if key.startswith("visual.")}


def is_openai_layout(weights: dict[str, Tensor]) -> bool:
    """Whether the tower's architecture can be read off its weights: a CLIP vision transformer or CLIP ResNet."""
    return {"conv1.weight", "proj"} <= weights.keys() or "attnpool.c_proj.weight" in weights


def vision_transformer_arguments(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of open_clip's `VisionTransformer` for these weights (the activation is not visible in them)."""
    width, _, _, patch_size = weights["conv1.weight"].shape
    grid = round(math.sqrt(weights["positional_embedding"].shape[0] - 1))
    return {
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "width": width,
        "layers": sum(key.endswith(".attn.in_proj_weight") for key in weights),
        "heads": width // HEAD_WIDTH,
        "mlp_ratio": weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width,
        "output_dim": weights["proj"].shape[1],
    }


def resnet_arguments(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of open_clip's `ModifiedResNet` for these weights."""
    width = weights["layer1.0.conv1.weight"].shape[0]
    blocks = {tuple(key.split(".")[:2]) for key in weights if key.startswith("layer")}
    return {
        "layers": [sum(stage == f"layer{number}" for stage, _ in blocks) for number in (1, 2, 3, 4)],
        "output_dim": weights["attnpool.c_proj.weight"].shape[0],
        "heads": width * 32 // HEAD_WIDTH,
        "image_size": 32 * round(math.sqrt(weights["attnpool.positional_embedding"].shape[0] - 1)),
        "width": width,
    }
