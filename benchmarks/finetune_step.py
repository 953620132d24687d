"""One fine-tuning step against timm's own EVA class trained by timm's parts, alternating in one process.

Both do the same work on the same given batch: forward with stochastic depth, cross entropy with smoothed labels,
backward, AdamW with layer-wise learning rates. Prints medians and ratios; writes JSON with the machine's name.

    python benchmarks/finetune_step.py --models eva_s_16 eva02_s_14 --out benchmarks/results/finetune_step_cpu.json
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from alternate import alternate, our_step, summary
from classifiers import MODELS, NUM_CLASSES, ours, random_images, same_size, timms
from openeva.engine.hardware import environment
from openeva.engine.optim import OptimConfig, adamw
from openeva.engine.precision import Precision

DROP_PATH, LAYER_DECAY, SMOOTHING = 0.1, 0.75, 0.1


def timm_step(model: nn.Module, image_BCYX: Tensor, label_B: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A step as timm's training script does it."""
    model.train()
    device = image_BCYX.device
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-4, weight_decay=0.05, layer_decay=LAYER_DECAY)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    criterion = LabelSmoothingCrossEntropy(SMOOTHING)

    def step() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = criterion(model(image_BCYX), label_B)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    return step


def our_classifier_step(
    model: nn.Module, image_BCYX: Tensor, label_B: Tensor, precision: Precision
) -> Callable[[], Tensor]:
    """A step as our loop does it."""
    model.train()
    backbone: Any = model.backbone
    config = OptimConfig(lr=1e-4, betas=(0.9, 0.999), eps=1e-8, layer_decay=LAYER_DECAY)
    optimizer = adamw(model, config, no_decay=backbone.no_weight_decay(), num_layers=backbone.num_layers)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(image_BCYX).float(), label_B, label_smoothing=SMOOTHING)

    return our_step(model, optimizer, precision, loss, clip_grad=None)


def measure(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Rows of one model."""
    image_BCYX = random_images(args.batch, args.image_size, device)
    label_B = torch.arange(args.batch, device=device) % NUM_CLASSES
    reduced = Precision("auto", device)
    steps: dict[str, Callable[[], Tensor]] = {}
    for precision in {"fp32": Precision("fp32", device), reduced.name: reduced}.values():
        own, peer = (build(name, args.image_size, DROP_PATH).to(device) for build in (ours, timms))
        same_size(own, peer)
        steps[f"timm {precision.name}"] = timm_step(peer, image_BCYX, label_B, precision.dtype)
        steps[f"openeva {precision.name}"] = our_classifier_step(own, image_BCYX, label_B, precision)
    print(f"{name}, batch {args.batch} at {args.image_size} px")
    seconds = alternate(steps, device, rounds=args.rounds)
    peers = {"timm fp32": "over_timm_fp32", f"timm {reduced.name}": f"over_timm_{reduced.name}"}
    return {"model": name, "rows": summary(seconds, peers, args.batch)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["eva_s_16", "eva02_s_14"], choices=MODELS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    results = [measure(name, args, device) for name in args.models]
    record = {"what": "finetune_step", "batch": args.batch, "image_size": args.image_size, "rounds": args.rounds,
              "environment": environment(device), "results": results}  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
