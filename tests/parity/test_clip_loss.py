"""The contrastive loss against the official one, in one process and in two (golden kind `clip_loss`)."""

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
WRONG = ("local0_gathergrad0", "local1_gathergrad0")


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
    for mode in ("single", "single_smooth0.1"):
        found = loss_and_gradients(*inputs, smoothing=float(mode.partition("smooth")[2] or 0))
        names = [key for key in case.prefix(f"out.{mode}.") if key in found]
        assert {"loss", "d_img_norm", "d_txt_norm", "d_logit_scale"} <= set(names)
        for name in names:
            case.close(found[name], f"out.{mode}.{name}")


@pytest.mark.parametrize("case", cases("clip_loss"), ids=str)
def test_together(case: Case, tmp_path: Path) -> None:
    found = in_processes(case, tmp_path)
    for rank, values in enumerate(found):
        official = f"out.ws2.{{}}.rank{rank}."
        for name in set(case.prefix(official.format(LOCAL))) & set(values):
            case.close(values[name], official.format(LOCAL) + name)
        for name in ("d_img_norm", "d_txt_norm", "d_img_raw", "d_txt_raw"):
            case.close(values[name], official.format(GLOBAL) + name)
            for mode in WRONG:  # too small by the number of processes, or another direction
                wrong = case.tensors[official.format(mode) + name]
                assert (wrong - values[name]).norm() > 0.3 * values[name].norm(), mode
    for name in ("loss", "d_logit_scale"):  # averaged, as data-parallel training does
        case.close(sum(values[name] for values in found) / len(found), f"out.single.{name}")
    for name in ("d_img_raw", "d_txt_raw"):
        case.close(torch.cat([values[name] for values in found]) / len(found), f"out.single.{name}")


@pytest.mark.parametrize("case", cases("clip_loss"), ids=str)
def test_smoothed_together(case: Case, tmp_path: Path) -> None:
    found = in_processes(case, tmp_path, smoothing=0.1)
    for name in ("loss", "d_logit_scale"):
        case.close(sum(values[name] for values in found) / len(found), f"out.single_smooth0.1.{name}")
    for name in ("d_img_norm", "d_txt_norm"):
        case.close(torch.cat([values[name] for values in found]) / len(found), f"out.single_smooth0.1.{name}")
