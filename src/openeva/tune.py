"""Which part of a model learns: all of it, its head, its upper blocks, or small adapters; and what is saved then.

recipe key `tune` + task with its initial weights -> `apply_tuning` -> parameters frozen, adapters put in,
`task.trained_part` says what checkpoints and exported models hold

Paper: LoRA (Hu et al. 2021) for `lora`. Source: spec section 6.5: `blocks` is the official `--partial_freeze k`, `head`
is `--freeze_backbone`. Deliberate differences: what is frozen runs without dropout and stochastic depth, and the
official files hold all weights.
"""

import re
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from openeva.checkpoints.adapters import Adapter, adapted_layers, inject, linear_layers, merge, plain_name
from openeva.checkpoints.delta import Base, Delta, TrainedPart, digest_of_model
from openeva.checkpoints.load import LoadReport
from openeva.checkpoints.native import model_path
from openeva.config import Config, ConfigError
from openeva.layers.flops import trace_shapes
from openeva.tasks.base import Task


class TuneAll(Config):
    """Everything learns."""

    mode: Literal["all"] = "all"


class _TunePart(Config):
    also: list[str] = Field(
        [], description="patterns of further parameters of the backbone that learn, such as ['*.norm?.*', '*bias']"
    )
    stochastic: bool = Field(
        False, description="dropout and stochastic depth stay on in frozen parts; off makes their features fixed"
    )
    export: Literal["delta", "merged"] = Field(
        "delta", description="exported models hold only what was trained (delta), or all weights, adapters merged"
    )

    def learns(self, name: str) -> bool:
        """Whether a parameter of the backbone learns."""
        return any(fnmatchcase(name, pattern) for pattern in self.also)

    def check(self, backbone: nn.Module) -> list[str]:
        """What is wrong with these keys for a backbone."""
        names = [name for name, _ in backbone.named_parameters()]
        return [
            f"tune.also: {pattern!r} fits no parameter of the backbone (it has {', '.join(names[:4])}, ...)"
            for pattern in self.also
            if not any(fnmatchcase(name, pattern) for name in names)
        ]


class TuneHead(_TunePart):
    """Only what stands on the backbone learns."""

    mode: Literal["head"]


class TuneBlocks(_TunePart):
    """The upper blocks, the final norm and what stands on the backbone learn."""

    mode: Literal["blocks"]
    first_block: int = Field(ge=0, description="k: embeddings and blocks before this one are frozen")

    def learns(self, name: str) -> bool:
        """Whether a parameter of the backbone learns."""
        block = re.match(r"blocks\.(\d+)\.", name)
        own = int(block[1]) >= self.first_block if block else name.startswith("norm.")
        return own or super().learns(name)

    def check(self, backbone: nn.Module) -> list[str]:
        """What is wrong with these keys for a backbone."""
        num_blocks = len(getattr(backbone, "blocks", []))
        if not num_blocks:
            return [f"tune.mode blocks: {type(backbone).__name__} has no list of blocks; use another mode"]
        if self.first_block > num_blocks:
            return [f"tune.first_block {self.first_block}: the backbone has {num_blocks} blocks"]
        return super().check(backbone)


class _TuneAdapters(_TunePart):
    targets: list[str] = Field(
        ["qkv", "proj"],
        description="linear layers of the backbone by the end of their name (qkv, proj, fc1, fc2, w12, w3), or all",
    )

    def adapter(self, targets: tuple[str, ...]) -> Adapter:
        """For the linear layers of these names."""
        raise NotImplementedError

    def check(self, backbone: nn.Module) -> list[str]:
        """What is wrong with these keys for a backbone."""
        try:
            linear_layers(backbone, self.targets)
        except ValueError as error:
            return [f"tune.targets: {error}"]
        return super().check(backbone)


class TuneLora(_TuneAdapters):
    """Low-rank changes of linear layers, and what stands on the backbone, learn."""

    mode: Literal["lora"]
    rank: int = Field(8, gt=0)
    alpha: float = Field(16.0, gt=0, description="the change is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the input of the low-rank branch")

    def adapter(self, targets: tuple[str, ...]) -> Adapter:
        """LoRA with these keys."""
        return Adapter("LORA", targets, {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout})


class TunePeft(_TuneAdapters):
    """Another adapter of the peft library that can be merged, and what stands on the backbone, learn.

    There is no bottleneck adapter (AdaptFormer and the like) among them: peft has none for plain modules.
    """

    mode: Literal["peft"]
    type: Literal["lora", "ia3", "loha", "lokr", "oft", "hra"] = Field(description="peft's method")
    options: dict[str, Any] = Field(
        {}, description="arguments of its config, such as {r: 8, use_dora: true}; see peft's documentation"
    )

    def adapter(self, targets: tuple[str, ...]) -> Adapter:
        """The chosen method with its options."""
        options = dict(self.options)
        if self.type == "ia3":  # peft wants the very names of the targets that are scaled at their input
            ends = tuple(f".{name}" for name in options.get("feedforward_modules", ()))
            options["feedforward_modules"] = [name for name in targets if f".{name}".endswith(ends)]
        return Adapter(self.type.upper(), targets, options)


Tune = Annotated[TuneAll | TuneHead | TuneBlocks | TuneLora | TunePeft, Field(discriminator="mode")]
"""Field type of a recipe: `tune: {mode: lora, rank: 8}`."""


def apply_tuning(config: Tune, task: Task) -> None:
    """Freeze what does not learn, put adapters in, and note on the task what its files must hold.

    Call it before the task leaves the CPU, is wrapped, and gets an optimizer; its initial weights are in place.

    Raises:
        ConfigError: The keys do not fit the model, or nothing would learn.
    """
    if isinstance(config, TuneAll):
        return
    problems = config.check(task.backbone)
    if problems:
        raise ConfigError(problems)
    loaded = _loaded(task)
    learned = {id(parameter) for parameter in task.trainable.parameters() if parameter.requires_grad}
    adapter = _put_in(config, task) if isinstance(config, _TuneAdapters) else None
    names = {id(parameter): plain_name(name) for name, parameter in task.backbone.named_parameters()}
    for parameter in task.trainable.parameters():
        if id(parameter) in learned:  # else it was frozen before, or is an adapter's
            parameter.requires_grad_(id(parameter) not in names or config.learns(names[id(parameter)]))
    if not any(parameter.requires_grad for parameter in task.trainable.parameters()):
        raise ConfigError([f"tune.mode {config.mode}: nothing would learn"])
    frozen = _frozen_modules(task.backbone)
    if config.stochastic:  # statistics of batch norms stay fixed all the same
        frozen = [part for module in frozen for part in module.modules() if isinstance(part, _BatchNorm)]
    task.frozen = tuple(frozen)
    task.trained_part = _trained_part(task, loaded, adapter, merge=config.export == "merged")


def _put_in(config: _TuneAdapters, task: Task) -> Adapter:
    """Adapters for the recipe's targets, which are now part of the model."""
    backbone = task.backbone
    prefix = next(f"{name}." for name, part in task.trainable.named_modules() if part is backbone)
    adapter = config.adapter(tuple(prefix + name for name in linear_layers(backbone, config.targets)))
    try:
        inject(task.trainable, adapter)
        merge(task.trainable.state_dict(), replace(adapter, targets=adapter.targets[:1]))  # better now than at the end
    except (ValueError, NotImplementedError) as error:
        raise ConfigError([str(error)]) from None
    called: set[str] = set()
    layers = adapted_layers(backbone)
    hooks = [layer.register_forward_hook(lambda *_, name=name: called.add(name)) for name, layer in layers.items()]
    frames = () if backbone.num_frames is None else (backbone.num_frames,)
    trace_shapes(backbone, (1, *frames, 3, *backbone.image_size))
    for hook in hooks:
        hook.remove()
    if len(called) < len(layers):
        idle = next(name for name in layers if name not in called)
        owner = type(backbone).__name__
        raise ConfigError([f"tune.targets: {owner} reads the weights of {idle} past any adapter; leave it out"])
    return adapter


def _frozen_modules(module: nn.Module) -> list[nn.Module]:
    """The largest modules that have parameters, none of which learns."""
    learning = [parameter.requires_grad for parameter in module.parameters()]
    if learning and not any(learning):
        return [module]
    return [part for child in module.children() for part in _frozen_modules(child)]


def _loaded(task: Task) -> dict[str, str]:
    """Name of each tensor that has initial weights from elsewhere -> address of those as the recipe has it."""
    backbone_config = getattr(task.config, "backbone", None)
    loaded: dict[str, str] = {}
    for part, address in (
        (task.backbone, getattr(backbone_config, "weights", None)),
        (task, getattr(task.config, "init_from", None)),  # later, so that it has overwritten the other
    ):
        report = getattr(part, "load_report", None)
        if isinstance(report, LoadReport) and isinstance(address, str):
            loaded |= dict.fromkeys([*report.used, *report.resized], address)
    return loaded


def _trained_part(task: Task, loaded: dict[str, str], adapter: Adapter | None, *, merge: bool) -> TrainedPart:
    """What checkpoints hold: all that learns, that training changes otherwise, or that has no other source."""
    frozen = {id(part) for module in task.frozen for part in module.modules()}
    changes = {name for name, parameter in task.trainable.named_parameters() if parameter.requires_grad}
    changes |= {
        f"{name}.{buffer}"
        for name, part in task.trainable.named_modules()
        if isinstance(part, _BatchNorm) and id(part) not in frozen
        for buffer, _ in part.named_buffers()
    }
    shapes: dict[str, dict[str, list[int]]] = {address: {} for address in loaded.values()}
    names: set[str] = set()
    for name, tensor in task.trainable.state_dict().items():
        if name in changes or plain_name(name) not in loaded:
            names.add(name)
        else:
            shapes[loaded[plain_name(name)]][plain_name(name)] = list(tensor.shape)
    bases = []
    for address, wanted in shapes.items():
        if wanted:
            path = model_path(address)
            bases.append(Base(address, str(path.resolve()), digest_of_model(path), wanted))
    grid = getattr(task.backbone, "grid", None)
    return TrainedPart(frozenset(names), Delta(bases, grid, adapter), merge)
