"""Parameter groups, AdamW and LARS.

Source: spec sections 5.1 and 5.2. No decay for 1-D parameters, names that end in `.bias`, and the model's own list;
with layer decay, each group's learning rate and weight decay are scaled by `decay ** (L + 1 - layer)`.
"""

import re
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from openeva.config import Config, Duration
from openeva.engine.lars import Lars
from openeva.engine.schedule import Schedule, Shape


class OptimConfig(Config):
    """Optimizer and its schedules; the defaults are EVA's pre-training recipe."""

    name: Literal["adamw", "lars"] = Field("adamw", description="lars: large-batch SGD, for linear probes")
    lr: float = Field(1e-3, ge=0, description="peak learning rate, not scaled by batch size")
    min_lr: float = Field(1e-5, ge=0, description="the learning rate that the decay approaches")
    warmup: Duration = Field(Duration(2, "epochs"), description="linear rise from 0")
    schedule: Shape = "cosine"
    betas: tuple[float, float] = Field((0.9, 0.98), description="of AdamW")
    eps: float = Field(1e-6, gt=0, description="of AdamW")
    momentum: float = Field(0.9, ge=0, lt=1, description="of LARS")
    trust_coefficient: float = Field(
        0.001, gt=0, description="of LARS: step relative to the weight's norm, per unit of lr"
    )
    weight_decay: float = Field(0.05, ge=0)
    weight_decay_end: float | None = Field(
        None, ge=0, description="end of a cosine schedule of the decay; constant when left out"
    )
    clip_grad: float | None = Field(3.0, gt=0, description="largest norm of the whole gradient; none for no clipping")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="factor on the learning rate per layer from the top; 1 for none"
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of the averaged copy of the weights; none for no copy"
    )

    def schedules(self, total_steps: int, warmup_steps: int) -> tuple[Schedule, Schedule]:
        """The schedules of learning rate and weight decay."""
        end = self.weight_decay if self.weight_decay_end is None else self.weight_decay_end
        return (
            Schedule(self.lr, self.min_lr, total_steps, warmup_steps, self.schedule),
            Schedule(self.weight_decay, end, total_steps),
        )


def layer_of(name: str, num_layers: int) -> int:
    """Layer id of a parameter: 0 for what makes the tokens, i + 1 for block i, L + 1 for everything after."""
    name = name.removeprefix("backbone.")
    if name in {"cls_token", "mask_token", "pos_embed"} or name.startswith("patch_embed."):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else num_layers + 1


def param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    no_decay: set[str],
    layer_decay: float = 1.0,
    num_layers: int = 0,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer; each carries `lr_scale`, which the loop multiplies into the scheduled rate.

    Args:
        named_parameters: Frozen ones are left out.
        weight_decay: Decay of the groups that decay.
        no_decay: Names (without the `backbone.` prefix) that do not decay although they have several axes.
        layer_decay: See the module's text; 1 puts all layers into the same groups.
        num_layers: L, number of blocks.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, num_layers) if layer_decay < 1 else num_layers + 1
        decays = not (parameter.ndim == 1 or name.endswith(".bias") or name.removeprefix("backbone.") in no_decay)
        group = groups.setdefault(
            (layer, decays),
            {
                "params": [],
                "names": [],
                "layer": layer,
                "lr_scale": layer_decay ** (num_layers + 1 - layer),
                "weight_decay": weight_decay if decays else 0.0,
                "decays": decays,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def build_optimizer(
    module: nn.Module, config: OptimConfig, *, no_decay: set[str], num_layers: int
) -> torch.optim.Optimizer:
    """The optimizer of a recipe over the module's parameters.

    Raises:
        ValueError: Nothing learns, or layer decay is asked for a backbone whose layers are not known by name.
    """
    if config.name == "adamw":
        return adamw(module, config, no_decay=no_decay, num_layers=num_layers)
    return Lars(
        _groups(module, config, no_decay, num_layers), config.lr, momentum=config.momentum,
        trust_coefficient=config.trust_coefficient,
    )  # fmt: skip


def adamw(module: nn.Module, config: OptimConfig, *, no_decay: set[str], num_layers: int) -> torch.optim.AdamW:
    """Fused AdamW over the module's parameters.

    Raises:
        ValueError: As `build_optimizer`.
    """
    groups = _groups(module, config, no_decay, num_layers)
    # lr as a float is fine for the fused kernel, which takes the found_inf flag of a skipped step as well
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _groups(module: nn.Module, config: OptimConfig, no_decay: set[str], num_layers: int) -> list[dict[str, Any]]:
    groups = param_groups(
        module.named_parameters(),
        weight_decay=config.weight_decay,
        no_decay=no_decay,
        layer_decay=config.layer_decay,
        num_layers=num_layers,
    )
    if not groups:
        raise ValueError("nothing learns: every parameter of the model is frozen")
    names = [name for group in groups for name in group["names"]]
    nameless = any(n.startswith("backbone.") for n in names) and all(g["layer"] > num_layers for g in groups)
    if config.layer_decay < 1 and nameless:
        raise ValueError(
            "optim.layer_decay goes by the transformer's own names (blocks.0, ...), which this backbone does not have;"
            " set it to 1, or use backbone: {name: vit, ...}"
        )
    for group in groups:
        del group["names"]  # DDP and FSDP rename parameters; checkpoints go by the module's own names
    return groups
