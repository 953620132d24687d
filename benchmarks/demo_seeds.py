"""Does pre-training beat random initialisation and raw pixels by more than the spread over seeds? The demo, repeated.

Each seed draws its own initial weights, order, flips and masks; the teacher's features are computed once. Writes mean,
deviation and every single value of the demo's tables, and says for each metric whether all seeds are ahead.

    python benchmarks/demo_seeds.py --seeds 0 1 2 --out benchmarks/results/demo_seeds_cpu.json
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from openeva.config import load_config
from openeva.demo import FAST, measure
from openeva.engine.hardware import environment
from openeva.train import Recipe, train

STUDENT, RIVALS = "student, pre-trained", ("student, random initialisation", "raw pixels")


def run_seed(seed: int, folder: Path, features: Path, overrides: list[str], console: Console) -> dict[str, Any]:
    """Every value of the demo's tables by `title / row / column`, and the seconds of the training."""
    out = folder / f"seed{seed}"
    if features.is_dir():
        shutil.copytree(features, out / "target")
    recipe = load_config(Recipe, "pretrain/demo", [f"run.out={out}", f"run.seed={seed}", *overrides])
    begun = time.perf_counter()
    result = train(recipe, console=console)
    if result.status == "stopped":
        raise KeyboardInterrupt
    seconds = time.perf_counter() - begun
    if not features.is_dir():
        shutil.copytree(out / "target", features)
    values = {
        f"{table.title} / {row.name} / {column}": value.mean
        for table in measure(out, console)
        for row in table.rows
        for column, value in zip(table.columns, row.values, strict=True)
        if value is not None
    }
    return {"seed": seed, "train_s": seconds, "values": values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fast", action="store_true", help="tiny sizes, to show that everything runs")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", help="changes to the recipe, such as 'run.length=18 epochs'")
    args = parser.parse_args()
    console = Console()
    overrides = [*(FAST if args.fast else ()), *args.overrides]
    with tempfile.TemporaryDirectory() as folder:
        runs = [run_seed(s, Path(folder), Path(folder) / "features", overrides, console) for s in args.seeds]
    summary = {}
    for key in runs[0]["values"]:
        values = [run["values"][key] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        summary[key] = {"mean": statistics.mean(values), "std": spread, "values": values}
    verdicts = {}
    for key, own in summary.items():
        title, row, column = key.split(" / ")
        rivals = [
            summary[f"{title} / {rival} / {column}"] for rival in RIVALS if f"{title} / {rival} / {column}" in summary
        ]
        if row == STUDENT and rivals:
            margins = [a - b for rival in rivals for a, b in zip(own["values"], rival["values"], strict=True)]
            spread = max(own["std"], *(rival["std"] for rival in rivals))
            verdicts[f"{title} / {column}"] = {"smallest_margin": min(margins), "largest_std": spread}
            print(f"{title}, {column}: smallest margin {min(margins):+.4f}, deviation over seeds {spread:.4f}")
    record = {"what": "demo_seeds", "environment": environment(torch.device("cpu")), "recipe_overrides": overrides,
              "seeds": args.seeds, "train_s": [run["train_s"] for run in runs], "summary": summary,
              "margins_over_random_and_pixels": verdicts}  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
