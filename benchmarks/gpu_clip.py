"""CLIP's part of `gpu.py`: an EVA-CLIP training step in bf16 at growing batches until the memory is full.

Ours eagerly and with compiled blocks, open_clip's own step as the peer, each with and without activation
checkpointing: pairs/s, utilisation (what checkpointing computes twice counts once), peak memory.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alternate import free, time_steps
from clips import flops, make_batch, open_clip_step, open_clips, our_step, ours, same_size
from openeva.engine.hardware import memory_gib, peak_flops
from openeva.engine.precision import Precision
from openeva.tasks.clip import ClipTask

CLIP_MODEL, TINY_MODEL = "eva01_clip_g_14", "eva_clip_ti_16"
BATCHES = (32, 64, 128, 256, 512, 1024, 2048)
VARIANTS: dict[str, dict[str, bool]] = {
    "open_clip": {"peer": True},
    "ours, eager": {},
    "ours, compiled blocks": {"compiled": True},
    "open_clip, activation checkpointing": {"peer": True, "checkpointing": True},
    "ours, eager, activation checkpointing": {"checkpointing": True},
    "ours, compiled blocks, activation checkpointing": {"compiled": True, "checkpointing": True},
}


def measure_clip(device: torch.device, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of every variant at every batch that fits, with the best ratio to open_clip at the same batch."""
    name, sizes = (TINY_MODEL, (2, 4)) if args.tiny else (CLIP_MODEL, BATCHES)
    rows: list[dict[str, Any]] = []
    for label, options in VARIANTS.items():
        free(device)
        precision = Precision("bf16", device)
        task, make_step = _build(name, precision, **options)
        for size in sizes:
            padded = options.get("peer", False)
            batch = make_batch(size, task.backbone.image_size, task.model.tokenizer.context_length, padded=padded)
            length = batch["text"].shape[1]
            row: dict[str, Any] = {"model": name, "step": label, "batch": size, "tokens_per_text": length}
            rows.append(row)
            try:
                seconds = _time(make_step, batch, device, args.repeats)
            except torch.OutOfMemoryError as error:
                row["error"] = str(error).splitlines()[0]
                break
            work = size * flops(task, length)
            row |= {
                "median_s": seconds, "pairs_per_s": size / seconds, "tflops_per_s": work / seconds / 1e12,
                "mfu": work / seconds / peak_flops(device, precision.dtype), "peak_gib": memory_gib(device),
            }  # fmt: skip
            _add_ratio(rows, row)
            shown = (f"{key} {value:.4g}" if isinstance(value, float) else value for key, value in row.items())
            print("  ".join(map(str, shown)), flush=True)
        del task, make_step
    return rows


def _build(
    name: str, precision: Precision, *, peer: bool = False, compiled: bool = False, checkpointing: bool = False
) -> tuple[ClipTask, Callable[[dict[str, Tensor]], Callable[[], Any]]]:
    """Our task (for the peer on no device: only its sizes count) and what makes a step of a batch."""
    device = precision.device
    if peer:
        model = open_clips(name, checkpointing=checkpointing)
        with torch.device("meta"):
            task = ours(name)
        same_size(task, model)
        model.to(device)
        return task, lambda batch: open_clip_step(model, batch, device, precision.name)
    task = ours(name, checkpointing=checkpointing).to(device)
    if compiled:
        for block in task.blocks():
            block.compile()
    return task, lambda batch: our_step(task, {k: v.to(device) for k, v in batch.items()}, precision)


def _time(
    make_step: Callable[[dict[str, Tensor]], Callable[[], Any]], batch: dict[str, Tensor], device: torch.device,
    repeats: int,
) -> float:  # fmt: skip
    """Median seconds; the optimizer's state of the last batch is gone."""
    free(device, compiled=False)
    return time_steps(make_step(batch), device, repeats)


def _add_ratio(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Beside a row of ours, how much faster it is than open_clip with the same batch and checkpointing."""
    checkpointing = "checkpointing" in row["step"]
    for peer in rows:
        same = peer["batch"] == row["batch"] and ("checkpointing" in peer["step"]) == checkpointing
        if same and peer["step"].startswith("open_clip") and "pairs_per_s" in peer and peer is not row:
            row["over_open_clip"] = row["pairs_per_s"] / peer["pairs_per_s"]
