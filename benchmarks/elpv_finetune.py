"""Fine-tuning the demo's model on few and many labels, against its own frozen probe and against training from scratch.

Each seed draws its own labels, order and flips. Probe: the logistic regression on frozen features that
`task.probe_first` starts from, with the very same labels. Ablations with all labels say what matters.
Needs `make demo` first. Writes every single value, mean and deviation.

    python benchmarks/elpv_finetune.py --demo runs/demo --out benchmarks/results/elpv_finetune_cpu.json
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from openeva.config import load_config
from openeva.engine.hardware import environment
from openeva.engine.log import read_log
from openeva.train import Recipe, train

SHARES = {0.1: 2.0, 0.3: 1.5, 1.0: 1.0}
"""Share of the labels -> how many times as many epochs as the recipe says from scratch; few images need more."""
ABLATIONS = {
    "classifier drawn anew": ["task.probe_first=false"],
    "random crops": ["data.crop.kind=random", "data.crop.scale=[0.35, 1.0]"],
    "RandAugment": ["data.crop.randaugment=rand-m9-mstd0.5-inc1"],
}


def run(recipe: str, out: Path, overrides: list[str], console: Console) -> dict[str, float]:
    """The last held-out metrics of a run, and its seconds."""
    config = load_config(Recipe, recipe, [f"run.out={out}", *overrides])
    begun = time.perf_counter()
    if train(config, console=console).status == "stopped":
        raise KeyboardInterrupt
    records = [record for record in read_log(out) if "auc" in record]
    found = {key: float(records[-1][key]) for key in ("auc", "ema_auc", "top1", "ema_top1")}
    return {**found, "seconds": time.perf_counter() - begun}


def run_probe(out: Path, overrides: list[str], console: Console) -> float:
    """AUC of the frozen model with the classifier that fine-tuning starts from."""
    still = ["optim.lr=0", "optim.min_lr=0", "optim.warmup=0 steps", "optim.ema=null", "run.length=1 steps"]
    config = load_config(Recipe, "classify/elpv", [f"run.out={out}", *overrides, *still, "run.evaluate_every=1 steps"])
    train(config, console=console)
    return float(next(record["auc"] for record in read_log(out) if "auc" in record))


def epochs(recipe: str, factor: float) -> str:
    length = load_config(Recipe, recipe, []).run.length
    return f"run.length={round(length.value * factor)} epochs"


def measure_seed(seed: int, folder: Path, start: str, console: Console) -> dict[str, Any]:
    """Values of one seed by row and share of the labels."""
    found: dict[str, Any] = {"fine-tuned": {}, "frozen probe": {}, "from scratch": {}}
    for share, factor in SHARES.items():
        labels = [f"run.seed={seed}", f"data.train.0.label_fraction={share}", f"data.train.0.shots_seed={seed}"]
        at = folder / f"{seed}-{share}"
        found["frozen probe"][share] = {"auc": run_probe(at / "probe", [start, *labels], console)}
        found["fine-tuned"][share] = run("classify/elpv", at / "tuned", [start, *labels], console)
        scratch = [*labels, epochs("classify/elpv_scratch", factor)]
        found["from scratch"][share] = run("classify/elpv_scratch", at / "scratch", scratch, console)
    return found


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and deviation of the AUC of the last weights (not the averaged ones) by row and share."""
    summary: dict[str, Any] = {}
    for row in runs[0]:
        for share in SHARES:
            values = [one[row][share]["auc"] for one in runs]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            summary[f"{row} / {share:.0%}"] = {"mean": statistics.mean(values), "std": deviation, "values": values}
            print(f"{row:14s} {share:4.0%} of the labels: AUC {statistics.mean(values):.3f} ± {deviation:.3f}")
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="finished run of `make demo`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    console, start = Console(), f"task.init_from={args.demo}"
    with tempfile.TemporaryDirectory() as folder:
        runs = [measure_seed(seed, Path(folder), start, console) for seed in args.seeds]
        ablations = {
            name: run("classify/elpv", Path(folder) / "ablation" / name, [start, *overrides], console)
            for name, overrides in ABLATIONS.items()
        }
    for name, metrics in ablations.items():
        print(f"all labels, seed 0, {name}: AUC {metrics['auc']:.3f}")
    record = {"what": "elpv_finetune", "environment": environment(torch.device("cpu")), "seeds": args.seeds,
              "summary_auc": summarise(runs), "ablations_all_labels_seed_0": ablations, "runs": runs}  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
