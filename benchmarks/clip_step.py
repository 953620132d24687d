"""One CLIP training step against open_clip's own, alternating in one process, and the memory of each in its own.

Both train the same model on the same pairs with AdamW, clipping and the symmetric loss; open_clip runs its own training
function (see `clips.py`). Its tokenizer always gives rows of 77, ours only as many tokens as the longest caption needs;
a third column has ours at 77 too, so that what comes from shorter rows is visible. Prints medians, ratios and peak
memory; writes JSON with the machine's name.

    python benchmarks/clip_step.py --out benchmarks/results/clip_step_cpu.json
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from alternate import alternate, peak_of, print_peak, summary
from clips import flops, make_batch, open_clip_step, open_clips, our_step, ours, same_size, variants
from openeva.engine.hardware import environment
from openeva.engine.precision import Precision

BATCHES = {"eva_clip_ti_16": 32, "eva02_clip_b_16": 8, "eva01_clip_g_14": 2}
OPEN_CLIP, PADDED, OURS = "open_clip", "openeva, rows of 77", "openeva"
CONTENDERS = (OPEN_CLIP, PADDED, OURS)


def build(name: str, contender: str, batch_size: int, precision: Precision) -> Callable[[], Any]:
    """A contender's step, with its own model."""
    device, task = precision.device, ours(name)
    batch = make_batch(
        batch_size, task.backbone.image_size, task.model.tokenizer.context_length, padded=contender != OURS
    )
    if contender == OPEN_CLIP:
        peer = open_clips(name)
        same_size(task, peer)
        return open_clip_step(peer.to(device), batch, device, precision.name)
    return our_step(task.to(device), {key: value.to(device) for key, value in batch.items()}, precision)


def peak_memory(name: str, contender: str, batch_size: int, precision: Precision) -> float:
    """GiB that two steps of a contender take in a process of its own, beyond what was there before its model."""
    device = precision.device
    command = [
        sys.executable, __file__, "--models", name, "--memory-of", contender, "--batch", str(batch_size),
        "--precisions", precision.name, "--device", str(device), "--threads", str(torch.get_num_threads()),
    ]  # fmt: skip
    return peak_of(command)


def print_memory(name: str, contender: str, batch_size: int, precision: Precision) -> None:
    """What `peak_memory` reads: this is its process."""
    print_peak(lambda: build(name, contender, batch_size, precision), precision.device)


def measure(name: str, args: argparse.Namespace, precision: Precision) -> dict[str, Any]:
    """Rows of one model in one precision."""
    device, batch_size = precision.device, args.batch or BATCHES[name]
    print(f"{name}, batch {batch_size}, {precision.name}", flush=True)
    steps = {contender: build(name, contender, batch_size, precision) for contender in CONTENDERS}
    seconds = alternate(steps, device, rounds=args.rounds)
    del steps
    rows = summary(seconds, {OPEN_CLIP: "over_open_clip"}, batch_size)
    task = ours(name)
    lengths = {
        contender: make_batch(batch_size, (1, 1), 77, padded=contender != OURS)["text"].shape[1]
        for contender in CONTENDERS
    }
    for row in rows:
        contender = row["step"]
        per_pair = flops(task, lengths[contender])
        row |= {
            "tokens_per_text": lengths[contender],
            "gflops_per_pair": per_pair / 1e9,
            "gflops_per_s": per_pair * row["images_per_s"] / 1e9,
        }
        if not args.no_memory:
            row["peak_gib"] = peak_memory(name, contender, batch_size, precision)
            print(f"{contender:34s} {row['peak_gib']:8.2f} GiB at most", flush=True)
    return {"model": name, "precision": precision.name, "batch": batch_size, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["eva_clip_ti_16", "eva02_clip_b_16"], choices=variants())
    parser.add_argument("--batch", type=int, help="pairs per step (default: what suits the model on a CPU)")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-memory", action="store_true", help="leave out the runs that measure memory")
    parser.add_argument("--memory-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.memory_of:
        print_memory(args.models[0], args.memory_of, args.batch, Precision(args.precisions[0], device))
        return
    record: dict[str, Any] = {
        "what": "clip_step", "rounds": args.rounds, "environment": environment(device), "results": [],
    }  # fmt: skip
    for name in args.models:
        for precision in args.precisions:
            record["results"].append(measure(name, args, Precision(precision, device)))
            if args.out:
                args.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
