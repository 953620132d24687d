import json
import random
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from openeva.engine import state as state_module
from openeva.engine.ema import Ema
from openeva.engine.optim import OptimConfig, adamw
from openeva.engine.precision import Precision
from openeva.engine.state import CheckpointError, Checkpoints, Progress, TrainState, parameter_tensors, seed_everything


def made(
    width: int = 4, *, depth: int = 1, ema: bool = True, seed: int = 0, precision: str = "fp32",
    optim: OptimConfig | None = None,
) -> TrainState:  # fmt: skip
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, width), *[nn.Linear(width, width) for _ in range(depth)])
    optimizer = adamw(module, optim or OptimConfig(), no_decay=set(), num_layers=0)
    state = TrainState(module, optimizer, Precision(precision, torch.device("cpu")), Progress())
    if ema:
        state.ema = Ema(module, 0.5)
    return state


def trained(state: TrainState, steps: int = 1) -> TrainState:
    for _ in range(steps):
        state.module(torch.randn(2, 3)).square().sum().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        if state.ema is not None:
            state.ema.update(torch.zeros(()))
        state.progress.step += 1
        state.progress.samples_seen += 2
    return state


def flat(state: TrainState) -> dict[str, torch.Tensor]:
    tensors = dict(state.module.state_dict())
    for number, values in enumerate(state.optimizer.state.values()):
        tensors |= {f"{number}.{key}": value for key, value in values.items()}
    return tensors | {f"ema.{key}": value for key, value in (state.ema.state_dict() if state.ema else {}).items()}


def assert_equal(one: TrainState, other: TrainState) -> None:
    assert one.progress == other.progress
    assert flat(one).keys() == flat(other).keys()
    assert all(torch.equal(value, flat(other)[key]) for key, value in flat(one).items())


def test_round_trip_without_a_word_of_warning(tmp_path: Path) -> None:
    first, second = trained(made(), 3), made(seed=1)
    first.progress.rewinds = 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("default", category=FutureWarning)
        Checkpoints(tmp_path, {}).save(first)
        assert Checkpoints(tmp_path, {}).load(second)
    assert_equal(second, first)
    torch.manual_seed(5)
    trained(first)
    torch.manual_seed(5)
    trained(second)
    assert_equal(second, first)


def test_a_full_disk_is_named_and_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, checkpoints = trained(made()), Checkpoints(tmp_path, {})
    checkpoints.save(state)
    with monkeypatch.context() as patch:
        patch.setattr(
            torch, "save", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        with pytest.raises(CheckpointError, match=r"cannot write .*step_00000002.*No space left on device"):
            checkpoints.save(trained(state))
    assert checkpoints.steps() == [1]


@pytest.mark.parametrize("part", ["folder", "random state", "words", "flush", "rename"])
def test_whatever_cannot_be_written_is_named(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, checkpoints = trained(made()), Checkpoints(tmp_path, {})
    checkpoints.save(state)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        target = {
            "folder": (Path, "mkdir"), "random state": (state_module, "_random_state"),
            "words": (Path, "write_text"), "flush": (state_module, "_flush"), "rename": (Path, "rename"),
        }[part]  # fmt: skip
        patch.setattr(*target, fail)
        with pytest.raises(CheckpointError, match=r"cannot write .*step_00000002.*No space left on device"):
            checkpoints.save(trained(state))
    assert checkpoints.steps() == [1]
    checkpoints.save(state)
    assert checkpoints.steps() == [1, 2]


def test_nothing_there() -> None:
    assert Checkpoints(Path("nowhere"), {}).load(made()) is False
    assert Checkpoints(Path("nowhere"), {}).steps() == []


def test_chance_goes_on_where_it_was(tmp_path: Path) -> None:
    def draws() -> list[float]:
        return [torch.rand(()).item(), random.random(), np.random.rand(), np.random.randn()]

    seed_everything(3)
    draws()
    Checkpoints(tmp_path, {}).save(trained(made()))
    in_one_go, continued = draws(), []
    for other_seed in (4, 5):
        seed_everything(other_seed)
        Checkpoints(tmp_path, {}).load(made())
        continued.append(draws())
    del in_one_go[1]  # the run-time checks of shapes, on in tests only, have drawn from Python's generator
    assert continued[0] == continued[1]
    assert [continued[0][0], *continued[0][2:]] == in_one_go


def test_keeps_the_last_and_every_so_many(tmp_path: Path) -> None:
    state, checkpoints = made(), Checkpoints(tmp_path, {}, keep_last=2, keep_every=3)
    for _ in range(8):
        checkpoints.save(trained(state))
    assert checkpoints.steps() == [3, 6, 7, 8]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step:08d}" for step in (3, 6, 7, 8)]


def test_keeps_the_first_of_each_stretch_where_the_cadences_do_not_divide(tmp_path: Path) -> None:
    state, checkpoints = made(), Checkpoints(tmp_path, {}, keep_last=1, keep_every=10)
    for step in range(4, 44, 4):
        state.progress.step = step
        checkpoints.save(state)
    assert checkpoints.steps() == [12, 20, 32, 40]


def test_the_settings_of_the_optimizer_are_those_of_the_run(tmp_path: Path) -> None:
    Checkpoints(tmp_path, {}).save(trained(made(), 2))
    same, other = made(), made(optim=OptimConfig(betas=(0.5, 0.6), eps=0.1, weight_decay=0.3))
    checkpoints = Checkpoints(tmp_path, {})
    assert checkpoints.load(same)
    assert checkpoints.changed_settings == []
    assert checkpoints.load(other)
    assert checkpoints.changed_settings == ["betas: (0.9, 0.98), now (0.5, 0.6)", "eps: 1e-06, now 0.1"]
    for group in other.optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.5, 0.6), 0.1)
    assert [value["step"].item() for value in other.optimizer.state.values()] == [2] * 4  # the moments are kept


class Crash(BaseException):
    pass


@pytest.mark.parametrize("where", ["tensors", "half of them", "random state", "flush", "rename", "removal"])
def test_a_crash_while_saving_loses_nothing(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, checkpoints = trained(made()), Checkpoints(tmp_path, {}, keep_last=1)
    checkpoints.save(state)
    before = {key: value.clone() for key, value in flat(state).items()}
    trained(state)

    rename = Path.rename

    def crash(*args: object, **kwargs: object) -> None:
        if where == "half of them":
            folder = kwargs["checkpoint_id"]
            folder.joinpath("__0_0.distcp").write_bytes(b"half")
            folder.joinpath("trainer.json").write_text("{}")
        if where == "rename" and not str(args[0]).endswith(".partial"):
            rename(*args)  # not the last step, but torch's own within the folder
            return
        if where == "removal":
            next(Path(args[0]).iterdir()).unlink()
        raise Crash

    with monkeypatch.context() as patch:
        target = {
            "tensors": (state_module, "save_tensors"), "half of them": (state_module, "save_tensors"),
            "random state": (torch, "save"), "flush": (state_module, "_flush"), "rename": (Path, "rename"),
            "removal": (shutil, "rmtree"),
        }[where]  # fmt: skip
        if where == "random state":  # the tensors' own files go through torch.save, too
            patch.setattr(state_module, "save_tensors", lambda *args, **kwargs: None)
        patch.setattr(*target, crash)
        with pytest.raises(Crash):
            checkpoints.save(state)
    again = made(seed=1)
    assert Checkpoints(tmp_path, {}, keep_last=1).load(again)
    expected = flat(state) if where == "removal" else before
    assert all(torch.equal(value, expected[key]) for key, value in flat(again).items())
    trained(state)
    checkpoints.save(state)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


@pytest.mark.parametrize(
    ("file", "content"),
    [("trainer.json", None), ("trainer.json", "{"), (".metadata", None), (".metadata", "xyz"), ("__0_0.distcp", None),
     ("__0_0.distcp", "xyz"), ("rng_0.pt", "xyz")],
)  # fmt: skip
def test_damage_is_named_with_the_way_out(file: str, content: str | None, tmp_path: Path) -> None:
    state, checkpoints = trained(made()), Checkpoints(tmp_path, {})
    checkpoints.save(state)
    checkpoints.save(trained(state))
    path = tmp_path / "step_00000002" / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    untouched = made(seed=1)
    with pytest.raises(CheckpointError, match=r"step_00000002 is damaged.*\n.*Remove this folder"):
        checkpoints.load(untouched)
    assert untouched.progress == Progress()
    shutil.rmtree(tmp_path / "step_00000002")
    assert checkpoints.load(untouched)
    assert untouched.progress.step == 1


def test_another_identity_is_refused_with_the_fix(tmp_path: Path) -> None:
    Checkpoints(tmp_path, {"target": "clip-a", "target_width": 768}).save(trained(made()))
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(tmp_path, {"target": "clip-b", "target_width": 1024}).load(made())
    for part in ("target: checkpoint 'clip-a', this run 'clip-b'", "768", "1024", "run.out"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("run", "words"),
    [({"width": 8}, r"\[4, 3\] in the checkpoint and \[8, 3\] in this run"),
     ({"depth": 2}, "only this run has model.2"), ({"depth": 0}, "only the checkpoint has model.1")],
)  # fmt: skip
def test_another_model_is_refused(run: dict, words: str, tmp_path: Path) -> None:
    Checkpoints(tmp_path, {}).save(trained(made()))
    with pytest.raises(CheckpointError, match=rf"(?s)does not fit this run's model.*{words}.*config.yaml"):
        Checkpoints(tmp_path, {}).load(made(**run))


def test_averages_may_be_given_up_but_not_invented(tmp_path: Path) -> None:
    Checkpoints(tmp_path / "with", {}).save(trained(made()))
    assert Checkpoints(tmp_path / "with", {}).load(made(ema=False))
    Checkpoints(tmp_path / "without", {}).save(trained(made(ema=False)))
    with pytest.raises(CheckpointError, match=r"no averaged weights; set optim\.ema"):
        Checkpoints(tmp_path / "without", {}).load(made())


def test_no_pickle_beside_the_tensors(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path, {"a": 1}).save(trained(made(precision="fp16")))
    meta = json.loads((path / "trainer.json").read_text())
    assert meta["progress"] == {"step": 1, "samples_seen": 2, "rewinds": 0}
    assert set(torch.load(path / "rng_0.pt", weights_only=True)) >= {"torch", "python", "numpy"}


def test_weights_for_export() -> None:
    state = made()
    tensors = parameter_tensors(state.module)
    assert tensors.keys() == state.module.state_dict().keys()
    assert all(value.device.type == "cpu" for value in tensors.values())
