"""`openeva convert`: a weight file of one layout -> another layout, with an account of every tensor.

source -> `read_weights` -> openeva's names -> resized if asked -> names and file of the wanted layout

A file that becomes an openeva folder and is converted back is the same again, bit for bit: see `original.py`.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from openeva.checkpoints.clip import IMAGE, holds_text, to_clip, to_official_file
from openeva.checkpoints.detect import (
    GATED,
    INDEX_BUFFER,
    file_style,
    grid_of_clips,
    infer_grid,
    infer_vit_config,
    prediction_width,
    unknown_names,
)
from openeva.checkpoints.files import StateDict, Wrapper, write_content, write_state_dict
from openeva.checkpoints.load import (
    PATCH_KERNEL,
    LoadReport,
    Weights,
    adapt,
    described_clip,
    drop_index_buffers,
    read_weights,
)
from openeva.checkpoints.native import save_native
from openeva.checkpoints.official import rope_buffers
from openeva.checkpoints.original import ORIGINAL_FILE, Outline, outline_of, read_outline, restore
from openeva.checkpoints.resize import NUM_CLS_ROWS, AnyGrid
from openeva.checkpoints.timm import to_timm

To = Literal["openeva", "official", "timm", "open_clip"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def convert(
    source: Path,
    out: Path,
    to: To,
    *,
    dtype: Literal["fp32", "fp16", "bf16"] | None = None,
    wrapper: Wrapper | None = None,
    ema: bool | None = None,
    patch_size: int | None = None,
    grid: AnyGrid | None = None,
    num_heads: int | None = None,
    text_heads: int | None = None,
    num_frames: int | None = None,
) -> LoadReport:
    """Write the weights of `source` in another layout. Without `dtype` and resizing, every tensor keeps its bits.

    Args:
        source: An openeva folder, an official file or a file with timm's or open_clip's names.
        out: A folder for "openeva", else a file; `.safetensors` is written as such.
        to: Wanted layout.
        dtype: Floating point type to cast to; None keeps the file's.
        wrapper: Top-level key of an official PyTorch file; None = as the file was that the weights were converted from,
            else "model". Files for timm and open_clip have none.
        ema: As in `read_weights`.
        patch_size: Resize the patch kernel to this many pixels; positions stay unless `grid` is given too.
        grid: Resize all positions to this grid (rows, columns).
        num_heads: Heads, for the config of an openeva folder, where the weights do not tell.
        text_heads: Heads of a CLIP's text tower, likewise.
        num_frames: Frames of a model of clips, likewise.

    Raises:
        FileNotFoundError: Nothing at `source`.
        ValueError: Not readable, not a known model, unknown names in it, or the wanted layout cannot express it.
    """
    weights = _read_known(source, ema)
    report = LoadReport(str(source), weights.described)
    state_dict, dropped = drop_index_buffers(weights.state_dict)
    told_grid = grid_of_clips(state_dict, num_frames)
    if num_frames is not None and (told_grid is None or weights.grid not in {None, told_grid}):
        raise ValueError(
            f"{source}: --num-frames {num_frames} does not fit these weights; leave it out, or give theirs"
        )
    from_grid = told_grid or weights.grid or infer_grid(state_dict)
    if to in {"timm", "open_clip"} and state_dict[PATCH_KERNEL].ndim == 5:
        raise ValueError(f"{source} is a model of clips, which {to} has none of; convert it to openeva or official")
    if grid is not None and from_grid is not None:
        grid = (*from_grid[:-2], *grid)
    to_grid = grid or from_grid
    wanted = _resized_shapes(state_dict, patch_size, grid)
    state_dict = adapt(state_dict, wanted, report, grid=to_grid, source_grid=from_grid)
    changed = dtype is not None or bool(report.resized)
    report.resized = {**weights.moved, **report.resized}
    if dtype is not None:
        state_dict = {k: t.to(DTYPES[dtype]) if t.is_floating_point() else t for k, t in state_dict.items()}
    if to == "openeva":
        outline = None if changed else _outline(weights, state_dict)
        report.dropped |= dropped if outline is None else {}
        config = _native_config(weights, state_dict, to_grid, (num_heads, text_heads), outline)
        _write_native(out, state_dict, config, outline, report)
        return report
    if not changed and wrapper is None and (outline := _restored(source, out, to, state_dict)) is not None:
        report.kept = dict.fromkeys([*outline.kept(), *outline.beside()], f"from {ORIGINAL_FILE}")
        return report
    report.dropped |= dropped
    if to == "timm":
        _write_timm(out, state_dict, report)
        return report
    if to == "open_clip":
        write_state_dict(out, to_clip(state_dict, to), "bare")
        return report
    tables = _rope_tables(weights, state_dict, to_grid, num_heads)
    write_state_dict(out, to_official_file(state_dict) | tables, wrapper or "model")
    return report


def _read_known(source: Path, ema: bool | None) -> Weights:
    weights = read_weights(source, ema=ema)
    unknown = unknown_names(weights.state_dict)
    if unknown:
        raise ValueError(
            "\n".join([f"{source}: no known model has these weights:", *(f"  - {key}" for key in unknown)])
        )
    return weights


def _write_native(
    out: Path, state_dict: StateDict, config: Mapping[str, Any], outline: Outline | None, report: LoadReport
) -> None:
    (out / ORIGINAL_FILE).unlink(missing_ok=True)  # that of other weights which were here before
    save_native(out, state_dict, config)
    if outline is not None:
        outline.save(out)
        report.kept = dict.fromkeys(outline.kept(), f"in {ORIGINAL_FILE}, for the way back")
        report.kept |= dict.fromkeys(outline.beside(), f"beside the weights, in {ORIGINAL_FILE}")


def _outline(weights: Weights, state_dict: Mapping[str, Tensor]) -> Outline | None:
    """What the weights' own file has beyond them; for an openeva folder, that of the file it was made from."""
    if weights.file is None:
        return read_outline(weights.source)
    return outline_of(weights.file, state_dict, file_style(weights.file.state_dict, weights.layout.names))


def _restored(source: Path, out: Path, to: To, state_dict: Mapping[str, Tensor]) -> Outline | None:
    """Write the file that an openeva folder was converted from, if that is what is wanted and can be done."""
    outline = read_outline(source) if source.is_dir() else None
    if outline is None or outline.layout != to or (outline.metadata is not None) != (out.suffix == ".safetensors"):
        return None
    content = restore(outline, state_dict)
    if content is None:
        return None
    write_content(out, content, outline.metadata)
    return outline


def _resized_shapes(state_dict: Mapping[str, Tensor], patch_size: int | None, grid: AnyGrid | None) -> StateDict:
    """Empty tensors in the shapes that the weights have after resizing."""
    shapes = {key: list(tensor.shape) for key, tensor in state_dict.items()}
    if patch_size is not None:
        shapes[PATCH_KERNEL][-2:] = [patch_size, patch_size]
    if grid is not None:
        rows = {
            "pos_embed": 1 + math.prod(grid),
            "relative_position_bias_table": (2 * grid[-2] - 1) * (2 * grid[-1] - 1) + NUM_CLS_ROWS,
            "relative_position_bias_for_high": 2 * grid[-2] - 1 + NUM_CLS_ROWS,
            "relative_position_bias_for_width": 2 * grid[-1] - 1 + NUM_CLS_ROWS,
        }
        for key, shape in shapes.items():
            if key.startswith("backbone.") and (table := key.rsplit(".", 1)[-1]) in rows:
                shape[-2] = rows[table]
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def _native_config(
    weights: Weights,
    state_dict: Mapping[str, Tensor],
    grid: AnyGrid | None,
    heads: tuple[int | None, int | None],
    outline: Outline | None,
) -> dict[str, Any]:
    """What can be said about a model whose training is not known; an openeva source keeps its own config."""
    config: dict[str, Any] = {key: value for key, value in weights.config.items() if key not in ("format", "versions")}
    task = dict(config.get("task") or {"name": "clip" if holds_text(state_dict) else "pretrain"})
    if holds_text(state_dict):
        task = {**task, **described_clip(weights, num_heads=heads[0], text_heads=heads[1])}
    task["backbone"] = _backbone_config(weights, state_dict, grid, heads[0])
    config["task"] = task
    config.setdefault("target", {"identity": None, "width": prediction_width(state_dict)})
    if weights.file is not None:
        config["converted_from"] = {"file": _file_name(weights), "layout": weights.described}
        config["converted_from"] |= {"weights_under": list(weights.file.keys), "prefix": weights.file.prefix}
        config["converted_from"] |= {"dtypes": sorted({str(t.dtype) for t in weights.file.state_dict.values()})}
    config.setdefault("converted_from", {"file": weights.source.name, "layout": weights.described})
    if outline is None:
        config["converted_from"].pop("outline", None)
    else:
        config["converted_from"]["outline"] = ORIGINAL_FILE
    return config


def _backbone_config(
    weights: Weights, state_dict: Mapping[str, Tensor], grid: AnyGrid | None, num_heads: int | None
) -> dict[str, Any]:
    """What an openeva source records about its transformer, in the new size; else what shapes and tables tell."""
    task: Any = weights.config.get("task") or {}
    recorded: dict[str, Any] = task.get("backbone") or {}
    tables = {key: tensor for key, tensor in weights.state_dict.items() if INDEX_BUFFER.search(key)}
    try:
        num_heads = num_heads or recorded.get("num_heads")
        inferred = infer_vit_config({**tables, **state_dict}, num_heads=num_heads, grid=grid)
    except ValueError as error:
        raise ValueError(f"{weights.source}: {error}") from None
    if not weights.config:
        known = {} if weights.entry is None else weights.entry.overrides  # such as post-norm, which no shape tells
        return {"name": "vit", **known, **inferred}
    return {"name": "vit", **recorded, **{key: inferred[key] for key in ("image_size", "patch_size")}}


def _file_name(weights: Weights) -> str:
    """Name of the file; where libraries call every file "model.safetensors", the name of the weights."""
    return weights.entry.name + weights.source.suffix if weights.entry is not None else weights.source.name


def _rope_tables(
    weights: Weights, state_dict: Mapping[str, Tensor], grid: AnyGrid | None, num_heads: int | None
) -> StateDict:
    """Of EVA-02, whose official loader wants them in the file."""
    if GATED not in state_dict:
        return {}
    backbone = _backbone_config(weights, state_dict, grid, num_heads)
    prefix = IMAGE if holds_text(state_dict) else ""
    tables = rope_buffers(backbone, state_dict[PATCH_KERNEL].dtype)
    return {prefix + key: table for key, table in tables.items()}


def _write_timm(out: Path, state_dict: StateDict, report: LoadReport) -> None:
    renamed, unplaced = to_timm(state_dict)
    write_state_dict(out, renamed, "bare")
    report.used = [key for key in report.used if key not in unplaced]
    report.dropped |= unplaced
