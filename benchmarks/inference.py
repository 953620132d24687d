"""Classifying a batch against timm's own EVA class, alternating in one process: each precision and batch size.

Prints medians and ratios, and the largest difference of our reduced-precision probabilities from our fp32 ones;
writes JSON with the machine's name.

    python benchmarks/inference.py --models eva_s_16 eva02_s_14 --out benchmarks/results/inference_cpu.json
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alternate import alternate, summary
from classifiers import MODELS, ours, random_images, same_size, timms
from openeva.engine.hardware import environment
from openeva.engine.precision import Precision


def forward(model: nn.Module, image_BCYX: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """One batch through the model in this precision."""
    model.eval()

    def step() -> Tensor:
        with torch.inference_mode(), torch.autocast(image_BCYX.device.type, dtype, enabled=dtype != torch.float32):
            return model(image_BCYX)

    return step


def measure(name: str, batch: int, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Rows of one model at one batch size."""
    image_BCYX = random_images(batch, args.image_size, device)
    own, peer = (build(name, args.image_size).to(device) for build in (ours, timms))
    same_size(own, peer)
    reduced = Precision("auto", device)
    steps: dict[str, Callable[[], Tensor]] = {}
    for precision in {"fp32": Precision("fp32", device), reduced.name: reduced}.values():
        steps[f"timm {precision.name}"] = forward(peer, image_BCYX, precision.dtype)
        steps[f"openeva {precision.name}"] = forward(own, image_BCYX, precision.dtype)
    print(f"{name}, batch {batch} at {args.image_size} px")
    seconds = alternate(steps, device, rounds=args.rounds)
    exact, rounded = (steps[f"openeva {p}"]().float().softmax(dim=1) for p in ("fp32", reduced.name))
    peers = {"timm fp32": "over_timm_fp32", f"timm {reduced.name}": f"over_timm_{reduced.name}"}
    return {
        "model": name, "batch": batch, "rows": summary(seconds, peers, batch),
        "largest_probability_difference": (exact - rounded).abs().max().item(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["eva_s_16", "eva02_s_14"], choices=MODELS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    results = [measure(name, batch, args, device) for name in args.models for batch in args.batches]
    record = {"what": "inference", "image_size": args.image_size, "rounds": args.rounds,
              "environment": environment(device), "results": results}  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
