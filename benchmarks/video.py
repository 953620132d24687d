"""Video: reading few frames against decoding every one, and a training step against one with unfused attention.

Reading: for each file, 16 frames spread over it by our reader (seek to key frames, leave out frames that no other one
needs), by decoding every frame and keeping 16, and by decord and torchcodec where they are installed; one core. Without
files, a drawn clip of ten seconds is written at 1280 x 720 and re-encoded by `openeva data videos --resize 256`.
Training: the task's own step, and the same with the attention of the official code (logits materialised in fp32),
alternating; the memory of each in a process of its own. On a GPU EVA-g with 8 and with 16 frames, eager, compiled and
with recomputed activations: clips/s, utilisation, peak memory.

    python benchmarks/video.py --out benchmarks/results/video_cpu.json
    python benchmarks/video.py --files clips/*.mp4 --parts read
    python benchmarks/video.py --device cuda --parts train --out benchmarks/results/video_h200.json
    python benchmarks/video.py --tiny                                    # shows that it runs
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alternate import alternate, free, peak_of, print_peak, summary, synchronise, task_step, time_steps
from gpu import OfficialAttention, official_step
from openeva.config import validate
from openeva.data.clips import central_indices
from openeva.data.motion import draw_motion, render_motion
from openeva.data.video import Decoder, Video
from openeva.data.video_resize import Options, resize_folder
from openeva.data.video_writer import write_video
from openeva.engine.hardware import environment, memory_gib, peak_flops
from openeva.engine.optim import OptimConfig, adamw
from openeva.engine.precision import Precision
from openeva.layers.attention import Attention
from openeva.tasks.video import Config, VideoTask

NUM_FRAMES = 16
OURS, UNFUSED = "openeva", "unfused attention"
CPU_MODEL = {"variant": "eva_ti_16", "num_frames": 8}
TINY = {"width": 32, "depth": 2, "num_heads": 2, "mlp_hidden": 64, "patch_size": 14, "image_size": 56, "num_frames": 4}


# -------------------------------------------------------------------------------------------------------- reading


def drawn_videos(folder: Path, *, tiny: bool) -> list[Path]:
    """A clip of ten seconds as a camera would write it, and made small."""
    size, num_frames = ((72, 128), 40) if tiny else ((720, 1280), 250)
    large, small = folder / "raw" / "720p.mp4", folder / "small" / "720p.mp4"
    write_video(large, render_motion(draw_motion(0, 0, num_frames, drift=True), size), fps=25)
    resize_folder(large.parent, small.parent, Options(resize="36" if tiny else "256"))
    return [large, small.rename(small.with_name("256.mp4"))]


def read_some(path: Path, decoder: Decoder) -> Callable[[], Any]:
    def read() -> Any:
        with Video(path, decoder=decoder).opened() as video:
            return video.frames(central_indices(video.num_frames, NUM_FRAMES))

    return read


def read_every(path: Path, length: int) -> Callable[[], Any]:
    """What a reader does that cannot skip: every frame is decoded, those that are wanted become pixels."""

    def read() -> Any:
        import av

        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            wanted = set(central_indices(length, NUM_FRAMES).tolist())
            return np.stack(
                [f.to_ndarray(format="rgb24") for n, f in enumerate(container.decode(stream)) if n in wanted]
            )

    return read


def read_decord(path: Path) -> Callable[[], Any]:
    """The official reader, in its faster way: all frames in one call."""

    def read() -> Any:
        import decord

        reader = decord.VideoReader(str(path), num_threads=1)
        return reader.get_batch(central_indices(len(reader), NUM_FRAMES)).asnumpy()

    return read


def measure_reading(path: Path, rounds: int) -> dict[str, Any]:
    with Video(path).opened() as video:
        length, shape = video.num_frames, video.frames([0]).shape[1:3]
    readers: dict[str, Callable[[], Any]] = {OURS: read_some(path, "pyav"), "every frame": read_every(path, length)}
    if importlib.util.find_spec("torchcodec"):
        readers["torchcodec"] = read_some(path, "torchcodec")
    if importlib.util.find_spec("decord"):
        readers["decord"] = read_decord(path)
    facts = {"file": path.name, "frames": length, "size": list(shape), "bytes": path.stat().st_size}
    print(facts, flush=True)
    frames = {name: read() for name, read in readers.items()}
    alike = {name: int(np.abs(f.astype(int) - frames[OURS]).max()) for name, f in frames.items() if name != OURS}
    seconds = alternate(readers, torch.device("cpu"), rounds=rounds, warmup=1)
    rows = summary(seconds, {"every frame": "over_every_frame"}, NUM_FRAMES)
    return {**facts, "wanted": NUM_FRAMES, "largest_difference": alike, "rows": rows}


# ------------------------------------------------------------------------------------------------------- training


def build(backbone: dict[str, Any], device: torch.device) -> VideoTask:
    content = {"name": "video", "backbone": {"name": "vit", **backbone}, "num_classes": 400}
    return validate(Config, content).build().to(device).train()


def make_batch(task: VideoTask, size: int) -> dict[str, Tensor]:
    shape = (size, task.config.backbone.num_frames, 3, *task.backbone.image_size)
    device = next(task.parameters()).device
    return {
        "image": torch.randint(0, 256, shape, dtype=torch.uint8, device=device),
        "label": torch.randint(0, 400, (size,), device=device),
    }


def unfuse(task: VideoTask) -> None:
    for module in task.modules():
        if type(module) is Attention:
            module.__class__ = OfficialAttention


def make_step(contender: str, backbone: dict[str, Any], batch: int, precision: Precision) -> Callable[[], Tensor]:
    task = build(backbone, precision.device)
    if contender == UNFUSED:
        unfuse(task)
    optimizer = adamw(task.trainable, OptimConfig(lr=1e-5), no_decay=task.backbone.no_weight_decay(), num_layers=1)
    return task_step(task, make_batch(task, batch), optimizer, precision, clip_grad=None)


def measure_step_on_cpu(args: argparse.Namespace, precision_name: str) -> dict[str, Any]:
    precision, backbone = Precision(precision_name, torch.device("cpu")), TINY if args.tiny else CPU_MODEL
    steps = {name: make_step(name, backbone, args.batch, precision) for name in (UNFUSED, OURS)}
    print(f"{backbone}, batch {args.batch}, {precision.name}", flush=True)
    rows = summary(alternate(steps, precision.device, rounds=args.rounds), {UNFUSED: "over_unfused"}, args.batch)
    task = build(backbone, precision.device)
    for row in rows:
        command = [sys.executable, __file__, "--memory-of", row["step"], "--batch", str(args.batch)]
        command += ["--precisions", precision_name, *(["--tiny"] if args.tiny else [])]
        row["peak_gib"] = peak_of(command)
        row["gflops_per_s"] = task.flops_per_sample() * row["images_per_s"] / 1e9
        print(f"{row['step']:34s} {row['peak_gib']:8.2f} GiB at most", flush=True)
    tokens = 1 + task.config.backbone.slots * task.backbone.grid[0] * task.backbone.grid[1]
    return {
        "backbone": backbone, "tokens": tokens, "batch": args.batch, "precision": precision.name,
        "gflops_per_clip": task.flops_per_sample() / 1e9, "rows": rows,
    }  # fmt: skip


def measure_on_gpu(num_frames: int, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """EVA-g as the official code trains it and as ours does; the official batch, and the largest of ours that fits."""
    rows = []
    variants = [
        ("official way", {"activation_checkpointing": True}, 2 if num_frames == 8 else 1, "off"),
        ("ours, eager, recomputed", {"activation_checkpointing": True}, 16 if num_frames == 8 else 8, "off"),
        ("ours, compiled blocks, recomputed", {"activation_checkpointing": True}, 16 if num_frames == 8 else 8, "on"),
        ("ours, compiled blocks", {}, 4 if num_frames == 8 else 2, "on"),
    ]
    for label, options, batch_size, compile_mode in variants:
        free(device)
        backbone = {"variant": "eva_g_14", "num_frames": num_frames, **options, **(TINY if args.tiny else {})}
        row: dict[str, Any] = {"frames": num_frames, "step": label, "batch": batch_size}
        try:
            task = build(backbone, device)
            batch = make_batch(task, batch_size)
            if label == "official way":
                step = official_step(task, batch, device)  # type: ignore[arg-type]
            else:
                if compile_mode == "on":
                    for block in task.blocks():
                        block.compile()
                optimizer = adamw(
                    task.trainable, OptimConfig(lr=1e-5), no_decay=task.backbone.no_weight_decay(), num_layers=1
                )
                step = task_step(task, batch, optimizer, Precision("auto", device), clip_grad=None)
            seconds = time_steps(step, device, args.rounds)
            flops = batch_size * task.flops_per_sample()  # what is recomputed does not count
            row |= {
                "median_s": seconds, "clips_per_s": batch_size / seconds,
                "frames_per_s": batch_size * num_frames / seconds, "tflops_per_s": flops / seconds / 1e12,
                "mfu": flops / seconds / peak_flops(device, torch.bfloat16), "peak_gib": memory_gib(device),
            }  # fmt: skip
            del task, batch, step
        except torch.OutOfMemoryError as error:
            row["error"] = str(error).splitlines()[0]
        rows.append(row)
        print(row, flush=True)
    official = rows[0].get("clips_per_s")
    for row in rows:
        if official and "clips_per_s" in row:
            row["ratio_to_official_way"] = row["clips_per_s"] / official
    synchronise(device)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["read", "train"], choices=["read", "train"])
    parser.add_argument("--files", nargs="+", type=Path, default=[], help="videos to read (default: drawn ones)")
    parser.add_argument("--precisions", nargs="+", default=["fp32"], choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--batch", type=int, default=2, help="clips per step on a CPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-of", choices=(OURS, UNFUSED), help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help="CPU threads of the step (default: all)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny dimensions, to show that everything runs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.memory_of:
        backbone, precision = TINY if args.tiny else CPU_MODEL, Precision(args.precisions[0], device)
        print_peak(lambda: make_step(args.memory_of, backbone, args.batch, precision), device)
        return
    record: dict[str, Any] = {"what": "video", "environment": environment(device), "reading": [], "training": []}
    if "read" in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            for path in args.files or drawn_videos(Path(folder), tiny=args.tiny):
                record["reading"].append(measure_reading(path, args.rounds))
    if "train" in args.parts and device.type == "cuda":
        record["training"] = [row for frames in (8, 16) for row in measure_on_gpu(frames, args, device)]
    elif "train" in args.parts:
        record["training"] = [measure_step_on_cpu(args, name) for name in args.precisions]
    if args.out:
        args.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
