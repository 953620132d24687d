"""One masked pre-training step against timm's ViT of the same size, alternating in one process.

Peers: timm's model trained eagerly in fp32, and the same in our precision. All do the same work on the same given
batch: hidden patches replaced by a token, prediction at the hidden patches, negative cosine against given features,
clipping, AdamW. The teacher is left out, because it costs both the same. Prints medians and ratios; writes JSON with
the machine's name.

    python benchmarks/pretrain_step.py --variant eva_s_16 --batch 32 --rounds 7 --out
    benchmarks/results/pretrain_step_cpu.json
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from alternate import alternate, our_step, summary
from openeva.backbones.vit import Config
from openeva.data.masking import BlockMasking
from openeva.engine.hardware import environment, measured_matmul_flops
from openeva.engine.optim import OptimConfig, adamw
from openeva.engine.precision import Precision
from openeva.losses.cosine import negative_cosine
from openeva.tasks.pretrain import MimStudent

TIMM_NAMES = {
    "eva_ti_16": "vit_tiny_patch16_224",
    "eva_s_16": "vit_small_patch16_224",
    "eva_b_16": "vit_base_patch16_224",
}
TARGET_WIDTH = 512


class TimmStudent(nn.Module):
    """timm's ViT as a masked student, used as a library user would."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.vit = timm.create_model(name, num_classes=0)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.vit.embed_dim))
        self.head = nn.Linear(self.vit.embed_dim, TARGET_WIDTH)

    def forward(self, image_BCYX: Tensor, mask_BN: Tensor) -> Tensor:
        """Predictions at the hidden patches."""
        x_BND = self.vit.patch_embed(image_BCYX)
        mask_BN1 = mask_BN[:, :, None].type_as(x_BND)
        x_BSD = self.vit._pos_embed(x_BND * (1 - mask_BN1) + self.mask_token * mask_BN1)
        x_BSD = self.vit.norm(self.vit.blocks(self.vit.norm_pre(x_BSD)))
        return self.head(x_BSD[:, 1:][mask_BN])


def timm_step(name: str, batch: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    model = TimmStudent(name).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), weight_decay=0.05)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def step() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            predicted_MV = model(batch["image"], batch["mask"])
        target_MV = batch["target"][batch["mask"]]
        loss = -nn.functional.cosine_similarity(predicted_MV.float(), target_MV, dim=-1).mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return step


def our_student_step(
    variant: str, batch: dict[str, Tensor], device: torch.device, precision_name: str, compile_mode: str
) -> Callable[[], Tensor]:
    student = MimStudent(Config(variant=variant).build(), TARGET_WIDTH).to(device)
    optimizer = adamw(student, OptimConfig(lr=1e-4), no_decay=student.backbone.no_weight_decay(), num_layers=12)
    precision = Precision(precision_name, device)
    if compile_mode == "model":
        student.compile()
    elif compile_mode == "blocks":
        for block in student.backbone.blocks:
            block.compile()
    target_MV = batch["target"].flatten(0, 1)

    def loss() -> Tensor:
        predicted_MV = student(batch["image"], batch["mask"], batch["masked_index"])
        wanted_MV = target_MV.index_select(0, batch["masked_index"])
        return negative_cosine(predicted_MV, wanted_MV, batch["masked_weight"])

    return our_step(student, optimizer, precision, loss, clip_grad=3.0)


def make_batch(size: int, device: torch.device) -> dict[str, Tensor]:
    import random

    masking = BlockMasking(num_masked=75).build((14, 14))
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    mask_BN = torch.stack([torch.from_numpy(masking(rng)).flatten() for _ in range(size)])
    index_M = mask_BN.flatten().nonzero()[:, 0]
    padded = torch.zeros(size * 75, dtype=torch.int64)
    padded[: len(index_M)] = index_M
    batch = {
        "image": torch.randn(size, 3, 224, 224, generator=generator),
        "mask": mask_BN,
        "masked_index": padded,
        "masked_weight": (torch.arange(size * 75) < len(index_M)).float(),
        "target": torch.randn(size, 196, TARGET_WIDTH, generator=generator),
    }
    return {key: value.to(device) for key, value in batch.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="eva_s_16", choices=TIMM_NAMES)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", nargs="*", default=["off", "model"], help="variants of ours to time")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    batch = make_batch(args.batch, device)
    precision = Precision(args.precision, device)
    name = TIMM_NAMES[args.variant]
    steps = {
        "timm fp32": timm_step(name, batch, device, torch.float32),
        f"timm {precision.name}": timm_step(name, batch, device, precision.dtype),
        **{
            f"openeva {precision.name}, compile {c}": our_student_step(args.variant, batch, device, precision.name, c)
            for c in args.compile
        },
        **{
            f"openeva fp32, compile {c}": our_student_step(args.variant, batch, device, "fp32", c) for c in args.compile
        },
    }
    seconds = alternate(steps, device, rounds=args.rounds)
    student = MimStudent(Config(variant=args.variant).build(), TARGET_WIDTH)
    flops = args.batch * 3 * (student.backbone.flops() + 2.0 * 75 * student.backbone.width * TARGET_WIDTH)
    peaks = {n: measured_matmul_flops(device, Precision(n, device).dtype) for n in {"fp32", precision.name}}
    results = summary(seconds, {"timm fp32": "speedup_over_timm_fp32"}, args.batch)
    for row in results:
        kind = "fp32" if "fp32" in row["step"] else precision.name
        rate = flops / row["median_s"]
        row |= {"gflops_per_s": rate / 1e9, "share_of_square_matmul": rate / peaks[kind]}
    record = {"what": "pretrain_step", "variant": args.variant, "batch": args.batch, "rounds": args.rounds,
              "environment": environment(device), "square_matmul_gflops": {k: v / 1e9 for k, v in peaks.items()},
              "results": results}  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
