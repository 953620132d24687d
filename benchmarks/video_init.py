"""Does a video model that starts from an EVA of pictures need fewer clips than one from scratch? Does it use time?

Something moves left, right, up or down: a drawn object (`--data scenes`), or a camera over the photographs of
scikit-image (`--data photographs`). The clips are written as h264 files and decoded in training; no look is in both
training and test. A clip backwards is its opposite: with its frames shuffled a model can only guess. For each seed the
same small model sees the same clips in the same order, from scratch and from EVA (`pretrain/claim_init`: pictures of
drawn scenes, the demo's teacher). Writes an HTML report, a figure and JSON with every value; what is there already is
used again, so that the same command goes on after a stop, and several with one seed each share the cores.

    python benchmarks/video_init.py --json benchmarks/results/video_init_scenes_cpu.json
    python benchmarks/video_init.py --data photographs --json benchmarks/results/video_init_photographs_cpu.json
    python benchmarks/video_init.py --draw FIGURE.png benchmarks/results/video_init_{scenes,photographs}_cpu.json
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from rich.console import Console

from claim_init import costs, draw_curves, draw_or_measure, finish_panel, numbers_of
from openeva.checkpoints.native import is_complete
from openeva.config import load_config
from openeva.data import motion_clips
from openeva.data.clips import ViewsConfig
from openeva.engine.hardware import environment
from openeva.engine.precision import resolve_precision
from openeva.evaluate import open_run
from openeva.report import Group, Row, Table, print_tables, write_comparison
from openeva.report.page import read_facts
from openeva.train import Recipe, train

SCRATCH, EVA = "from scratch", "from EVA"
OPPOSITE = {"pan_left": "pan_right", "pan_up": "pan_down", "move_left": "move_right", "move_up": "move_down"}
MAIN = ["top1", "shuffled_top1", "held_out_loss"]
PRETRAINING = ["task.backbone.image_size=32", "task.backbone.patch_size=8", "data.train.0.num_images=16000",
               "data.val.0.num_images=200", "run.length=400000 samples"]  # fmt: skip


@dataclass(frozen=True)
class Data:
    """What moves.

    Attributes:
        question: Title of the figure.
        options: Of the clips.
    """

    question: str
    options: motion_clips.Options


SIZES = {"frames": 16, "size": 32}
DATA = {
    "scenes": Data(
        "Which way does the object move?",
        motion_clips.Options(
            num=12_000, actions=("move_left", "move_right", "move_up", "move_down"), easy=True, **SIZES
        ),
    ),
    "photographs": Data(
        "Which way does the camera move?",
        motion_clips.Options(
            images=Path(motion_clips.PHOTOGRAPHS), num=3000, actions=("pan_left", "pan_right", "pan_up", "pan_down"),
            **SIZES,
        ),
    ),
}  # fmt: skip
COLOURS = {SCRATCH: "#5d6573", EVA: "#2f6fdb"}


def run(recipe: str, out: Path, overrides: list[str], console: Console) -> Path:
    """A finished run's folder; trains it where it is not there."""
    if not is_complete(out / "model"):
        console.rule(out.name)
        if train(load_config(Recipe, recipe, [*overrides, f"run.out={out}"]), console=console).status == "stopped":
            raise KeyboardInterrupt
    return out


@torch.no_grad()
def direction(run_folder: Path) -> dict[str, dict[str, float]]:
    """Share of held-out clips of which the right one of two opposites is likelier, by pair, in order and shuffled."""
    opened = open_run(run_folder)
    task, found = opened.task, {}
    names = task.class_names
    pairs = [pair for pair in OPPOSITE.items() if pair[0] in names]
    other = {names.index(a): names.index(b) for pair in pairs for a, b in (pair, pair[::-1])}
    pair_of = {names.index(action): f"{a} or {b}" for a, b in pairs for action in (a, b)}
    for order in ("in order", "shuffled"):
        clip = ViewsConfig(shuffled=order == "shuffled").spec(task.backbone.num_frames)
        right: dict[str, list[bool]] = {}
        for batch in opened.held_out["val"].seen_as(replace(task.view_spec(train=False), clip=clip)):
            logits_BV = task.logits(batch["image"])
            for logits_V, label in zip(logits_BV, batch["label"].tolist(), strict=True):
                right.setdefault(pair_of[label], []).append(bool(logits_V[label] > logits_V[other[label]]))
        found[order] = {pair: float(np.mean(values)) for pair, values in right.items()}
        found[order]["all pairs"] = float(np.mean([value for values in right.values() for value in values]))
    return found


def directions_table(measured: dict[str, list[dict[str, dict[str, float]]]]) -> Table:
    pairs = list(next(iter(measured.values()))[0]["in order"])
    rows = [
        Row(
            name=f"{name}, frames {order}",
            values=[float(np.mean([seed[order][pair] for seed in seeds])) for pair in pairs],
        )
        for name, seeds in measured.items()
        for order in ("in order", "shuffled")
    ]
    return Table(
        title="Which of two opposite actions: mean of the seeds", columns=pairs, rows=rows,
        note="Guessing is right half of the time. With shuffled frames nothing else is possible.",
    )  # fmt: skip


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    folder = Path(args.out) / args.data
    chosen = DATA[args.data]
    options = replace(chosen.options, num=args.clips or chosen.options.num)
    motion_clips.build(folder / "clips", options, num_workers=args.workers)
    data = [f"data.{part}.0.{key}={folder / 'clips' / file}" for part in ("train", "val")
            for key, file in (("file", f"{part}.txt"), ("labels", "labels.csv"))]  # fmt: skip
    eva = run("pretrain/claim_init", Path(args.out) / "eva", PRETRAINING, console)
    starts = {SCRATCH: [], EVA: [f"task.init_from={eva}"]}
    runs = {
        name: [
            run("video/motion", folder / f"{name.replace(' ', '_')}-{seed}",
                [*data, f"run.seed={seed}", *start, *args.overrides], console)
            for seed in args.seeds
        ]
        for name, start in starts.items()
    }  # fmt: skip
    groups = [Group(name, [read_facts(one) for one in them]) for name, them in runs.items()]
    measured = {name: [direction(one) for one in them] for name, them in runs.items()}
    table = directions_table(measured)
    intro = (
        f"The same small video model on the same {options.num:,} clips (a fifth held out), decoded from h264 files:"
        " from scratch, and from an EVA that was pre-trained on pictures. Guessing is right in a quarter of the cases."
        " The samples and FLOPs of the pre-training are not in the curves; they are in the JSON file."
    )
    tables = write_comparison(
        groups, folder / "report.html", title="Starting a video model from EVA", intro=intro, main=MAIN, more=[table]
    )
    print_tables([*tables, table], console)
    console.print(f"report: {folder / 'report.html'}")
    return {
        "what": "video_init", "data": args.data, "clips": options.num, "actions": list(options.actions),
        "environment": environment(torch.device("cpu")),
        "precision": resolve_precision("auto", torch.device("cpu")),
        "seeds": args.seeds, "overrides": args.overrides, "main": MAIN,
        "groups": {group.name: numbers_of(group, groups[0]) for group in groups},
        "directions": measured, "costs": costs({"EVA": eva}, groups),
    }  # fmt: skip


def draw(file: Path, results: list[Path]) -> None:
    """A figure: accuracy against the clips seen, frames in order (solid) and shuffled (dotted); a panel per result."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(results), figsize=(5.2 * len(results) + 1, 4.1), squeeze=False)
    for panel, result in zip(panels[0], results, strict=True):
        record = json.loads(result.read_text())
        for name, found in record["groups"].items():
            for metric, style, title in (("top1", "-", ""), ("shuffled_top1", ":", ", frames shuffled")):
                draw_curves(panel, found[metric]["curves"], COLOURS[name], name + title, style)
        panel.axhline(100 / len(record["actions"]), color="#b0b6c0", linewidth=0.8)
        finish_panel(panel, f"{DATA[record['data']].question} Held-out clips, three seeds", "thousand clips seen")
        panel.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=2)
    figure.tight_layout()
    figure.savefig(file, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(DATA), default="scenes", help="what moves")
    parser.add_argument("--clips", type=int, help="held-out ones included (12,000 of scenes, 3,000 of photographs)")
    parser.add_argument("--workers", type=int, default=0, help="processes that write clips")
    parser.add_argument("--out", default="runs/video_init", help="clips, runs and report go to a folder below")
    parser.add_argument("overrides", nargs="*", help="changes to video/motion, such as 'run.length=3200 samples'")
    draw_or_measure(parser, draw, measure)


if __name__ == "__main__":
    main()
