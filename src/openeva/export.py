"""A model for other programs: ONNX, torch.export, safetensors; a file is written only where it computes the same.

weights -> model -> (normalisation in front, if asked) -> exported with a free batch size -> run on random input in the
other program -> compared -> file
"""

import importlib.util
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Shaped
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

from openeva.backbones.base import Backbone, Normalisation
from openeva.checkpoints.files import read_state_dict, write_state_dict
from openeva.checkpoints.load import LoadReport
from openeva.checkpoints.native import WEIGHTS_FILE, save_native
from openeva.data.views import normalise
from openeva.heads.classifier import ImageClassifier
from openeva.inference.classes import class_names
from openeva.inference.predictor import Weights, backbone_of, config_of, load_model
from openeva.models import Origin, transforms_for

To = Literal["onnx", "torch", "safetensors"]
Expects = Literal["normalised", "unit", "uint8"]
"""Pixels that an exported program takes: normalised floats, floats in 0..1, or bytes."""

SUFFIXES: dict[To, str] = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}
TRACED_BATCH, CHECKED_BATCHES = 2, (1, 3)
TOLERANCE, SMALLEST_SCALE = 1e-3, 1e-3
"""Largest difference in fp32, relative to the largest value of an output; to 0.001 where that is smaller (logits of a
fresh classifier may be 0.001, so that everything would be within a tolerance of so much)."""
METADATA_KEY = "openeva"


class ExportError(ValueError):
    """The exported program does not compute what the model does; no file was left."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        files: The file or folder that was asked for first, then what belongs to it.
        max_difference: Largest absolute difference to the model over all outputs; 0 for stored weights.
        inputs: Name and shape of the input, in words; empty for weights.
        outputs: Names of the outputs.
    """

    files: list[Path]
    max_difference: float
    inputs: str = ""
    outputs: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The account for people."""
        lines = [f"written: {path}" for path in self.files]
        if self.outputs:
            lines.append(f"{self.inputs} -> {', '.join(self.outputs)}")
            lines.append(f"largest difference to the model on random input: {self.max_difference:.2g}")
        return lines


def export_model(
    weights: Weights,
    out: str | Path,
    to: To | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    expects: Expects = "normalised",
) -> Exported:
    """Write a model for other programs, in fp32 on the CPU.

    A classifier gives `logits` [B, V]; a backbone gives `pooled` [B, D] and `patches` [B, N, D]. Only the batch size is
    free. Names of classes, normalisation and size are in the file's metadata (key "openeva").

    Args:
        weights: Official name, run, model folder or file; or a model.
        out: The file: `.onnx`, `.pt2` (torch.export) or `.safetensors`; without an ending, for safetensors, a model
            folder of openeva (weights and config), which is what openeva itself reads best.
        to: Wanted kind; default: by the ending.
        image_size: Pixels of the exported model; positions are resized. Default: the weights'.
        expects: What the program takes: "normalised" pixels; or "unit" (0..1) or "uint8" ones, normalised inside.

    Raises:
        ConfigError: The weights are unknown or out of reach.
        ExportError: What was exported computes something else.
        ImportError: A package for this kind is missing.
        ValueError: Kind and ending do not fit, or an argument that this kind does not have.
    """
    path = Path(out).expanduser()
    kind = _kind(path, to)
    if kind == "safetensors" and expects != "normalised":
        raise ValueError(f"safetensors hold weights only, which cannot say expects={expects!r}; use onnx or torch")
    _check_packages(kind)
    model = load_model(weights, image_size).cpu().eval()
    if kind == "safetensors":
        return Exported(_write_weights(model, path), 0.0)
    program = _Program(model, expects).eval()
    export = _to_onnx if kind == "onnx" else _to_torch
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        try:
            call = export(program, Path(folder) / path.name)
            difference = _largest_difference(program, call)
        except ExportError:
            raise
        except Exception as error:  # whatever a tracer or another runtime raises
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ExportError(f"this model cannot be exported to {kind}: {reason}; nothing was written") from error
        written = sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name)  # the program itself last
        files = [file.replace(path.with_name(file.name)) for file in written]
    return Exported(files[::-1], difference, program.describe(), program.outputs)


class _Program(nn.Module):
    """A model as one function of tensors: pixels in, tensors out."""

    def __init__(self, model: ImageClassifier | Backbone, expects: Expects) -> None:
        super().__init__()
        self.model, self.expects = model, expects
        backbone = backbone_of(model)
        frames = () if backbone.num_frames is None else (backbone.num_frames,)
        self.shape: tuple[int, ...] = (*frames, 3, *backbone.image_size)
        self.normalisation: Normalisation = backbone.normalisation
        self.outputs = ("logits",) if isinstance(model, ImageClassifier) else ("pooled", "patches")

    def forward(self, image: Shaped[Tensor, "B *T C Y X"]) -> tuple[Tensor, ...]:
        mean, std = self.normalisation.mean, self.normalisation.std
        if self.expects == "uint8":
            image = normalise(image, mean, std)
        elif self.expects == "unit":
            image = tv.normalize(image, list(mean), list(std))
        if isinstance(self.model, ImageClassifier):
            return (self.model(image),)
        features = self.model(image)
        return features.pooled, features.patches

    def example(self, batch: int, seed: int = 0) -> Shaped[Tensor, "B *T 3 Y X"]:
        """Random input."""
        generator, shape = torch.Generator().manual_seed(seed), (batch, *self.shape)
        if self.expects == "uint8":
            return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return (torch.rand if self.expects == "unit" else torch.randn)(shape, generator=generator)

    def metadata(self) -> str:
        """What a user of the file must know, as JSON."""
        facts: dict[str, Any] = {
            "input": self.describe(), "expects": self.expects, "mean": self.normalisation.mean,
            "std": self.normalisation.std, "outputs": self.outputs,
        }  # fmt: skip
        if isinstance(self.model, ImageClassifier):
            videos = self.model.backbone.num_frames is not None
            names = class_names(self.model.num_classes, config_of(self.model), of_videos=videos)
            facts |= {"class_names": list(names.names), "class_names_from": names.source}
        return json.dumps(facts, ensure_ascii=False)

    def describe(self) -> str:
        """The input in words."""
        values = {"normalised": "normalised float32", "unit": "float32 in 0..1", "uint8": "uint8"}[self.expects]
        return f"image [batch, {', '.join(map(str, self.shape))}] ({values}, RGB)"


_Call = Callable[[Tensor], list[NDArray[np.float32]]]
"""An exported program that was read back from its file."""


@torch.no_grad()
def _to_onnx(program: _Program, path: Path) -> _Call:
    import onnxruntime

    exported = torch.onnx.export(
        program, (program.example(TRACED_BATCH),), dynamo=True, verbose=False,
        input_names=["image"], output_names=list(program.outputs), dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    assert exported is not None
    exported.model.metadata_props[METADATA_KEY] = program.metadata()
    exported.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: session.run(list(program.outputs), {"image": image.numpy()})


@torch.no_grad()
def _to_torch(program: _Program, path: Path) -> _Call:
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(program, (program.example(TRACED_BATCH),), dynamic_shapes=shapes)
    torch.export.save(exported, path, extra_files={f"{METADATA_KEY}.json": program.metadata()})
    module = torch.export.load(path).module()
    return lambda image: [tensor.detach().numpy() for tensor in module(image)]


@torch.no_grad()
def _largest_difference(program: _Program, call: _Call) -> float:
    """Largest absolute difference between model and exported program, on batches of other sizes than the traced one.

    Raises:
        ExportError: It is too large, or a shape differs.
    """
    largest = 0.0
    for seed, batch in enumerate(CHECKED_BATCHES):
        image = program.example(batch, seed + 1)
        for name, expected, got in zip(program.outputs, program(image), call(image), strict=True):
            if tuple(expected.shape) != got.shape:
                raise ExportError(f"the exported {name} has shape {got.shape} instead of {tuple(expected.shape)}")
            difference = float(np.abs(expected.numpy() - got).max())
            allowed = TOLERANCE * max(SMALLEST_SCALE, float(expected.abs().max()))
            if not difference <= allowed:  # also true for nan
                raise ExportError(
                    f"the exported {name} differs from the model's by {difference:.2g}, more than {allowed:.2g}; "
                    "nothing was written. Please report this with the model's name and the version of torch"
                )
            largest = max(largest, difference)
    return largest


def _write_weights(model: ImageClassifier | Backbone, path: Path) -> list[Path]:
    """A model folder of openeva, or all tensors in one file, read back and compared."""
    state_dict = native_tensors(model)
    if path.suffix == SUFFIXES["safetensors"]:
        write_state_dict(path, state_dict)
        written = path
    else:
        save_native(path, state_dict, native_config(model))
        written = path / WEIGHTS_FILE
    found = read_state_dict(written)
    assert found.keys() == state_dict.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in state_dict.items())
    return [path]


def native_tensors(model: ImageClassifier | Backbone) -> dict[str, Tensor]:
    """All tensors under the names of openeva's model folders."""
    prefix = "" if isinstance(model, ImageClassifier) else "backbone."
    return {prefix + key: tensor for key, tensor in model.state_dict().items()}


def native_config(model: ImageClassifier | Backbone) -> dict[str, Any]:
    """What a model folder says about its model: what it was loaded with, and the architecture as it is now.

    Raises:
        ValueError: The backbone is not openeva's own transformer.
    """
    backbone = backbone_of(model)
    architecture = getattr(backbone, "config", None)
    if architecture is None:
        raise ValueError(f"a model folder describes openeva's own transformer, not a {type(backbone).__name__}")
    kept = {key: value for key, value in config_of(model).items() if key not in {"format", "versions"}}
    recorded: Mapping[str, Any] = kept.get("task") or {}
    task: dict[str, Any] = {"name": "pretrain", **recorded}
    if isinstance(model, ImageClassifier):
        task |= {"name": "classify", "num_classes": model.num_classes, "pooling": model.pooling}
        task |= {"batch_norm": isinstance(model.classifier, nn.Sequential)}
        names = class_names(model.num_classes, config_of(model))
        task["class_names"] = list(names.names)
    origin: Origin | None = getattr(model, "origin", None)
    if origin is not None and origin.weights and not origin.config:
        report: LoadReport = model.load_report  # type: ignore[assignment]
        file = Path(origin.entry.file if origin.entry else origin.weights).name
        kept["converted_from"] = {"file": file, "layout": report.layout, "resized": sorted(report.resized)}
    task["backbone"] = {**architecture.model_dump(mode="json"), "weights": None}
    crop = transforms_for(model).evaluate.crop.model_dump(mode="json")  # not the default of a run, once it is a folder
    return {"val_crop": crop, **kept, "task": task}


def _kind(path: Path, to: To | None) -> To:
    by_ending: To | None = next((kind for kind, suffix in SUFFIXES.items() if path.suffix == suffix), None)
    if to is None:
        if by_ending is None:
            endings = ", ".join(SUFFIXES.values())
            raise ValueError(
                f"{path} must end in {endings}; for a model folder, give to='safetensors' (--to safetensors)"
            )
        return by_ending
    is_folder = to == "safetensors" and path.suffix == ""
    if to != by_ending and not is_folder:
        folder = " (or be a folder, without an ending)" if to == "safetensors" else ""
        raise ValueError(f"{path} must end in {SUFFIXES[to]}{folder} for {to}")
    return to


def _check_packages(kind: To) -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if kind == "onnx" and missing:
        raise ImportError(f"ONNX export needs {', '.join(missing)}: pip install 'openeva[export]'")


def exported_metadata(path: Path) -> dict[str, Any]:
    """What `export_model` noted in an `.onnx` or `.pt2` file."""
    if path.suffix == SUFFIXES["onnx"]:
        import onnx

        props = onnx.load(path, load_external_data=False).metadata_props
        return json.loads(next(entry.value for entry in props if entry.key == METADATA_KEY))
    files = {f"{METADATA_KEY}.json": ""}
    torch.export.load(path, extra_files=files)
    return json.loads(files[f"{METADATA_KEY}.json"])
