"""What renaming does not say about a weight file, kept beside the converted weights so that the file can be made again.

`WeightFile`, openeva's weights -> `outline_of` -> `original.pt` in the model's folder -> `restore` -> the same content

The outline is the file's own content (order of names, wrapper keys, training state and arguments beside the weights,
index and RoPE tables) with each weight taken out that openeva's weights give back bit for bit. Nothing else in openeva
reads it; a model works without it.

Source: spec section 1.8 (wrappers, arguments, buffers); nothing about a file is assumed, so that any file survives.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openeva.checkpoints.clip import STYLES, to_clip, to_official_file
from openeva.checkpoints.files import StateDict, WeightFile, read_torch, write_atomically
from openeva.checkpoints.timm import to_timm

ORIGINAL_FILE = "original.pt"

_NAMINGS: dict[str, Callable[[Mapping[str, Tensor]], StateDict]] = {
    **{style: partial(to_clip, style=style) for style in STYLES},
    "official": to_official_file,
    "timm": lambda state_dict: to_timm(state_dict)[0],
}
"""How a file's names are made of openeva's: a layout, and for a CLIP where its parts are."""


@dataclass(frozen=True)
class Outline:
    """A file without the weights that openeva's names give back.

    Attributes:
        naming: How openeva's weights must be named to fill it: "official", "timm", or a style of `clip.py`.
        content: The file's content; a weight that was taken out is None.
        keys: Top-level keys that lead to the weights.
        prefix: In front of every name.
        metadata: Of a safetensors file; None for a PyTorch file.
        unused: Names that openeva's weights have but the file has not.
    """

    naming: str
    content: Any
    keys: tuple[str, ...]
    prefix: str
    metadata: dict[str, str] | None
    unused: tuple[str, ...]

    @property
    def layout(self) -> str:
        """The layout in the sense of `openeva convert --to`."""
        return self.naming.partition("/")[0]

    def save(self, folder: Path) -> None:
        """Write it into a model's folder."""
        plain = {**vars(self), "version": 1}
        write_atomically(folder / ORIGINAL_FILE, lambda file: torch.save(plain, file))

    def kept(self) -> list[str]:
        """Names of the tensors that it holds itself, such as index tables."""
        return [self.prefix + key for key, value in _at(self.content, self.keys).items() if value is not None]

    def beside(self) -> list[str]:
        """Top-level keys beside the weights."""
        return [str(key) for key in self.content if key not in self.keys[:1]] if self.keys else []


def outline_of(file: WeightFile, state_dict: Mapping[str, Tensor], naming: str) -> Outline:
    """Take out of a file's content what `state_dict` (openeva's names) gives back."""
    renamed = _NAMINGS[naming](state_dict)
    weights = copy.copy(_at(file.content, file.keys))  # its own type, with what else hangs on it
    taken = set()
    for key, tensor in weights.items():
        ours = renamed.get(key.removeprefix(file.prefix))
        if ours is not None and ours.dtype == tensor.dtype and torch.equal(ours, tensor):
            weights[key] = None
            taken.add(key.removeprefix(file.prefix))
    content = _with(file.content, file.keys, weights)
    unused = tuple(sorted(set(renamed) - taken))
    return Outline(naming, content, file.keys, file.prefix, file.metadata, unused)


def read_outline(folder: Path) -> Outline | None:
    """The outline in a model's folder; None where there is none.

    Raises:
        ValueError: Damaged, or written by a later version.
    """
    path = folder / ORIGINAL_FILE
    if not path.is_file():
        return None
    plain = read_torch(path)
    if not isinstance(plain, dict) or plain.pop("version", None) != 1:
        raise ValueError(f"{path} is not an outline that this version reads; delete it to convert without it")
    return Outline(**plain)


def restore(outline: Outline, state_dict: Mapping[str, Tensor]) -> Any | None:
    """The file's content with `state_dict` (openeva's names) filled in; None where these are not the same weights.

    They are not where names came or went since, as after training another head.
    """
    renamed = _NAMINGS[outline.naming](state_dict)
    weights = copy.copy(_at(outline.content, outline.keys))
    wanted = {key: key.removeprefix(outline.prefix) for key, value in weights.items() if value is None}
    if set(renamed) != {*wanted.values(), *outline.unused}:
        return None
    for key, name in wanted.items():
        weights[key] = renamed[name].detach().contiguous()
    return _with(outline.content, outline.keys, weights)


def _at(content: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        content = content[key]
    return content


def _with(content: Any, keys: tuple[str, ...], weights: Any) -> Any:
    """`content` with `weights` in their place; what lies on the way is copied, not changed."""
    if not keys:
        return weights
    outer = copy.copy(content)
    outer[keys[0]] = _with(content[keys[0]], keys[1:], weights)
    return outer
