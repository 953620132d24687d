"""Parameter groups, AdamW, LARS and LAMB.

Source: spec sections 5.1 and 5.2; of EVA-CLIP section 2.3. No decay for parameters of one axis or none, names that end
in `.bias`, and the model's own list; with layer decay, each group's learning rate (and so its weight decay) is
scaled by `decay ** (L + 1 - layer)`. Towers, of image and text, may each have rate and decays of their own.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from openeva.config import Config, ConfigError, Duration
from openeva.engine.lamb import Lamb, Rule
from openeva.engine.lars import Lars
from openeva.engine.schedule import Schedule, Shape, WarmupFrom


class TowerConfig(Config):
    """What a tower of a model has of its own; what is left out is the whole model's."""

    lr: float | None = Field(None, ge=0, description="peak learning rate; follows the schedule of optim.lr")
    layer_decay: float | None = Field(
        None, gt=0, le=1, description="factor on the learning rate per layer from the top"
    )
    weight_decay: float | None = Field(None, ge=0, description="follows the schedule of optim.weight_decay")


@dataclass(frozen=True)
class TowerLayout:
    """Where a tower's parameters are.

    Attributes:
        prefix: That all its names begin with, with the dot.
        num_layers: L, number of its blocks.
        no_decay: Names below the prefix that do not decay although they have several axes.
        also: Prefixes of what stands on the tower, outside it.
    """

    prefix: str
    num_layers: int
    no_decay: frozenset[str]
    also: tuple[str, ...] = ()

    def holds(self, name: str) -> bool:
        """Whether a parameter belongs to it."""
        return name.startswith((self.prefix, *self.also))


class OptimConfig(Config):
    """Optimizer and its schedules; the defaults are EVA's pre-training recipe."""

    name: Literal["adamw", "lars", "lamb", "nvlamb"] = Field(
        "adamw",
        description="lars: large-batch SGD, for linear probes; lamb: large-batch Adam, for CLIP (nvlamb: its variant"
        " that scales only the steps of decayed tensors)",
    )
    lr: float = Field(1e-3, ge=0, description="peak learning rate, not scaled by batch size")
    min_lr: float = Field(1e-5, ge=0, description="the learning rate that the decay approaches")
    warmup: Duration = Field(Duration(2, "epochs"), description="linear rise")
    warmup_from: WarmupFrom = Field(
        "zero",
        description="rate of step 0: zero, or (first_step, as CLIP counts) what each step of the warm-up adds;"
        " zero_before (video): zero, and the peak one step after the warm-up",
    )
    schedule: Shape = "cosine"
    betas: tuple[float, float] = Field((0.9, 0.98), description="of AdamW and LAMB")
    eps: float = Field(1e-6, gt=0, description="of AdamW and LAMB")
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
    towers: dict[Literal["image", "text"], TowerConfig] = Field(
        {}, description="rate, layer decay and weight decay of each tower of a CLIP, as in {text: {lr: 4.0e-5}}"
    )

    @model_validator(mode="after")
    def _towers_follow_a_schedule(self) -> "OptimConfig":
        for name, tower in self.towers.items():
            for key in ("lr", "weight_decay"):
                if getattr(tower, key) and not getattr(self, key):
                    raise ValueError(
                        f"towers.{name}.{key} follows the schedule of {key}, which is 0; set {key} above 0"
                    )
        return self

    def schedules(self, total_steps: int, warmup_steps: int) -> tuple[Schedule, Schedule]:
        """The schedules of learning rate and weight decay."""
        end = self.weight_decay if self.weight_decay_end is None else self.weight_decay_end
        return (
            Schedule(self.lr, self.min_lr, total_steps, warmup_steps, self.schedule, self.warmup_from),
            Schedule(self.weight_decay, end, total_steps),
        )


def check_towers(config: OptimConfig, towers: Mapping[str, TowerLayout]) -> None:
    """Whether a task has the towers that the recipe speaks of.

    Raises:
        ConfigError: It has not.
    """
    has = f"it has {', '.join(towers)}" if towers else "it has none: optim.lr and optim.layer_decay are for all of it"
    problems = [f"optim.towers: the task has no tower {name} ({has})" for name in config.towers if name not in towers]
    if problems:
        raise ConfigError(problems)


def layer_of(name: str, num_layers: int, prefix: str = "backbone.") -> int:
    """Layer id of a parameter: 0 for what makes the tokens, i + 1 for block i, L + 1 for everything after."""
    name = name.removeprefix(prefix)
    if name in _TOKENS or name.startswith(("patch_embed.", "token_embedding.")):
        return 0
    block = re.match(r"(?:transformer\.res)?blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else num_layers + 1


_TOKENS = {"cls_token", "mask_token", "pos_embed", "positional_embedding"}


def param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    no_decay: Collection[str],
    layer_decay: float = 1.0,
    num_layers: int = 0,
    prefix: str = "backbone.",
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer; each carries `lr_scale`, which the loop multiplies into the scheduled rate.

    Args:
        named_parameters: Frozen ones are left out.
        weight_decay: Decay of the groups that decay.
        no_decay: Names (without the prefix) that do not decay although they have several axes.
        layer_decay: See the module's text; 1 puts all layers into the same groups.
        num_layers: L, number of blocks.
        prefix: Of the names of blocks and of those that do not decay.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, num_layers, prefix) if layer_decay < 1 else num_layers + 1
        decays = not (parameter.ndim <= 1 or name.endswith(".bias") or name.removeprefix(prefix) in no_decay)
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


def tower_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, towers: Mapping[str, TowerLayout]
) -> list[dict[str, Any]]:
    """Groups of each tower, then those of what belongs to none (the temperature): `config.lr`, no layer decay.

    They carry `decay_scale` as well, which the loop multiplies into the scheduled weight decay.

    Raises:
        ConfigError: The recipe speaks of towers that are not there.
        ValueError: Layer decay is asked for a tower whose layers are not known by name.
    """
    check_towers(config, towers)
    left, groups = list(named_parameters), []
    settings: dict[str, TowerConfig] = {str(name): tower for name, tower in config.towers.items()}
    for tower, layout in towers.items():
        own = settings.get(tower, TowerConfig())
        part = [(name, parameter) for name, parameter in left if layout.holds(name)]
        left = [(name, parameter) for name, parameter in left if not layout.holds(name)]
        layer_decay = config.layer_decay if own.layer_decay is None else own.layer_decay
        new = param_groups(
            part, weight_decay=config.weight_decay if own.weight_decay is None else own.weight_decay,
            no_decay=layout.no_decay, layer_decay=layer_decay, num_layers=layout.num_layers, prefix=layout.prefix,
        )  # fmt: skip
        _check_layers(new, layer_decay, layout.prefix, layout.num_layers)
        for group in new:
            group["lr_scale"] *= _share(own.lr, config.lr)
            group["decay_scale"] = _share(own.weight_decay, config.weight_decay)
        groups += new
    rest = param_groups(left, weight_decay=config.weight_decay, no_decay=())
    return groups + [{**group, "decay_scale": 1.0} for group in rest]


def _share(value: float | None, whole: float) -> float:
    return 1.0 if value is None or not whole else value / whole


def _check_layers(groups: list[dict[str, Any]], layer_decay: float, prefix: str, num_layers: int) -> None:
    names = [name for group in groups for name in group["names"]]
    nameless = any(name.startswith(prefix) for name in names) and all(g["layer"] > num_layers for g in groups)
    if layer_decay < 1 and nameless:
        raise ValueError(
            "optim.layer_decay goes by the transformer's own names (blocks.0, ...), which this backbone does not have;"
            " set it to 1, or use backbone: {name: vit, ...}"
        )


def build_optimizer(
    module: nn.Module,
    config: OptimConfig,
    *,
    no_decay: Collection[str],
    num_layers: int,
    towers: Mapping[str, TowerLayout] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of a recipe over the module's parameters.

    Args:
        module: Without wrappers.
        config: The recipe's.
        no_decay: See `param_groups`; where there are towers, those say it.
        num_layers: The same.
        towers: Where the towers are, of a task that has them.

    Raises:
        ConfigError: The recipe speaks of towers that are not there.
        ValueError: Nothing learns, or layer decay is asked for a backbone whose layers are not known by name.
    """
    if towers or config.towers:
        groups = tower_groups(module.named_parameters(), config, towers or {})
    else:
        groups = _groups(module, config, no_decay, num_layers)
    groups = _checked(groups)
    if config.name == "lars":
        return Lars(groups, config.lr, momentum=config.momentum, trust_coefficient=config.trust_coefficient)
    if config.name in {"lamb", "nvlamb"}:
        rule: Rule = "nvlamb" if config.name == "nvlamb" else "deepspeed"
        return Lamb(groups, config.lr, betas=config.betas, eps=config.eps, rule=rule)
    return _adamw(groups, config)


def adamw(module: nn.Module, config: OptimConfig, *, no_decay: Collection[str], num_layers: int) -> torch.optim.AdamW:
    """Fused AdamW over the module's parameters.

    Raises:
        ValueError: As `build_optimizer`.
    """
    return _adamw(_checked(_groups(module, config, no_decay, num_layers)), config)


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    # lr as a float is fine for the fused kernel, which takes the found_inf flag of a skipped step as well
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _groups(module: nn.Module, config: OptimConfig, no_decay: Collection[str], num_layers: int) -> list[dict[str, Any]]:
    groups = param_groups(
        module.named_parameters(),
        weight_decay=config.weight_decay,
        no_decay=no_decay,
        layer_decay=config.layer_decay,
        num_layers=num_layers,
    )
    _check_layers(groups, config.layer_decay, "backbone.", num_layers)
    return groups


def _checked(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not groups:
        raise ValueError("nothing learns: every parameter of the model is frozen")
    for group in groups:
        del group["names"]  # DDP and FSDP rename parameters; checkpoints go by the module's own names
    return groups
