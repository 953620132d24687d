"""Pre-training steps at real sizes on a GPU: images/s, utilisation, peak memory, ratio to a step in the official way.

First the device's own ceilings (matrix products, copies), then EVA-g/14 with a CLIP-L/14 teacher, EVA-L/14 and
EVA-B/16: eager and compiled, on synthetic batches that already lie on the device, and a reference step (fp16 autocast,
attention logits materialised in fp32, GradScaler, the loss read at every step); then EVA-CLIP g/14 against open_clip at
growing batches (`gpu_clip.py`), and the whole loop on JPEG files.

    python benchmarks/gpu.py --out benchmarks/results/gpu_h200.json              # everything, about 20 minutes
    python benchmarks/gpu.py --models eva01_clip_g_14                            # EVA-CLIP only
    python benchmarks/gpu.py --models eva_b_16 --tiny --device cpu               # shows that it runs, without a GPU
"""

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alternate import free, task_step, time_steps
from gpu_clip import CLIP_MODEL, measure_clip
from openeva.config import validate
from openeva.data.sources.scenes import Config as ScenesConfig
from openeva.engine.hardware import environment, measured_matmul_flops, peak_flops
from openeva.engine.log import read_log
from openeva.engine.optim import OptimConfig, adamw
from openeva.engine.precision import Precision
from openeva.layers.attention import Attention
from openeva.tasks.pretrain import Config as PretrainConfig
from openeva.tasks.pretrain import PretrainTask
from openeva.train import Recipe, train

MODELS: dict[str, dict[str, Any]] = {
    "eva_g_14": {"batch": 64, "teacher": "ViT-L-14", "teacher_size": 224, "masked": 105},
    "eva_l_14": {"batch": 128, "teacher": "ViT-L-14", "teacher_size": 224, "masked": 105},
    "eva_b_16": {"batch": 256, "teacher": "ViT-B-16", "teacher_size": 224, "masked": 75},
}
TINY = {"width": 64, "depth": 2, "num_heads": 4, "mlp_hidden": 128, "image_size": 56}


class OfficialAttention(Attention):
    """Attention as the official code computes it: logits materialised in fp32, q scaled first."""

    def forward(self, x_BSD: Tensor, *_: object) -> Tensor:
        """Attend; the other arguments are not used by EVA."""
        qkv = F.linear(x_BSD, self.qkv.weight, self._bias())
        q_BHSK, k_BHSK, v_BHSK = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        with torch.autocast(x_BSD.device.type, enabled=False):
            logits_BHSS = (q_BHSK * q_BHSK.shape[-1] ** -0.5).float() @ k_BHSK.float().transpose(-2, -1)
            weights_BHSS = logits_BHSS.softmax(dim=-1).to(v_BHSK.dtype)
        return self.proj((weights_BHSS @ v_BHSK).transpose(1, 2).flatten(2))


def build_task(
    name: str, spec: dict[str, Any], device: torch.device, *, tiny: bool, checkpointing: bool = False
) -> PretrainTask:
    backbone: dict[str, Any] = {
        "name": "vit",
        "variant": name,
        "drop_path": 0.1,
        "activation_checkpointing": checkpointing,
    }
    teacher: dict[str, Any] = {"name": "open_clip", "model": spec["teacher"], "pretrained": "random"}
    masked = spec["masked"]
    if tiny:
        backbone |= TINY | {"patch_size": 14}
        teacher = {"name": "vit", **TINY, "patch_size": 14}
        masked = 6
    content = {
        "backbone": backbone,
        "target": {"name": "features", "teacher": teacher},
        "masking": {"name": "block", "num_masked": masked, "min_block": 4},
    }
    return validate(PretrainConfig, content).build().to(device)


def make_batch(task: PretrainTask, size: int, device: torch.device) -> dict[str, Tensor]:
    spec, rng = task.view_spec(train=True), random.Random(0)
    mask_BN = torch.stack([torch.from_numpy(task.masking(rng)).flatten() for _ in range(size)])
    index_M = mask_BN.flatten().nonzero()[:, 0]
    length = size * task.masking.max_masked
    batch = {
        "image": torch.randint(0, 256, (size, 3, *spec.image_size), dtype=torch.uint8),
        "mask": mask_BN,
        "masked_index": F.pad(index_M, (0, length - len(index_M))),
        "masked_weight": (torch.arange(length) < len(index_M)).float(),
    }
    if spec.second_size is not None:
        batch["target_image"] = torch.randint(0, 256, (size, 3, *spec.second_size), dtype=torch.uint8)
    return {key: value.to(device) for key, value in batch.items()}


def our_step(
    task: PretrainTask, batch: dict[str, Tensor], device: torch.device, compile_mode: str
) -> Callable[[], Tensor]:
    task.train()
    if compile_mode == "blocks":
        for block in task.blocks():
            block.compile()
    elif compile_mode == "model":
        task.trainable.compile()
    task.speed_up_frozen(compile_forward=compile_mode != "off")
    optimizer = adamw(task.trainable, OptimConfig(lr=1e-5), no_decay=task.backbone.no_weight_decay(), num_layers=1)
    return task_step(task, batch, optimizer, Precision("auto", device), clip_grad=3.0)


def official_step(task: PretrainTask, batch: dict[str, Tensor], device: torch.device) -> Callable[[], Tensor]:
    task.train()
    for module in task.modules():
        if type(module) is Attention:
            module.__class__ = OfficialAttention
    optimizer = torch.optim.AdamW(task.trainable.parameters(), lr=1e-5, betas=(0.9, 0.98), eps=1e-6, fused=True)
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(device.type, enabled=half == torch.float16)

    def step() -> Tensor:
        with torch.autocast(device.type, half):
            loss, _ = task(batch)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(task.trainable.parameters(), 3.0)
        scaler.step(optimizer)
        scaler.update()
        loss.item()  # the official loop reads the loss at every step
        return loss

    return step


def measure_model(name: str, device: torch.device, args: argparse.Namespace) -> list[dict[str, Any]]:
    spec = MODELS[name] | ({"batch": 4} if args.tiny else {})
    variants: list[tuple[str, dict[str, Any]]] = [
        ("official way", {}),
        ("ours, eager", {"compile_mode": "off"}),
        ("ours, compiled blocks", {"compile_mode": "blocks"}),
        ("ours, compiled model", {"compile_mode": "model"}),
        ("ours, compiled blocks, activation checkpointing", {"compile_mode": "blocks", "checkpointing": True}),
    ]  # fmt: skip
    rows: list[dict[str, Any]] = []
    for label, options in variants:
        free(device)
        batch_size = spec["batch"] if not options.get("checkpointing") else max(1, spec["batch"] // 4)
        row: dict[str, Any] = {"model": name, "step": label, "batch": batch_size}
        try:
            task = build_task(name, spec, device, tiny=args.tiny, checkpointing=options.get("checkpointing", False))
            batch = make_batch(task, batch_size, device)
            if label == "official way":
                step = official_step(task, batch, device)
            else:
                step = our_step(task, batch, device, options["compile_mode"])
            seconds = time_steps(step, device, args.repeats)
            flops = batch_size * task.flops_per_sample()
            row |= {
                "median_s": seconds, "images_per_s": batch_size / seconds, "tflops_per_s": flops / seconds / 1e12,
                "mfu": flops / seconds / peak_flops(device, torch.bfloat16),
                "teacher_share_of_flops": task.target.flops() / task.flops_per_sample(),
                "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
            }  # fmt: skip
            del task, batch, step
        except torch.OutOfMemoryError as error:
            row["error"] = str(error).splitlines()[0]
        rows.append(row)
        print(
            "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if v is not None),
            flush=True,
        )
    official = rows[0].get("images_per_s")
    for row in rows:
        if official and "images_per_s" in row:
            row["ratio_to_official_way"] = row["images_per_s"] / official
    return rows


def measure_loading(name: str, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """The whole loop on JPEG files: throughput and the share of time spent waiting for data."""
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        source = ScenesConfig(size=64 if args.tiny else (375, 500)).build()
        for index in range(64 if args.tiny else 2048):
            sample = source.read(index)
            image = sample.image
            assert not isinstance(image, bytes)
            image.save(images / f"{index:05d}.jpg", quality=90)
        spec = MODELS[name] | ({"batch": 4} if args.tiny else {})
        backbone = {"name": "vit", "variant": name} | (TINY | {"patch_size": 14} if args.tiny else {})
        teacher = {"name": "open_clip", "model": spec["teacher"], "pretrained": "random"}
        if args.tiny:
            teacher = {"name": "vit", **TINY, "patch_size": 14}
        recipe = validate(Recipe, {
            "task": {"name": "pretrain", "backbone": backbone, "target": {"name": "features", "teacher": teacher},
                     "masking": {"name": "block", "num_masked": 6 if args.tiny else spec["masked"], "min_block": 4}},
            "data": {"train": [{"name": "image_folder", "roots": [str(images)]}]},
            "optim": {"warmup": "2 steps"},
            "run": {"out": f"{folder}/run", "length": "6 steps" if args.tiny else "60 steps",
                    "batch_size": spec["batch"], "device": str(device.type), "save_every": "0 steps",
                    "log_every": "2 steps" if args.tiny else "20 steps",
                    "compile": "off" if args.tiny else "model"},
        })  # fmt: skip
        train(recipe)
        last = read_log(Path(folder) / "run")[-1]
        return {
            "model": name,
            **{k: last[k] for k in ("samples_per_s", "mfu", "share_data", "share_teacher", "memory_gib")},
        }


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second read and written by a device-side copy."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / time_steps(lambda: target.copy_(source), device, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*MODELS, CLIP_MODEL], choices=[*MODELS, CLIP_MODEL])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny dimensions, to show that everything runs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    record: dict[str, Any] = {
        "what": "gpu", "environment": environment(device),
        "matmul_tflops": {
            str(dtype): measured_matmul_flops(device, dtype, 1.0) / 1e12 for dtype in (torch.bfloat16, torch.float32)
        },
        "copy_gb_per_s": copy_bandwidth(device) / 1e9, "peak_tflops": peak_flops(device, torch.bfloat16) / 1e12,
        "steps": [],
    }  # fmt: skip
    print({key: value for key, value in record.items() if key != "steps"}, flush=True)
    for name in args.models:
        if name == CLIP_MODEL:
            record["clip_steps"] = measure_clip(device, args)
        else:
            record["steps"] += measure_model(name, device, args)
        if args.out:
            args.out.write_text(json.dumps(record, indent=1))
    free(device)
    if pretrained := [name for name in args.models if name in MODELS]:
        record["loading"] = measure_loading(pretrained[-1], device, args)
        print(record["loading"])
    if args.out:
        args.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
