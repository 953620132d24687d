"""A model to the Hugging Face hub, with a card that says what is known of it and where that is from.

model or folder -> facts (its config, its run, the table of released weights) -> card -> files -> hub, or a folder to
look at first
"""

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from safetensors import safe_open

from openeva.backbones.base import Backbone
from openeva.checkpoints.native import CONFIG_FILE, WEIGHTS_FILE, is_complete, save_native
from openeva.checkpoints.pretrained import find_entry
from openeva.checkpoints.released import Accuracy, PretrainedWeights
from openeva.engine.log import read_log
from openeva.evals.robustness import OFFICIAL_SIZES
from openeva.export import native_config, native_tensors
from openeva.heads.classifier import ImageClassifier

CARD_FILE, LIST_FILE = "README.md", "files.txt"
BENCHMARKS = {
    "imagenet_1k": "ImageNet-1K", "imagenet_v2": "ImageNet-V2", "imagenet_real": "ImageNet-ReaL",
    "imagenet_a": "ImageNet-A", "imagenet_r": "ImageNet-R", "imagenet_sketch": "ImageNet-Sketch",
    "objectnet": "ObjectNet",
}  # fmt: skip
EVA_PAPER = "EVA: Exploring the Limits of Masked Visual Representation Learning at Scale, arXiv 2211.07636"
EVA_02_PAPER = "EVA-02: A Visual Representation for Neon Genesis, arXiv 2303.11331"
NOT_STATED = "not stated"

_LOCAL_PATH = re.compile(r"^([/~\\]|[A-Za-z]:[/\\]|\.\.?/)")
_NOT_METRICS = ("step", "samples", "time", "loss")


@dataclass(frozen=True)
class Pushed:
    """What was, or would be, on the hub.

    Attributes:
        place: Address of the repository, or the folder of a dry run.
        files: Name in the repository -> size in bytes.
        card: Text of the model card.
        dry_run: True = nothing was uploaded.
    """

    place: str
    files: dict[str, int]
    card: str
    dry_run: bool

    def lines(self) -> list[str]:
        """The account for people."""
        head = "would upload" if self.dry_run else "uploaded"
        lines = [f"{head}: {name} ({size:,} bytes)" for name, size in self.files.items()]
        return [*lines, f"look at {self.place}/{CARD_FILE} first; nothing was uploaded" if self.dry_run else self.place]


@dataclass(frozen=True)
class _Facts:
    """What a card says."""

    repo_id: str
    task: Mapping[str, Any]
    num_parameters: int
    entry: PretrainedWeights | None
    converted_from: Mapping[str, Any] | None
    trained_by: str | None
    teacher: str
    data: str
    licence: str | None
    crop: Mapping[str, Any]
    metrics: dict[str, float]
    step: int | None
    based_on: list[str] = field(default_factory=list)
    is_delta: bool = False
    versions: Mapping[str, Any] = field(default_factory=dict)
    revision: str | None = None


def push_to_hub(
    model: str | Path | ImageClassifier | Backbone,
    repo_id: str,
    *,
    trained_by: str | None = None,
    data: str | None = None,
    licence: str | None = None,
    private: bool = False,
    dry_run: str | Path | None = None,
    api: HfApi | None = None,
) -> Pushed:
    """Upload a model folder (weights, config and a card that is written here).

    Args:
        model: A run, a model folder, or a model (then nothing but its origin is known of its training).
        repo_id: "name/model".
        trained_by: Who trained it; needed unless these are converted official weights.
        data: What it was trained on; default: that of the official weights, else the names of the run's sources.
        licence: Of the weights, as the hub spells it ("mit"); default: that of the official weights, else not stated.
        private: Make a new repository private.
        dry_run: Folder to write the card and a list of the files to instead; nothing is uploaded.
        api: The hub; default: with the login of this machine.

    Raises:
        ValueError: No complete model folder, an impossible name, or nobody is said to have trained it.
        ConnectionError: The hub cannot be reached, or refuses.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repository {repo_id!r}: {error}") from None
    if "/" not in repo_id:
        raise ValueError(f"repository {repo_id!r} lacks its owner; give NAME/{repo_id}")
    if not isinstance(model, str | Path):
        with tempfile.TemporaryDirectory() as temporary:
            save_native(Path(temporary), native_tensors(model), native_config(model))
            options: dict[str, Any] = {"trained_by": trained_by, "data": data, "licence": licence}
            return push_to_hub(temporary, repo_id, private=private, dry_run=dry_run, api=api, **options)
    folder, run = _folders(Path(model).expanduser())
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    facts = _facts(folder, run, config, repo_id, trained_by=trained_by, data=data, licence=licence)
    card = write_card(facts)
    files: dict[str, bytes | Path] = {
        CARD_FILE: card.encode(),
        CONFIG_FILE: (json.dumps(_without_local_paths(config), indent=2) + "\n").encode(),
    }
    others = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    files |= {path.name: path for path in others if path.name not in files}
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    if dry_run is not None:
        place = Path(dry_run).expanduser()
        place.mkdir(parents=True, exist_ok=True)
        (place / CARD_FILE).write_text(card, encoding="utf-8")
        (place / LIST_FILE).write_text("".join(f"{size}\t{name}\n" for name, size in sizes.items()), encoding="utf-8")
        return Pushed(str(place), sizes, card, dry_run=True)
    return Pushed(_upload(api or HfApi(), repo_id, files, private=private), sizes, card, dry_run=False)


def _upload(api: HfApi, repo_id: str, files: Mapping[str, bytes | Path], *, private: bool) -> str:
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.create_commit(repo_id, operations, commit_message="Upload a model with openeva")
    except OSError as error:  # of the hub's library, too
        raise ConnectionError(
            f"{repo_id} was not uploaded: {str(error).splitlines()[0]}; is the network there, and who is logged in "
            "(`hf auth whoami`, `hf auth login`)?"
        ) from error
    return str(url)


def _folders(path: Path) -> tuple[Path, Path | None]:
    """The model folder of a run or model folder, and the run where there is one.

    Raises:
        ValueError: There is no complete model.
    """
    folder = path if (path / WEIGHTS_FILE).is_file() else path / "model"
    if not is_complete(folder):
        raise ValueError(
            f"{path} holds no complete model ({WEIGHTS_FILE} and {CONFIG_FILE} of one save); finish the run, or make a "
            "folder of other weights with `openeva convert FILE FOLDER --to openeva`"
        )
    return folder, folder.parent if (folder.parent / "config.yaml").is_file() else None


def _facts(
    folder: Path,
    run: Path | None,
    config: Mapping[str, Any],
    repo_id: str,
    *,
    trained_by: str | None,
    data: str | None,
    licence: str | None,
) -> _Facts:
    converted = config.get("converted_from")
    entry = find_entry(converted["file"]) if converted else None
    if converted is None and trained_by is None:
        raise ValueError(
            f"{folder} was trained with openeva: say by whom (trained_by, --trained-by), so that nobody takes it for "
            "the authors' own"
        )
    recipe = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) if run else {}
    sources = [source["name"] for source in (recipe.get("data") or {}).get("train") or []]
    task, step = config.get("task") or {}, config.get("step")
    target = task.get("target") or {}
    teacher = entry.teacher if entry else _teacher(target.get("teacher"))
    crop = {"crop_pct": entry.crop_pct, "interpolation": entry.interpolation} if entry else config.get("val_crop")
    bases = (config.get("delta") or {}).get("bases") or []
    started = [str(base["address"]) for base in bases] or [task[k] for k in ("init_from",) if task.get(k)]
    environment = config.get("environment") or {}
    return _Facts(
        repo_id, task, _num_parameters(folder / WEIGHTS_FILE), entry, converted, trained_by, teacher,
        data or (entry.data if entry else ", ".join(sources) or NOT_STATED),
        licence or (entry.licence.lower() if entry and entry.licence else None),
        crop or (recipe.get("data") or {}).get("val_crop") or {},
        _measured(run), step, [_without_local_paths(address) for address in started], bool(bases),
        config.get("versions") or {}, environment.get("git"),
    )  # fmt: skip


def _teacher(config: Mapping[str, Any] | None) -> str:
    if not config:
        return NOT_STATED
    parts = [str(config[key]) for key in ("model", "variant", "weights") if config.get(key)]
    return _without_local_paths(", ".join(Path(p).name if _LOCAL_PATH.match(p) else p for p in parts)) or NOT_STATED


def _measured(run: Path | None) -> dict[str, float]:
    """Held-out metrics at the end of a run."""
    for record in reversed(read_log(run) if run else []):
        if "loss" not in record:
            return {k: v for k, v in record.items() if isinstance(v, float) and k not in _NOT_METRICS}
    return {}


def _num_parameters(path: Path) -> int:
    total = 0
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a dict)
            size = 1
            for length in file.get_slice(key).get_shape():
                size *= length
            total += size
    return total


def _without_local_paths(value: Any) -> Any:
    """The same with file names instead of paths of this machine."""
    if isinstance(value, Mapping):
        return {key: _without_local_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_local_paths(item) for item in value]
    if isinstance(value, str) and _LOCAL_PATH.match(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


# ------------------------------------------------------------------------------------------------ the card


def write_card(facts: _Facts) -> str:
    """The model card: metadata for the hub, then text for people."""
    classifies = facts.task.get("name") in {"classify", "video"} or bool(facts.entry and facts.entry.num_classes)
    name = facts.repo_id.rsplit("/", 1)[-1]
    resized = bool((facts.converted_from or {}).get("resized"))  # then the published numbers are not of this model
    published = facts.entry.published if facts.entry and not resized else {}
    metadata = ModelCardData(
        license=facts.licence,
        library_name="openeva",
        pipeline_tag=_pipeline(facts, classifies),
        tags=["eva", "vision-transformer", "converted" if facts.converted_from else "reproduced"],
        model_name=name if published else None,
        eval_results=[_eval_result(key, accuracy, facts) for key, accuracy in published.items()] or None,
    )
    sections = [
        f"---\n{metadata.to_yaml()}\n---\n", f"# {name}\n", _origin(facts) + "\n",
        "## What it is\n", _table(facts) + "\n", "## Evaluation\n", _evaluation(facts) + "\n",
        "## How to use it\n", _usage(facts, classifies) + "\n",
        "## Citation\n", EVA_02_PAPER if _is_eva_02(facts) else EVA_PAPER, "",
    ]  # fmt: skip
    return "\n".join(sections)


def _is_eva_02(facts: _Facts) -> bool:
    variant = facts.entry.variant if facts.entry else str((facts.task.get("backbone") or {}).get("variant") or "")
    return variant.startswith("eva02")


def _origin(facts: _Facts) -> str:
    if facts.converted_from is None:
        base = f", starting from {', '.join(facts.based_on)}" if facts.based_on else ""
        return f"**Reproduced, not official**: trained with openeva by {facts.trained_by}{base}, not by EVA's authors."
    source = facts.converted_from.get("file", "a file")
    resized = facts.converted_from.get("resized")
    changed = f"resized to this input: {', '.join(resized)}" if resized else "every tensor as it was"
    if facts.entry is not None and facts.entry.repository:
        place = f"[{facts.entry.repository}](https://huggingface.co/{facts.entry.repository})"
        return (
            f"**Converted, not trained here**: the weights of the official file `{source}` by the authors of EVA "
            f"({place}), under the names of openeva; {changed}."
        )
    by = f" trained by {facts.trained_by}" if facts.trained_by else ""
    return f"**Converted, not trained here**: the weights of the file `{source}`{by}, under the names of openeva."


def _sees_videos(facts: _Facts) -> bool:
    backbone: Mapping[str, Any] = facts.task.get("backbone") or {}
    return backbone.get("num_frames") is not None


def _frames(facts: _Facts) -> str:
    backbone: Mapping[str, Any] = facts.task.get("backbone") or {}
    return f"clips of {backbone['num_frames']} frames of " if _sees_videos(facts) else ""


def _pipeline(facts: _Facts, classifies: bool) -> str:
    if _sees_videos(facts):
        return "video-classification"
    return "image-classification" if classifies else "image-feature-extraction"


def _table(facts: _Facts) -> str:
    backbone: Mapping[str, Any] = facts.task.get("backbone") or {}
    variant = (facts.entry.variant if facts.entry else backbone.get("variant")) or "own dimensions"
    size = backbone.get("image_size") or (facts.entry.image_size if facts.entry else NOT_STATED)
    classes = facts.task.get("num_classes") or (facts.entry.num_classes if facts.entry else None)
    rows: dict[str, object] = {
        "Architecture": f"{variant}, width {backbone.get('width')}, {backbone.get('depth')} blocks, "
        f"patches of {backbone.get('patch_size')} pixels",
        "Numbers in the file": f"{facts.num_parameters:,}",
        "Input": f"{_frames(facts)}{size} pixels, {backbone.get('statistics', 'clip')} mean and deviation",
        "Classes": classes or "none",
        "Teacher of pre-training": facts.teacher,
        "Data": facts.data,
        "Licence of the weights": facts.licence or NOT_STATED,
    }
    if facts.step is not None:
        rows["Trained for"] = f"{facts.step:,} steps"
    if facts.versions:
        made = ", ".join(f"{key} {value}" for key, value in facts.versions.items() if key in {"openeva", "torch"})
        rows["Written with"] = made + (f", revision {facts.revision}" if facts.revision else "")
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _evaluation(facts: _Facts) -> str:
    crop, seen = facts.crop, "videos" if _sees_videos(facts) else "images"
    protocol = (
        f"Protocol: shorter side resized ({crop.get('interpolation', 'bicubic')}) to the input size divided by "
        f"{crop.get('crop_pct')}, centre crop, one view"
        f"{' of each video; published numbers are of 4 clips x 3 crops' if _sees_videos(facts) else ''}."
        if crop
        else "Protocol: not stated."
    )
    lines = []
    if facts.entry is not None and facts.entry.published:
        which = "the averaged (EMA) weights" if facts.entry.averaged else "the weights"
        lines += [
            protocol + _exceptions(facts),
            "",
            f"Published by the authors for {which} of the official file at {facts.entry.image_size} pixels (official "
            "README and logs), in percent; **not measured again on this copy**:",
            "",
            "| benchmark | top-1 | top-5 |",
            "|---|---|---|",
            *(_accuracy_row(key, accuracy) for key, accuracy in facts.entry.published.items()),
        ]
    if facts.metrics:
        step = f" at step {facts.step:,}" if facts.step is not None else ""
        lines += [
            *([""] if lines else []),
            f"{protocol} Measured by the run itself on its held-out {seen}{step}:",
            "",
            "| metric | value |",
            "|---|---|",
            *(f"| {key} | {value:.4g} |" for key, value in facts.metrics.items()),
        ]
    return "\n".join(lines) or "No measurements are recorded for these weights."


def _exceptions(facts: _Facts) -> str:
    """What else must be known of the protocol of the published numbers."""
    assert facts.entry is not None
    if facts.entry.kind == "clip":
        return " Zero-shot: classes are told by the texts of OpenAI's 80 templates."
    return _robustness_protocol(facts) if set(facts.entry.published) - {"imagenet_1k"} else ""


def _robustness_protocol(facts: _Facts) -> str:
    size = OFFICIAL_SIZES["EVA-02" if _is_eva_02(facts) else "EVA-01"]
    return (
        f" Official exceptions: ImageNet-V2 and ObjectNet at {size} pixels, bilinear; ObjectNet with its red border,"
        " counting the first ImageNet class of each of its classes only; ImageNet-A and -R among their own 200 classes."
    )


def _accuracy_row(benchmark: str, accuracy: Accuracy) -> str:
    top5 = "" if accuracy.top5 is None else f"{accuracy.top5:.2f}"
    return f"| {BENCHMARKS.get(benchmark, benchmark)} | {accuracy.top1:.2f} | {top5} |"


def _eval_result(benchmark: str, accuracy: Accuracy, facts: _Facts) -> EvalResult:
    assert facts.entry is not None
    zero_shot = facts.entry.kind == "clip"
    return EvalResult(
        task_type="zero-shot-image-classification" if zero_shot else _pipeline(facts, classifies=True),
        dataset_type=benchmark.replace("_", "-"),
        dataset_name=BENCHMARKS.get(benchmark, benchmark),
        metric_type="accuracy",
        metric_value=accuracy.top1,
        metric_name=f"{'zero-shot ' if zero_shot else ''}top-1 accuracy (%), published by the authors",
        source_name="official README and logs",
        source_url=f"https://huggingface.co/{facts.entry.repository}",
    )


def _usage(facts: _Facts, classifies: bool) -> str:
    example = "clip.mp4" if _sees_videos(facts) else "photo.jpg"
    use = f'print(openeva.predict("{example}", weights=folder))' if classifies else (
        'print(openeva.features("photo.jpg", weights=folder).pooled)'
    )  # fmt: skip
    base = (
        f"\nThe file holds only what was trained on top of {', '.join(facts.based_on)}, which must be there too.\n"
        if facts.is_delta
        else ""
    )
    return f"""```python
import openeva                                     # pip install openeva
from huggingface_hub import snapshot_download

folder = snapshot_download("{facts.repo_id}")
model = openeva.load_checkpoint(folder)
{use}
```
{base}"""
