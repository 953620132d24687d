"""The paper's claim at a size that runs here: does a CLIP that starts from EVA need fewer pairs than one from scratch?

For each seed the same small CLIP sees the same pairs in the same order, from scratch and from EVA. EVA's teacher is the
CLIP from scratch of the first seed: teacher -> EVA -> EVA-CLIP. With `--loop` once around the paper's loop: that
EVA-CLIP teaches a second EVA, and CLIPs start from it. With `--imagenet` another start: an EVA whose teacher has never
seen the data (the demo's EfficientNet-Lite0). Writes an HTML report, JSON with every value, and a figure; what is there
already is used again, so that the same command goes on after a stop.

    python benchmarks/claim_init.py --loop --json benchmarks/results/claim_init_scenes_cpu.json
    openeva data emoji --out data/emoji --no-skin-tones
    python benchmarks/claim_init.py --data emoji --imagenet --out runs/claim_init/emoji
    python benchmarks/claim_init.py --draw docs/claim_init.png benchmarks/results/claim_init_*_cpu.json
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from rich.console import Console

from openeva.checkpoints.native import is_complete
from openeva.config import load_config
from openeva.data.loader import EvalLoader
from openeva.data.mixture import Mixture
from openeva.data.views import ViewSpec
from openeva.engine.hardware import environment
from openeva.evals.base import extract_features
from openeva.evals.linear_probe import probe
from openeva.evaluate import open_run
from openeva.report import Group, Row, Table, Value, print_tables, write_comparison
from openeva.report.page import read_facts
from openeva.train import Recipe, train

SCRATCH, EVA, EVA2, IMAGENET = "from scratch", "from EVA", "from the second EVA", "from EVA, ImageNet teacher"
MAIN = {
    "scenes": ["retrieval_i2t_r10", "retrieval_t2i_r10", "colour_zeroshot_top1", "shape_zeroshot_top1",
               "pattern_zeroshot_top1"],
    "emoji": ["retrieval_i2t_r10", "retrieval_t2i_r10", "zeroshot_top1"],
}  # fmt: skip
"""Metrics that are drawn first, and the tables' rows."""
COLOURS = {SCRATCH: "#5d6573", EVA: "#2f6fdb", EVA2: "#2a9d6f", IMAGENET: "#d9622b"}


class Experiment:
    """The runs of one data set, each done once.

    Args:
        args: Of the command line.
        console: Where to show progress.
    """

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self.args, self.console, self.folder = args, console, Path(args.out)
        self.data: dict[str, list[str]] = {"clip": [], "pretrain": []}
        self.clip = "clip/claim_init"
        if args.data == "emoji":
            self.clip = "clip/claim_init_emoji"
            train_shards, test_shards = (f"shards: ['{args.emoji}/{part}/*.tar']" for part in ("train", "test"))
            key = "name: webdataset, caption_key: json"
            test = f"data.val=[{{{key}, {test_shards}, num_classes: 10}}]"
            self.data["clip"] = [f"data.train=[{{{key}, {train_shards}}}]", test,
                                 f"evals.1.class_names={args.emoji}/classes.txt"]  # fmt: skip
            self.data["pretrain"] = [f"data.train=[{{name: webdataset, {train_shards}}}]",
                                     f"data.val=[{{name: webdataset, {test_shards}}}]"]  # fmt: skip

    def run(self, recipe: str, name: str, overrides: Sequence[str]) -> Path:
        """A finished run's folder; trains it where it is not there."""
        out = self.folder / name
        if not is_complete(out / "model"):
            self.console.rule(name)
            shared = [*self.data[recipe.partition("/")[0]], *self.args.overrides, f"run.out={out}"]
            result = train(load_config(Recipe, recipe, [*shared, *overrides]), console=self.console)
            if result.status == "stopped":
                raise KeyboardInterrupt
        return out

    def eva(self, name: str, teacher: Path | None = None) -> Path:
        """Masked pre-training on the features of a CLIP; of the recipe's own teacher where none is given."""
        of_clip = [f"task.target.teacher={{name: vit, weights: {teacher}}}", "task.target.image_size=null",
                   "task.target.cache=false"]  # fmt: skip
        return self.run("pretrain/claim_init", name, of_clip if teacher else [])

    def clips(self, name: str, start: Path | None) -> list[Path]:
        """A CLIP per seed; all starts see the same pairs at the same seed."""
        starts = [] if start is None else [f"task.init_image={start}"]
        seeds = self.args.seeds
        return [self.run(self.clip, f"{name}-{seed}", [f"run.seed={seed}", *starts]) for seed in seeds]


def probes(runs: dict[str, tuple[Path, bool]], folder: Path) -> dict[str, dict[str, float]]:
    """Accuracy of a linear probe on the frozen features of image encoders.

    Args:
        runs: What it is -> its run, and whether its trained weights are meant (False: those it started with).
        folder: Where values are kept.
    """
    file = folder / "probes.json"
    found: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.is_file() else {}
    for name, (run, trained) in runs.items():
        if name not in found:
            found[name] = _probe(run, trained)
            file.write_text(json.dumps(found, indent=1))
    return found


LABELS = {"scenes": {"colour": "colour", "shape": "shape", "pattern": "pattern"}, "webdataset": {"group": ""}}


def _probe(run: Path, trained: bool) -> dict[str, float]:
    opened = open_run(run, trained=trained)
    recipe, accuracies = opened.recipe, {}
    name = recipe.data.train[0].name
    for title, label in LABELS[name].items():
        parts = []
        for source, limit in ((recipe.data.train[0], 4000), (recipe.data.val[0], 1500)):
            changes: dict[str, Any] = {"captions": False, "label": label, "num_images": limit}
            if name == "webdataset":
                changes = {"num_classes": 10, "caption_key": None}
            images = Mixture([source.model_copy(update=changes).build()], [1.0])
            view = ViewSpec(opened.task.backbone.image_size)
            loader = EvalLoader(images, view, recipe.data.val_crop, batch_size=128, limit=limit)
            parts.append(extract_features(opened.task.backbone, loader))
        fit, test = parts
        accuracies[title] = probe(fit.pooled.numpy(), fit.labels.numpy(), test.pooled.numpy(), test.labels.numpy())[
            "probe_accuracy"
        ]
    return accuracies


def costs(starts: dict[str, Path], groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Samples and FLOPs of every stage."""
    rows = []
    for name, run in [*starts.items(), *((group.name, group.runs[0].run) for group in groups)]:
        facts = read_facts(run)
        tflop = sum(record["tflops_per_s"] * seconds for record, seconds in facts.intervals())
        rows.append({"run": name, "samples": facts.training[-1]["samples"], "tflop": tflop, "seconds": facts.seconds})
    return rows


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Everything, in order; returns what is written as JSON."""
    experiment = Experiment(args, console)
    scratch = experiment.clips("scratch", None)
    starts = {"EVA": experiment.eva("eva", scratch[0])}
    from_eva = experiment.clips("from_eva", starts["EVA"])
    named = {SCRATCH: scratch, EVA: from_eva}
    if args.loop:
        starts["second EVA"] = experiment.eva("eva2", from_eva[0])
        named[EVA2] = experiment.clips("from_eva2", starts["second EVA"])
    if args.imagenet:
        starts["EVA, ImageNet teacher"] = experiment.eva("eva_imagenet")
        named[IMAGENET] = experiment.clips("from_eva_imagenet", starts["EVA, ImageNet teacher"])
    groups = [Group(name, [read_facts(run) for run in runs]) for name, runs in named.items()]
    encoders = {
        "random initialisation": (scratch[0], False),
        "CLIP from scratch, EVA's teacher": (scratch[0], True),
        "EVA": (starts["EVA"], True),
        "CLIP from EVA": (from_eva[0], True),
    }
    if args.loop:
        encoders["second EVA, taught by that CLIP"] = (starts["second EVA"], True)
        encoders["CLIP from the second EVA"] = (named[EVA2][0], True)
    if args.imagenet:
        encoders["EVA, ImageNet teacher"] = (starts["EVA, ImageNet teacher"], True)
    probed = probes(encoders, experiment.folder)
    main = [metric for metric in MAIN[args.data] if metric in groups[0].metrics()]
    table = Table(
        title="Linear probe on frozen features of the image encoders, in the order of their making",
        columns=list(next(iter(probed.values()))),
        rows=[Row(name=name, values=list(values.values())) for name, values in probed.items()],
        note="Held-out pictures, one run each: differences of some hundredths are chance.",
    )
    intro = (
        "The same small CLIP on the same pairs: from scratch, and from an EVA that was pre-trained without captions on"
        " the features of a teacher. The samples and FLOPs of that pre-training are not in the curves; they are in the"
        " JSON file. " + (f"Pairs: {args.data}.")
    )
    tables = write_comparison(
        groups, experiment.folder / "report.html", title=f"Starting from EVA: {args.data}", intro=intro, main=main,
        more=[table],
    )  # fmt: skip
    print_tables([*tables, table], console)
    console.print(f"report: {experiment.folder / 'report.html'}")
    return {
        "what": "claim_init", "data": args.data, "environment": environment(torch.device("cpu")), "seeds": args.seeds,
        "overrides": args.overrides, "main": main,
        "groups": {group.name: numbers_of(group, groups[0]) for group in groups}, "probes": probed,
        "costs": costs(starts, groups),
    }  # fmt: skip


def numbers_of(group: Group, first: Group) -> dict[str, Any]:
    """Curves of every seed, final values, and the samples until the first group's final value."""
    found: dict[str, Any] = {}
    for metric in sorted(group.metrics()):
        final, goal = group.final(metric), first.final(metric)
        found[metric] = {"curves": group.curves(metric), "final": _plain(final)}
        if group is not first and goal is not None:
            found[metric]["samples_until_first"] = _plain(group.samples_until(metric, goal.mean))
    return found


def _plain(value: Value | None) -> dict[str, Any] | None:
    return None if value is None else {"mean": value.mean, "std": value.std, "n": value.n}


def draw_curves(panel: Any, curves: list[Any], colour: str, label: str, style: str = "-") -> None:
    """Mean and range over seeds, in percent, against thousands of samples."""
    found = np.array(curves)  # [seeds, points, 2]
    samples, values = found[0, :, 0] / 1000, 100 * found[:, :, 1]
    panel.plot(samples, values.mean(0), style, color=colour, label=label, linewidth=1.8)
    panel.fill_between(samples, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)


def finish_panel(panel: Any, title: str, seen: str) -> None:
    """Title, axes and grid."""
    panel.set_title(title, fontsize=10)
    panel.set_xlabel(seen, fontsize=9)
    panel.set_ylabel("%", fontsize=9)
    panel.set_ylim(bottom=0)
    panel.set_xlim(left=0)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def draw(file: Path, results: Sequence[Path]) -> None:
    """A figure: a row per data set, a panel per metric."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    records = [json.loads(result.read_text()) for result in results]
    width = max(len(record["main"][:3]) for record in records)
    figure, axes = plt.subplots(len(records), width, figsize=(4.2 * width, 3.1 * len(records)), squeeze=False)
    for record, row in zip(records, axes, strict=True):
        for panel in row[len(record["main"]) :]:
            panel.axis("off")
        for metric, panel in zip(record["main"][:width], row, strict=False):
            for name, found in record["groups"].items():
                draw_curves(panel, found[metric]["curves"], COLOURS[name], name)
            finish_panel(panel, f"{record['data']}: {metric.replace('_', ' ')}", "thousand pairs seen")
    lines = {label: line for panel in axes.flat for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncol=len(lines), frameon=False, fontsize=10)
    figure.tight_layout(rect=(0, 0.3 / figure.get_figheight(), 1, 1))
    figure.savefig(file, dpi=110)


def draw_or_measure(
    parser: argparse.ArgumentParser,
    draw: Callable[[Path, list[Path]], None],
    measure: Callable[[argparse.Namespace, Console], dict[str, Any]],
) -> None:
    """The command line of a comparison of starts: its figure from results that are there, or all runs and JSON."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="file of results")
    parser.add_argument("--draw", type=Path, metavar="PNG", help="only draw the results given as further arguments")
    args = parser.parse_args()
    if args.draw:
        draw(args.draw, [Path(result) for result in args.overrides])
        return
    record = measure(args, Console())
    if args.json:
        args.json.write_text(json.dumps(record, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(MAIN), default="scenes")
    parser.add_argument("--emoji", default="data/emoji", help="folder of `openeva data emoji`")
    parser.add_argument(
        "--loop", action="store_true", help="also a second EVA taught by the EVA-CLIP, and CLIPs from it"
    )
    parser.add_argument("--imagenet", action="store_true", help="also an EVA whose teacher has never seen the data")
    parser.add_argument("--out", default="runs/claim_init/scenes", help="folder of the runs and the report")
    parser.add_argument("overrides", nargs="*", help="changes to all recipes, such as 'run.length=6400 samples'")
    draw_or_measure(parser, draw, measure)


if __name__ == "__main__":
    main()
