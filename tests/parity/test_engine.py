"""Schedules, parameter groups and fifty training steps against the official code."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from openeva.checkpoints.official import from_official
from openeva.engine.distributed import World
from openeva.engine.lars import Lars
from openeva.engine.log import RunLog, read_log
from openeva.engine.loop import LoopConfig, run_loop
from openeva.engine.optim import OptimConfig, adamw, param_groups
from openeva.engine.precision import Precision
from openeva.engine.schedule import Schedule
from openeva.engine.state import Checkpoints, Progress, TrainState
from openeva.losses.cosine import negative_cosine
from openeva.tasks.base import Task
from openeva.tasks.classify import Config as Classify
from parity.golden import Case, cases
from parity.test_vit import student_of


@pytest.mark.parametrize("case", cases("schedules"), ids=str)
def test_schedules(case: Case) -> None:
    for number, config in enumerate(case.config["cases"]):
        expected = case.tensors[f"out.case{number}"]
        warmup = config.get("warmup_steps") or config.get("warmup_epochs", 0) * config["niter_per_ep"]
        total = config["epochs"] * config["niter_per_ep"]
        shape = config.get("sched_type", "cosine")
        schedule = Schedule(config["base_value"], config["final_value"], total, warmup, shape)
        actual = torch.tensor([schedule.at(step) for step in range(total)], dtype=torch.float64)
        torch.testing.assert_close(actual, expected, **case.json["tolerance"])
    for run in case.json["published_log_epoch_means"]:
        steps = run["steps_per_epoch"]
        schedule = Schedule(run["base_lr"], run["min_lr"], run["epochs"] * steps, run["warmup_epochs"] * steps)
        for epoch, mean in run["epoch_mean_lr"].items():
            values = [schedule.at(step) for step in range(int(epoch) * steps, (int(epoch) + 1) * steps)]
            assert sum(values) / steps == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize("case", cases("param_groups"), ids=str)
def test_parameter_groups(case: Case) -> None:
    for name, model in case.json["groups"].items():
        parameters = {p["name"]: nn.Parameter(torch.empty(p["shape"])) for p in model["params"]}
        excluded = {key: nn.Parameter(torch.empty(1), requires_grad=False) for key in model["excluded"]}
        # officially a command-line switch, which the case shows only by its outcome
        tables = {p["name"] for p in model["params"] if "bias_table" in p["name"] and not p["weight_decay"]}
        groups = param_groups(
            {**parameters, **excluded}.items(),
            weight_decay=model["weight_decay"],
            no_decay={"pos_embed", "cls_token", "decoder_pos_embed", *tables},
            layer_decay=model["layer_decay"] or 1.0,
            num_layers=case.config["depth"],
        )
        assert len(groups) == model["num_groups"], name
        found = {key: group for group in groups for key in group["names"]}
        assert set(found) == set(parameters), name
        for expected in model["params"]:
            group = found[expected["name"]]
            assert group["lr_scale"] == pytest.approx(expected["lr_scale"], rel=1e-9), (name, expected["name"])
            assert group["weight_decay"] == pytest.approx(expected["weight_decay"], rel=1e-9), (name, expected["name"])


@pytest.mark.parametrize("case", cases("eva02_param_groups"), ids=str)
def test_parameter_groups_of_eva02(case: Case) -> None:
    for stage in ("finetune", "pretrain"):
        expected = case.json[stage]
        names = [name for group in expected["groups"] for name in group["params"]]
        # shapes are not given: officially only vectors, biases and the model's own list do not decay
        vectors = {name for group in expected["groups"] if not group["weight_decay"] for name in group["params"]}
        vectors -= {"pos_embed", "cls_token"}
        groups = param_groups(
            ((name, nn.Parameter(torch.empty(2) if name in vectors else torch.empty(2, 2))) for name in names),
            weight_decay=expected["weight_decay"],
            no_decay={"pos_embed", "cls_token"},
            layer_decay=expected.get("layer_decay") or 1.0,
            num_layers=expected.get("depth", case.json["finetune"]["depth"]),
        )
        found = [(g["weight_decay"], pytest.approx(g["lr_scale"], rel=1e-9), set(g["names"])) for g in groups]
        wanted = [(g["weight_decay"], g["lr_scale"], set(g["params"])) for g in expected["groups"]]
        assert sorted(found, key=lambda g: min(g[2])) == sorted(wanted, key=lambda g: min(g[2]))


@pytest.mark.parametrize("case", cases("train_utils"), ids=str)
def test_lars(case: Case) -> None:
    config = case.config["lars"]
    weight, bias = (nn.Parameter(case.tensors[f"in.lars_{name}0"].clone()) for name in "wb")
    optimizer = Lars(
        [weight, bias], lr=0.0, weight_decay=config["weight_decay"], momentum=config["momentum"],
        trust_coefficient=config["trust_coefficient"],
    )  # fmt: skip
    for step, lr in enumerate(config["lr"]):
        weight.grad, bias.grad = (case.tensors[f"in.lars_g{name}{step}"] for name in "wb")
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        case.close(weight, f"out.lars_w{step + 1}")
        case.close(bias, f"out.lars_b{step + 1}")


@pytest.mark.parametrize("case", cases("train_utils"), ids=str)
def test_losses_of_classification(case: Case) -> None:
    backbone = {
        "name": "vit",
        "image_size": 8,
        "patch_size": 4,
        "width": 8,
        "depth": 1,
        "num_heads": 1,
        "mlp_hidden": 8,
    }
    logits, labels = case.tensors["in.logits"], case.tensors["in.labels"]
    for name in (key for key in case.tensors if key.startswith("out.ce_smooth_")):
        smoothing = float(name.removeprefix("out.ce_smooth_"))
        config = Classify(backbone=backbone, num_classes=case.config["num_classes"], smoothing=smoothing)
        case.close(config.build().loss(logits, labels), name)
    (target,) = [value for key, value in case.tensors.items() if "mixup_target" in key]
    task = Classify(backbone=backbone, num_classes=case.config["num_classes"], smoothing=0.3).build()
    case.close(task.loss(logits, target), "out.soft_ce")  # smoothed already: not once more


class GivenTask(Task):
    """A student on given images, masks and targets."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.trainable = student

    def forward(self, batch: dict) -> tuple[torch.Tensor, dict]:
        index = batch["mask"].flatten().nonzero()[:, 0]
        predicted = self.trainable(batch["image"], batch["mask"], index)
        return negative_cosine(predicted, batch["target"].flatten(0, 1)[index]), {}


class GivenData:
    def __init__(self, case: Case, batch_size: int) -> None:
        self.broken: dict[str, str] = {}
        self.case, self.batch_size = case, batch_size

    def batches(self, start_sample: int) -> Iterator[list[dict]]:
        tensors = self.case.tensors
        for step in range(start_sample // self.batch_size, len(tensors["in.index"])):
            rows = tensors["in.index"][step].long()
            batch = {"image": tensors["in.images"][rows], "target": tensors["in.targets"][rows]}
            yield [{**batch, "mask": tensors["in.masks"][step].bool()}]


@pytest.mark.parametrize("case", cases("pretrain_trajectory"), ids=str)
def test_the_loop_retraces_official_steps(case: Case, tmp_path: Path) -> None:
    config, tolerance = case.config, case.json["tolerance"]
    student = student_of(case, {**config["model"], "ln_eps": config["ln_eps"]})
    optim = OptimConfig(
        **{key: config[key] for key in ("lr", "min_lr", "weight_decay", "betas", "eps", "clip_grad")},
    )
    total = config["epochs"] * config["steps_per_epoch"]
    lr, weight_decay = optim.schedules(total, config["warmup_epochs"] * config["steps_per_epoch"])
    device = torch.device("cpu")
    optimizer = adamw(
        student, optim, no_decay=student.backbone.no_weight_decay(), num_layers=student.backbone.num_layers
    )
    state = TrainState(student, optimizer, Precision("fp32", device), Progress())
    loop = LoopConfig(total, lr, weight_decay, config["batch_size"], optim.clip_grad, log_every=1)
    with RunLog(tmp_path, active=True, total_steps=total) as log:
        run_loop(
            GivenTask(student), GivenData(case, config["batch_size"]), state, loop, world=World(0, 1, device),
            checkpoints=Checkpoints(tmp_path / "checkpoints", {}), log=log,
        )  # fmt: skip
    records = read_log(tmp_path)
    assert [r["step"] for r in records] == list(range(1, total + 1))
    assert [r["lr"] for r in records] == pytest.approx(case.tensors["out.lr"].tolist(), abs=1e-12)
    assert [r["loss"] for r in records] == pytest.approx(case.tensors["out.loss"].tolist(), abs=tolerance["loss_abs"])
    norms = case.tensors["out.grad_norm"].tolist()
    assert [r["grad_norm"] for r in records] == pytest.approx(norms, rel=tolerance["grad_norm_rel"])
    weights = student.state_dict()
    for name, expected in from_official(case.prefix("out.sd.")).items():
        torch.testing.assert_close(
            weights[name], expected, rtol=0, atol=tolerance["weights_abs"], msg=lambda m, n=name: f"{n}: {m}"
        )
