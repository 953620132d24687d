"""Weights of any layout -> a model, with an account of every tensor.

path -> `read_weights` (openeva's names) -> `adapt` (copied, resized, dropped, fresh) -> `load_into` -> `LoadReport`

Nothing is skipped silently: a name or shape that no rule explains is an error, and all of them are in one message.

Source: spec section 1.9. Deliberate difference: the official loader is not strict and only prints what does not fit.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openeva.checkpoints.clip import TEXT, as_projection, infer_text_config
from openeva.checkpoints.delta import DELTA, Base, Delta, complete
from openeva.checkpoints.detect import (
    INDEX_BUFFER,
    Layout,
    detect_layout,
    grid_of_clips,
    infer_grid,
    infer_vit_config,
    layout_of,
    to_openeva,
)
from openeva.checkpoints.files import EMA_WRAPPER, StateDict, WeightFile, read_weight_file
from openeva.checkpoints.native import WEIGHTS_FILE, native_grid, read_native
from openeva.checkpoints.pretrained import find_entry
from openeva.checkpoints.released import PretrainedWeights
from openeva.checkpoints.resize import (
    AnyGrid,
    inflate_patch_kernel,
    resize_decoupled_relative_position_table,
    resize_patch_kernel,
    resize_position_embedding,
    resize_relative_position_table,
)
from openeva.registry import did_you_mean

INDEX_REASON = "index table, computed from the grid"
ROPE_REASON = "rotary table, computed from the grid"

CLASSIFIER = "classifier."
DROPPABLE = {
    "backbone.mask_token": "the model has no mask token",
    "backbone.norm.": "the model has no final norm",
    "backbone.projection.": "the model has no projection to the joint space of images and texts",
    "projection.": "the model has no projection to the joint space of images and texts",
    "head.": "the model has no prediction head",
    "fc_norm.": "the model has no norm after pooling",
    CLASSIFIER: "the model has no classifier",
    "decoder.": "the model has no decoder",
    TEXT: "the model has no text tower",
    "logit_scale": "the model compares no images with texts",
    "logit_bias": "the model adds no bias to its similarities",
}
"""Start of a name that a file may hold and the model may lack -> why it is dropped then."""

POSITIONS = "backbone.pos_embed"
PATCH_KERNEL = "backbone.patch_embed.proj.weight"

_SHARED = "backbone.relative_position."
_PER_BLOCK = re.compile(r"^backbone\.blocks\.\d+\.attn\.position_bias\.")


@dataclass
class LoadReport:
    """What became of every tensor.

    Attributes:
        source: The file or folder.
        layout: What the file was, in words.
        used: Names taken as they are (but for the dtype).
        resized: Name -> from what to what.
        dropped: Name in the file -> why it was not used.
        fresh: Names of the model that keep their initial values.
        kept: Name in the file -> where it is kept although the model does not use it (conversion only).
    """

    source: str = ""
    layout: str = ""
    used: list[str] = field(default_factory=list)
    resized: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The account for people: equal entries of all blocks share a line."""
        head = " ".join(text for text in (self.source, f"({self.layout})" if self.layout else "") if text)
        lines = [
            f"{head}: {len(self.used)} tensors used as they are"
            if head
            else f"{len(self.used)} tensors used as they are"
        ]
        for title, entries in (
            ("resized", self.resized),
            ("dropped", self.dropped),
            ("fresh", dict.fromkeys(self.fresh, "")),
            ("kept", self.kept),
        ):
            lines += [f"{title}: {text}" for text in _grouped(entries)]
        return lines


@dataclass(frozen=True)
class Weights:
    """Weights as they were found, with openeva's names.

    Attributes:
        state_dict: Tensors in the file's dtypes.
        layout: How the file named them.
        source: The file or folder.
        grid: Patch grid (rows, columns) that they were made for, where the file says so.
        config: Content of `config.json` where they come from an openeva folder, else empty.
        file: The file as it lay on disk; None for an openeva folder.
        entry: What is known about them, where the file has an official name or timm's.
        moved: Name -> what was renamed beyond the layout, and why.
    """

    state_dict: StateDict
    layout: Layout
    source: Path
    grid: AnyGrid | None
    config: dict[str, object]
    file: WeightFile | None = None
    entry: PretrainedWeights | None = None
    moved: dict[str, str] = field(default_factory=dict)

    @property
    def described(self) -> str:
        """The layout in words, and whether the averaged weights of a training checkpoint were taken."""
        averaged = self.file is not None and EMA_WRAPPER in self.file.keys
        guessed = infer_grid(self.state_dict) if self.grid is None else None
        told = f"{self.layout}, averaged weights" if averaged else str(self.layout)
        if guessed is None or len(guessed) < 3:
            return told
        size = f"{guessed[0]} time slots of {guessed[1]} x {guessed[2]} patches"
        return f"{told}; nothing says how large its clips are, taken for {size}"


def read_weights(path: Path, *, ema: bool | None = None) -> Weights:
    """Read an openeva folder, an official file, or a file with timm's names.

    Args:
        path: The folder or file.
        ema: Take the averaged weights of a training checkpoint; None = where the file has the name of released weights
            whose published accuracy is that of the averaged ones, and holds them.

    Raises:
        FileNotFoundError: Nothing there.
        ValueError: Damaged, not weights, or not a known layout; the message starts with the path.
    """
    config: dict[str, object] = {}
    file, entry = None, _entry_of(path)
    if path.is_dir():
        state_dict, config = read_model(path)
        origin = config.get("converted_from")
        entry = find_entry(str(origin.get("file"))) if isinstance(origin, dict) else None
    else:
        preferred = None if entry is not None and entry.averaged else False
        file = read_weight_file(path, ema=preferred if ema is None else ema)
        state_dict = file.state_dict
    try:
        layout = detect_layout(state_dict)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    moved: dict[str, str] = {}
    state_dict = to_openeva(state_dict)
    if file is not None and entry is not None and entry.kind == "mim" and "backbone.norm.weight" not in state_dict:
        state_dict, moved = _norm_back(state_dict)
    if entry is not None and entry.kind == "clip":  # a tower alone, whose names do not tell what its head is
        state_dict = as_projection(state_dict)
        layout = layout_of(state_dict, layout.names)
    grid = native_grid(config)
    if grid is None and entry is not None:
        grid = grid_of_clips(state_dict, entry.overrides.get("num_frames"))
    return Weights(state_dict, layout, path, grid, config, file, entry, moved)


def described_backbone(
    weights: Weights, *, num_heads: int | None = None, num_frames: int | None = None
) -> dict[str, Any]:
    """Config of the transformer in weights: what a run recorded, else what shapes and the table of released ones tell.

    Args:
        weights: From `read_weights`.
        num_heads: Heads, where nothing is recorded and the shapes do not tell.
        num_frames: Of a model of clips, likewise.

    Raises:
        ValueError: Heads, frames or grid cannot be told.
    """
    task: Any = weights.config.get("task") or {}
    recorded = dict(task.get("backbone") or {})
    if recorded:
        return {key: value for key, value in recorded.items() if key != "weights"}
    try:
        grid = weights.grid or grid_of_clips(weights.state_dict, num_frames)
        inferred = infer_vit_config(weights.state_dict, num_heads=num_heads, grid=grid)
    except ValueError as error:
        raise ValueError(f"{weights.source}: {error}") from None
    entry = weights.entry
    return inferred if entry is None else {**entry.overrides, **inferred, "statistics": entry.statistics}


def described_clip(weights: Weights, *, num_heads: int | None = None, text_heads: int | None = None) -> dict[str, Any]:
    """Config of both towers in weights that hold a text tower, as keyword arguments for `ClipConfig`.

    Args:
        weights: From `read_weights`.
        num_heads: As in `described_backbone`.
        text_heads: Heads of the text tower, where nothing is recorded and they are not of 64 channels.

    Raises:
        ValueError: As in `described_backbone`, or the text tower is not whole or its heads cannot be told.
    """
    task: Any = weights.config.get("task") or {}
    try:
        text = task.get("text") or infer_text_config(weights.state_dict, num_heads=text_heads)
    except ValueError as error:
        raise ValueError(f"{weights.source}: {error}") from None
    return {
        "embed_dim": task.get("embed_dim") or weights.state_dict["text.text_projection"].shape[1],
        "backbone": {"name": "vit", **described_backbone(weights, num_heads=num_heads)},
        "text": dict(text),
    }


def _entry_of(path: Path) -> PretrainedWeights | None:
    """Facts about a file by its name, or by its folder's where libraries call every file "model.safetensors"."""
    if path.name != WEIGHTS_FILE:
        return find_entry(path.name)
    hub_folders = [part.removeprefix("models--timm--") for part in path.parts if part.startswith("models--timm--")]
    return find_entry((hub_folders or [path.parent.name])[-1])


def _norm_back(state_dict: StateDict) -> tuple[StateDict, dict[str, str]]:
    """The final norm of a pre-trained model, which timm's files hold as `fc_norm`, where fine-tuning would use it."""
    names = {key: key.replace("fc_norm.", "backbone.norm.") for key in state_dict if key.startswith("fc_norm.")}
    why = {new: f"named {old} in timm's file" for old, new in names.items()}
    return {names.get(key, key): tensor for key, tensor in state_dict.items()}, why


def read_model(folder: Path) -> tuple[StateDict, dict[str, Any]]:
    """All weights and the config of an openeva folder.

    Where it holds only what was trained, the others come from the weights that training started from, and adapters are
    merged.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged.
        WeightsError: The weights that training started from are not there, or are others now.
    """
    state_dict, config = read_native(folder)
    content = config.pop(DELTA, None)
    if content is not None:
        state_dict = complete(folder, state_dict, Delta.from_json(content), _read_base)
    return state_dict, config


def _read_base(base: Base, path: Path, grid: AnyGrid | None) -> StateDict:
    weights = read_weights(path)
    expected = {name: torch.empty(shape, device="meta") for name, shape in base.shapes.items()}
    given = {n: t for n, t in weights.state_dict.items() if n in expected or n.startswith(_SHARED)}
    return adapt(given, expected, LoadReport(str(path)), grid=grid, source_grid=weights.grid)


def drop_index_buffers(state_dict: Mapping[str, Tensor]) -> tuple[StateDict, dict[str, str]]:
    """Part the weights from stored index and rotary tables: (weights, name of each table -> why it is dropped)."""
    kept = {key: tensor for key, tensor in state_dict.items() if not INDEX_BUFFER.search(key)}
    return kept, {key: ROPE_REASON if ".rope." in key else INDEX_REASON for key in state_dict if key not in kept}


UNSEEN = ("num_heads", "norm_order", "rope_grid")
"""What no shape of an image encoder shows, and what makes other features of the same weights."""


def check_unseen(ours: object, weights: Weights, told: str) -> None:
    """Whether an image encoder agrees with what the weights' run recorded, or is known of them, and no shape shows.

    Args:
        ours: Config of the encoder that they are for.
        weights: To start from.
        told: Key and address, for the message.

    Raises:
        ValueError: It does not; one line with the fix.
    """
    task: Any = weights.config.get("task") or {}
    theirs = task.get("backbone") or (weights.entry.overrides if weights.entry is not None else {})
    names = [name for name in UNSEEN if name in theirs and hasattr(ours, name)]
    differing = {name: theirs[name] for name in names if theirs[name] != getattr(ours, name)}
    if differing:
        has = ", ".join(f"{name} {value} instead of {getattr(ours, name)}" for name, value in differing.items())
        fix = ", ".join(f"{name}: {'null' if value is None else value}" for name, value in differing.items())
        raise ValueError(
            f"{told}: its image tower has {has}, so that its weights mean something else here; choose another one, or"
            f" set task.backbone: {{{fix}}}"
        )


def load_into(
    model: nn.Module,
    weights: Weights | Mapping[str, Tensor],
    *,
    fresh: Sequence[str] = (),
    grid: AnyGrid | None = None,
    source_grid: AnyGrid | None = None,
    part: str | None = None,
) -> LoadReport:
    """Copy weights into a model, adapting what may be adapted; the model keeps its dtypes and devices.

    Args:
        model: Its parameters have openeva's names (`backbone.`, `head.`, ...).
        weights: From `read_weights`, or a state dict with openeva's names.
        fresh: Names, or starts of names, that may keep their initial values where the weights lack them or do not fit;
            `("head",)` for another teacher.
        grid: The model's patch grid (rows, columns); needed where it is not square.
        source_grid: The weights' patch grid; needed where it is not square and the file does not say it.
        part: The model is only this part ("backbone"): its names lack that prefix, and other parts are dropped.

    Raises:
        ValueError: Names or shapes that no rule explains, all of them, with the fix. The model is then unchanged.
    """
    if isinstance(weights, Weights):
        state_dict, source_grid = weights.state_dict, source_grid or weights.grid
        report = LoadReport(str(weights.source), weights.described, resized=dict(weights.moved))
    else:
        state_dict, report = dict(weights), LoadReport()
    prefix = f"{part}." if part else ""
    if part:
        report.dropped |= {key: f"not part of the {part}" for key in state_dict if not key.startswith(prefix)}
        state_dict = {key: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    expected = {prefix + key: tensor for key, tensor in model.state_dict().items()}
    fixed_positions = POSITIONS not in {prefix + key for key, _ in model.named_parameters()}
    adapted = adapt(
        state_dict, expected, report, fresh=fresh, grid=grid, source_grid=source_grid, fixed_positions=fixed_positions
    )
    model.load_state_dict({key.removeprefix(prefix): tensor for key, tensor in adapted.items()}, strict=False)
    report.resized = {key: text for key, text in report.resized.items() if key not in report.dropped}
    return report


def adapt(
    state_dict: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    report: LoadReport,
    *,
    fresh: Sequence[str] = (),
    grid: AnyGrid | None = None,
    source_grid: AnyGrid | None = None,
    fixed_positions: bool = False,
) -> StateDict:
    """The tensors of `state_dict` in the shapes of `expected`; the account goes to `report`.

    Args:
        state_dict: Weights with openeva's names.
        expected: Wanted names with tensors of the wanted shapes (`meta` tensors will do: values are not read).
        report: Receives the account.
        fresh: As in `load_into`.
        grid: As in `load_into`.
        source_grid: As in `load_into`.
        fixed_positions: The model's positions are a fixed table; for another grid it keeps its own.

    Raises:
        ValueError: As in `load_into`.
    """
    given, dropped = drop_index_buffers(state_dict)
    report.dropped |= dropped
    given = _spread_shared_tables(given, expected, report)
    grids = _grids(given, expected, source_grid, grid)
    adapted: StateDict = {}
    problems: list[str] = []
    for key, tensor in given.items():
        if key not in expected:
            problems += _account_for_surplus(key, tensor, expected, report)
        elif key == POSITIONS and fixed_positions and tensor.shape != expected[key].shape:
            problems += _account_for_fixed_positions(tensor, report)
        else:
            try:
                fitted, change = _fit(key, tensor, expected[key], *grids)
            except ValueError as error:
                if _matches(key, fresh):
                    report.dropped[key] = f"{error}; left fresh as asked"
                else:
                    problems.append(f"{key}: {error}")
                continue
            adapted[key] = fitted
            if change or key in report.resized:
                report.resized[key] = ", ".join(text for text in (report.resized.get(key), change) if text)
            else:
                report.used.append(key)
    report.fresh += [key for key in expected if key not in adapted]
    problems += [
        f"{key} {_shape(expected[key])} is missing from the weights; allow it in fresh to start it anew"
        for key in report.fresh
        if key not in given and not _matches(key, fresh) and not (key == POSITIONS and fixed_positions)
    ]
    if problems:
        source = f" of {report.source}" if report.source else ""
        raise ValueError("\n".join([f"the weights{source} do not fit the model:", *(f"  - {p}" for p in problems)]))
    return adapted


def _spread_shared_tables(given: StateDict, expected: Mapping[str, Tensor], report: LoadReport) -> StateDict:
    """Copy shared relative position tables to every block where the model has per-block ones (spec 1.9.2)."""
    result: StateDict = {}
    for key, tensor in given.items():
        table = key.removeprefix(_SHARED)
        blocks = [name for name in expected if _PER_BLOCK.sub("", name) == table and name != table]
        if key in expected or table == key or not blocks:
            result[key] = tensor
        else:
            result |= dict.fromkeys(blocks, tensor)
            report.resized |= dict.fromkeys(blocks, f"copied from {key}")
    return result


def _grids(
    given: Mapping[str, Tensor], expected: Mapping[str, Tensor], source_grid: AnyGrid | None, grid: AnyGrid | None
) -> tuple[AnyGrid | None, AnyGrid | None]:
    """Grids of the weights and of the model, None where they cannot be told.

    A grid that is only guessed to be square is not believed where the model's is not square and has as many patches;
    one of clips that is only guessed, where the model's has as many patches in other slots.
    """
    wanted = grid or infer_grid(expected)
    guessed = infer_grid(given)
    if guessed and wanted and len(guessed) == len(wanted) and math.prod(guessed) == math.prod(wanted):
        if len(wanted) == 3:
            guessed = wanted
        elif wanted[0] != wanted[1]:
            guessed = None
    return source_grid or guessed, wanted


def _fit(key: str, tensor: Tensor, wanted: Tensor, given: AnyGrid | None, grid: AnyGrid | None) -> tuple[Tensor, str]:
    """One tensor in the wanted shape, and what was done to it ("" for nothing).

    Raises:
        ValueError: No rule leads from one shape to the other, or a rule needs a grid that is not known.
    """
    fitted, rule = tensor, ""
    if key == PATCH_KERNEL and tensor.ndim in {4, 5} and tensor.ndim <= wanted.ndim:
        fitted, rule = _fit_kernel(tensor, wanted)
    elif key == POSITIONS or "relative_position_bias_" in key:
        if given is None or grid is None:
            side = "source_grid, that of the weights" if given is None else "grid, that of the model"
            if given is None and grid is not None and len(grid) == 3:
                side += " (of a run: task.init_frames, the frames of the weights)"
            if tensor.shape != wanted.shape or (grid and len(grid) == 2 and grid[0] != grid[1]):
                raise ValueError(f"{_shape(tensor)} for {_shape(wanted)}: the patch grid cannot be told; pass {side}")
        elif given != grid:
            fitted = _resize_table(key, tensor, given, grid)
            rule = f"grid {'x'.join(map(str, given))} -> {'x'.join(map(str, grid))}"
    if fitted.shape != wanted.shape:
        raise ValueError(f"{_shape(tensor)} does not fit {_shape(wanted)}, and no rule resizes it")
    return fitted, "" if fitted is tensor else f"{_shape(tensor)} -> {_shape(fitted)} ({rule})"


def _fit_kernel(kernel: Tensor, wanted: Tensor) -> tuple[Tensor, str]:
    fitted, rule = resize_patch_kernel(kernel, wanted.shape[-1]), "kernel"
    if fitted.ndim == 5 and fitted.shape[2] == 1:  # of single frames
        fitted = fitted[:, :, 0] if wanted.shape[2] > 1 else fitted
    if fitted.ndim == 4 and wanted.ndim == 5:
        fitted, rule = inflate_patch_kernel(fitted, wanted.shape[2]), "kernel, spread evenly over the frames"
    return fitted, rule


def _resize_table(key: str, table: Tensor, given: AnyGrid, grid: AnyGrid) -> Tensor:
    if key == POSITIONS:
        return resize_position_embedding(table, given, grid)
    if key.endswith("bias_table"):
        return resize_relative_position_table(table, (given[-2], given[-1]), (grid[-2], grid[-1]))
    axis = 0 if key.endswith("high") else 1
    return resize_decoupled_relative_position_table(table, given[axis], grid[axis])


def _account_for_surplus(key: str, tensor: Tensor, expected: Mapping[str, Tensor], report: LoadReport) -> list[str]:
    start, why = next(((start, why) for start, why in DROPPABLE.items() if key.startswith(start)), ("", None))
    if why is None or (start == TEXT and any(name.startswith(TEXT) for name in expected)):
        return [f"{key} {_shape(tensor)} has no place in the model{did_you_mean(key, list(expected))}"]
    if key.startswith(CLASSIFIER) and any(name.startswith(CLASSIFIER) for name in expected):
        why = "the model's classifier is of another kind"
    report.dropped[key] = why
    return []


def _account_for_fixed_positions(pos_1SD: Tensor, report: LoadReport) -> list[str]:
    if pos_1SD[:, 0].any():  # the cls row of the fixed table is zero
        return [f"{POSITIONS}: learned positions of another grid, but the model's are fixed; set positions: learned"]
    report.dropped[POSITIONS] = "fixed table of another grid; the model computes its own"
    return []


def _matches(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "scalar"


def _grouped(entries: Mapping[str, str]) -> list[str]:
    """One text per entry; names that differ in the block number only, with the same remark, become one."""
    groups: dict[tuple[str, str], list[str]] = {}
    for key, remark in entries.items():
        groups.setdefault((re.sub(r"blocks\.\d+\.", "blocks.*.", key), remark), []).append(key)
    texts = []
    for (pattern, remark), keys in groups.items():
        name = keys[0] if len(keys) == 1 else f"{pattern} ({len(keys)} tensors)"
        texts.append(f"{name}: {remark}" if remark else name)
    return texts
