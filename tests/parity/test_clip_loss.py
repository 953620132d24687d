"""The contrastive loss against the official one, in one process and in two (golden kind `clip_loss`)."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from e2e.toy import join, start
from openeva.engine import distributed
from openeva.losses.contrastive import info_nce
from parity.golden import Case, cases

LOCAL, GLOBAL = "local1_gathergrad1", "local0_gathergrad1"
"""The two official modes whose gradients are right once they are averaged; the first is ours."""
TOO_SMALL, WRONG = "local0_gathergrad0", "local1_gathergrad0"
"""Those of the others are too small by the number of processes, and point elsewhere."""
GRADIENTS = ("d_img_norm", "d_txt_norm", "d_img_raw", "d_txt_raw")


def alone_modes(case: Case) -> dict[str, float]:
    """Official modes of one process -> label smoothing."""
    found = (re.match(r"out\.(single(?:_smooth([\d.]+))?)\.\w+$", name) for name in case.tensors)
    return {match[1]: float(match[2] or 0) for match in found if match}


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(0)


def loss_and_gradients(image_BE: Tensor, text_BE: Tensor, log_scale_1: Tensor, smoothing: float) -> dict[str, Tensor]:
    """Of this process's raw features, under the names of the cases."""
    raw = [value.clone().requires_grad_() for value in (image_BE, text_BE, log_scale_1)]
    normal = [F.normalize(value, dim=-1) for value in raw[:2]]
    contrast = info_nce(*normal, raw[2].exp(), smoothing=smoothing)
    names = ("d_img_norm", "d_txt_norm", "d_img_raw", "d_txt_raw", "d_logit_scale")
    found = dict(zip(names, torch.autograd.grad(contrast.loss, [*normal, *raw]), strict=True))
    accuracies = contrast.accuracies()
    return {**found, "loss": contrast.loss, "i2t": accuracies["accuracy_i2t"], "t2i": accuracies["accuracy_t2i"]}


def compute(stem: str, folder: str, smoothing: float) -> None:
    """In a process of its own: the part of the batch that is its share."""
    world = distributed.start("cpu")
    inputs = load_file(Path(stem + ".safetensors"))
    columns = [inputs[f"in.{name}_features_raw"].chunk(world.size)[world.rank] for name in ("image", "text")]
    found = loss_and_gradients(*columns, inputs["in.logit_scale_log"], smoothing)
    save_file({name: value.detach().contiguous() for name, value in found.items()}, f"{folder}/{world.rank}")
    distributed.stop()


def in_processes(case: Case, folder: Path, smoothing: float = 0.0) -> list[dict[str, Tensor]]:
    size = case.config["world_size"]
    arguments = (str(case.path.with_suffix("")), str(folder), smoothing)
    join(start(compute, *arguments, size=size, errors=folder), folder)
    return [load_file(folder / str(rank)) for rank in range(size)]


@pytest.mark.parametrize("case", cases("clip_loss"), ids=str)
def test_alone(case: Case) -> None:
    inputs = [case.tensors[f"in.{name}"] for name in ("image_features_raw", "text_features_raw", "logit_scale_log")]
    assert "single" in alone_modes(case)
    for mode, smoothing in alone_modes(case).items():
        found = loss_and_gradients(*inputs, smoothing=smoothing)
        for name in case.prefix(f"out.{mode}."):
            case.close(found[name], f"out.{mode}.{name}")


@pytest.mark.parametrize("case", cases("clip_loss"), ids=str)
def test_together(case: Case, tmp_path: Path) -> None:
    found = in_processes(case, tmp_path)
    scalars = ("loss", "d_logit_scale")
    averaged = {name: mean([values[name] for values in found]) for name in scalars}  # as data-parallel training does
    for rank, values in enumerate(found):
        official = f"out.ws{len(found)}.{{}}.rank{rank}."
        for mode in (LOCAL, WRONG):  # each process has the loss of its own rows
            for name in scalars:
                case.close(values[name], official.format(mode) + name)
        for mode in (GLOBAL, TOO_SMALL):  # each has that of all rows
            for name in scalars:
                case.close(averaged[name], official.format(mode) + name)
        for name in GRADIENTS:
            for mode in (LOCAL, GLOBAL):
                case.close(values[name], official.format(mode) + name)
            case.close(values[name] / len(found), official.format(TOO_SMALL) + name)
            wrong = case.tensors[official.format(WRONG) + name]
            assert (wrong - values[name]).norm() > 0.3 * values[name].norm()
    for name in scalars:
        case.close(averaged[name], f"out.single.{name}")
    for name in ("d_img_raw", "d_txt_raw"):
        case.close(torch.cat([values[name] for values in found]) / len(found), f"out.single.{name}")


@pytest.mark.parametrize("case", cases("clip_loss"), ids=str)
def test_smoothed_together(case: Case, tmp_path: Path) -> None:
    for mode, smoothing in alone_modes(case).items():
        if not smoothing:
            continue
        found = in_processes(case, tmp_path, smoothing)
        for name in ("loss", "d_logit_scale"):
            case.close(mean([values[name] for values in found]), f"out.{mode}.{name}")
        for name in ("d_img_norm", "d_txt_norm"):
            case.close(torch.cat([values[name] for values in found]) / len(found), f"out.{mode}.{name}")
