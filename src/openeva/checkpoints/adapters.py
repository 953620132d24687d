"""Adapters of the `peft` library: low-rank and other small changes to frozen linear layers, put in and merged.

model -> `inject` -> linear layers wrapped, `*.base_layer.weight` beside `*.lora_A.default.weight`, ...
weights with such names -> `merge` -> weights of the plain model

Paper: LoRA (Hu et al. 2021). The methods and their arithmetic are peft's own; this is the one file that knows it. peft
has no bottleneck adapters (AdaptFormer and the like) for plain modules, so neither has openeva.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from openeva.checkpoints.files import StateDict

WRAPPED = ".base_layer."
"""What peft puts into the names of the weights that it wraps."""


SUBSETS = ("feedforward_modules",)
"""Options of peft that name some of the targets."""


@dataclass(frozen=True)
class Adapter:
    """Which adapters a model has.

    Attributes:
        peft_type: peft's name of the method, such as "LORA".
        targets: Full names of the linear layers.
        options: Further arguments of peft's config for the method.
    """

    peft_type: str
    targets: tuple[str, ...]
    options: Mapping[str, Any]


def inject(module: nn.Module, adapter: Adapter) -> None:
    """Wrap the linear layers in place; adapters learn from here on, and everything else of `module` is frozen.

    Raises:
        ValueError: peft is not installed, or refuses the options.
    """
    peft = _peft()
    try:
        # JSON values only: this is what a model's config.json gives back
        config = peft.get_peft_config(
            {"peft_type": adapter.peft_type, "target_modules": list(adapter.targets), **adapter.options}
        )
        peft.inject_adapter_in_model(config, module)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"peft refuses tune.options {dict(adapter.options)}: {error}") from None


def adapted_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The wrapped layers by name."""
    layer_class = _peft().tuners.tuners_utils.BaseTunerLayer
    return {name: part for name, part in module.named_modules() if isinstance(part, layer_class)}


def plain_name(name: str) -> str:
    """Name of a tensor in the model without adapters."""
    return name.replace(WRAPPED, ".")


@torch.no_grad()
def merge(state_dict: Mapping[str, Tensor], adapter: Adapter) -> StateDict:
    """Weights of the plain model that gives the same output; layers that change are computed in fp32.

    Args:
        state_dict: All weights, those of the wrapped layers with or without peft's part in the name, and the adapters'.
        adapter: Which adapters these are.

    Raises:
        ValueError: Weights of a layer or of its adapter are missing.
    """
    merged = {plain_name(name): tensor for name, tensor in state_dict.items()}
    for target in adapter.targets:
        weight, bias = merged.get(f"{target}.weight"), merged.get(f"{target}.bias")
        if weight is None:
            raise ValueError(f"{target}.weight, which the adapter of this layer changes, is missing")
        own = [name for name in merged if name.startswith(f"{target}.") and name.count(".") > target.count(".") + 1]
        layer = _wrapped_linear(weight, bias, target, adapter)
        found = layer.load_state_dict({name.removeprefix(f"{target}."): merged.pop(name) for name in own}, strict=False)
        missing = [name for name in found.missing_keys if not f".{name}".startswith(WRAPPED)]
        if missing or found.unexpected_keys:
            raise ValueError(f"the adapter of {target} lacks {missing} and has {found.unexpected_keys} too many")
        layer.merge()
        base = layer.get_base_layer()
        merged |= {f"{target}.{name}": tensor.detach() for name, tensor in base.named_parameters()}
    return merged


def _wrapped_linear(weight: Tensor, bias: Tensor | None, name: str, adapter: Adapter) -> Any:
    """One linear layer with its adapter, in a tree of empty modules that gives it its name."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    for key, value in {"weight": weight, "bias": bias}.items():
        if value is not None:
            setattr(linear, key, nn.Parameter(value.detach().float().clone()))
    root: nn.Module = linear
    for part in reversed(name.split(".")):
        parent = nn.Module()
        parent.add_module(part, root)
        root = parent
    only = {key: [n for n in adapter.options[key] if n == name] for key in SUBSETS if key in adapter.options}
    inject(root, replace(adapter, targets=(name,), options={**adapter.options, **only}))
    return root.get_submodule(name).eval()


def linear_layers(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Full names of the linear layers whose name ends in one of `names` ("qkv", "mlp.fc1"); all of them for "all".

    Raises:
        ValueError: A name fits none; the message lists what there is.
    """
    linears = [name for name, part in module.named_modules() if type(part) is nn.Linear]
    chosen: dict[str, None] = {}
    for wanted in names:
        fitting = [name for name in linears if wanted == "all" or f".{name}".endswith(f".{wanted}")]
        if not fitting:
            endings = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in linears))
            raise ValueError(f"{wanted!r} is no linear layer of this backbone; there are {endings or 'none'}")
        chosen |= dict.fromkeys(fitting)
    return [name for name in linears if name in chosen]


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ValueError("adapters need the package peft: pip install 'openeva[peft]'") from None
    return peft
