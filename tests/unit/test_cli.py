"""The command line as a user meets it: what is printed where, and with which exit status."""

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from typer.testing import CliRunner, Result

from checkpoints.tiny import official
from openeva import __version__, demo, doctor, train
from openeva.backbones.vit import VARIANTS
from openeva.checkpoints.pretrained import PRETRAINED
from openeva.cli import app
from openeva.config import find_recipe, list_recipes, load_config
from openeva.data.sources import captions, scenes
from openeva.engine.log import RunLog
from openeva.heads.clip import CLIP_VARIANTS
from openeva.registry import FOLDERS, component_names
from openeva.train import Recipe, RunResult

COMMANDS = ("demo", "train", "evaluate", "report", "convert", "config", "list", "data", "doctor", "predict", "search")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENEVA_DEBUG", raising=False)
    monkeypatch.setenv("OPENEVA_CACHE", str(tmp_path / "cache"))


def openeva(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def folder_of_images(folder: Path, number: int = 6) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for index in range(number):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A run of two steps."""
    folder_of_images(tmp_path / "images")
    file = tmp_path / "tiny.yaml"
    file.write_text(
        f"""
task:
  name: pretrain
  backbone: {{name: vit, image_size: 32, patch_size: 8, width: 16, depth: 1, num_heads: 2, mlp_hidden: 32}}
  target:
    name: features
    teacher: {{name: timm, model: resnet10t, weights: random, layer: 0, image_size: 32}}
  masking: {{name: block, num_masked: 6, min_block: 2}}
data:
  train: [{{name: image_folder, roots: {tmp_path / "images"}}}]
  num_workers: 0
optim: {{warmup: 0 steps}}
run: {{out: {tmp_path / "run"}, length: 2 steps, batch_size: 2, device: cpu}}
"""
    )
    return file


# ---------------------------------------------------------------------------------------------- help, version, errors


def test_help_names_every_command() -> None:
    result = openeva("--help")
    assert result.exit_code == 0
    assert all(command in result.output for command in COMMANDS)


def test_it_can_be_started_as_a_module_which_torchrun_needs() -> None:
    done = subprocess.run([sys.executable, "-m", "openeva", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"openeva {__version__}\n"


def test_mistakes_in_a_recipe_are_one_message_without_traceback() -> None:
    result = openeva(
        "train", "pretrain/demo", "run.lenght=1 steps", "task.backbone.width=wide", "data.train.0.name=elbv"
    )
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "3 problems in demo" in result.stderr
    for part in ("run.lenght", "'length'", "task.backbone.width", "data.train.0", "'elpv'"):
        assert part in result.stderr
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(openeva("--debug", "config", "nowhere").exception).__name__ == "ConfigError"
    monkeypatch.setenv("OPENEVA_DEBUG", "1")
    assert type(openeva("config", "nowhere").exception).__name__ == "ConfigError"


def test_data_that_are_not_there_are_an_error_before_training(recipe: Path) -> None:
    result = openeva("train", recipe, "--dry-run", "data.train.0.roots=/no/such/folder")
    assert result.exit_code == 2
    assert "/no/such/folder does not exist" in result.stderr


def test_a_defect_of_ours_is_not_hidden(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> RunResult:
        raise KeyError("a bug")

    monkeypatch.setattr(train, "train", broken)
    assert isinstance(openeva("train", recipe).exception, KeyError)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    assert openeva("evaluate", tmp_path / "none").exit_code == 2
    result = openeva("evaluate", tmp_path)
    assert result.exit_code == 2
    assert "not the folder of a run" in result.stderr


# ---------------------------------------------------------------------------------------------- train


def test_train_does_the_run_and_says_what_to_look_at(recipe: Path, tmp_path: Path) -> None:
    result = openeva("train", recipe, "run.length=3 steps")
    assert result.exit_code == 0, result.output
    assert "finished after step 3" in result.stdout
    assert f"openeva report {tmp_path / 'run'}" in result.stdout
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_dry_run_trains_nothing(recipe: Path, tmp_path: Path) -> None:
    result = openeva("train", recipe, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "parameters learn" in result.stdout
    assert "2 steps in all" in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_run_that_a_signal_stops_saves_says_how_to_continue_and_can_be(
    number: signal.Signals, exit_code: int, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["openeva", "train", "my recipe.yaml"])
        patch.setattr(RunLog, "advance", lambda self, step: signal.raise_signal(number))  # while a step is done
        result = openeva("train", recipe)
    assert result.exit_code == exit_code
    assert "stopped after step 1 of 2" in result.stdout
    assert "openeva train 'my recipe.yaml'" in result.stdout
    assert "interrupted" not in result.stderr
    result = openeva("train", recipe)
    assert result.exit_code == 0, result.output
    assert "after step 1 of 2" in result.stdout
    assert "finished after step 2" in result.stdout


def test_a_demo_that_ctrl_c_stops_exits_with_130_and_says_how_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        demo, "train", lambda recipe, **_: RunResult("stopped", recipe.run.out, 7, 40, signal=signal.SIGINT)
    )
    monkeypatch.setattr(sys, "argv", ["openeva", "demo", "--fast"])
    result = openeva("demo", "--fast", "--out", tmp_path / "demo")
    assert result.exit_code == 130
    assert "stopped after step 7 of 40" in result.stdout
    assert "continue with: openeva demo --fast" in result.stdout


def test_an_interrupt_before_anything_is_saved_exits_with_130(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> RunResult:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    monkeypatch.setattr(sys, "argv", ["openeva", "train", "tiny.yaml", "run.seed=1"])
    result = openeva("train", recipe)
    assert result.exit_code == 130
    assert "openeva train tiny.yaml run.seed=1" in result.stderr


def test_demo_restart_moves_what_is_there_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Path] = []
    monkeypatch.setattr("openeva.demo.run_demo", lambda out, **_: done.append(out))
    for number in (1, 2):
        (tmp_path / "runs" / "demo-fast").mkdir(parents=True)
        (tmp_path / "runs" / "demo-fast" / f"precious{number}").touch()
        assert openeva("demo", "--fast", "--restart").exit_code == 0
    assert done == [Path("runs/demo-fast")] * 2
    assert sorted(path.name for path in (tmp_path / "runs").rglob("precious*")) == ["precious1", "precious2"]


# ---------------------------------------------------------------------------------------------- config, list


def test_config_prints_a_recipe_that_can_be_used_as_it_is(tmp_path: Path) -> None:
    result = openeva("config", "pretrain/demo", "run.seed=3", "optim.lr=1e-4")
    assert result.exit_code == 0
    (tmp_path / "mine.yaml").write_text(result.stdout)
    assert load_config(Recipe, "mine.yaml") == load_config(Recipe, "pretrain/demo", ["run.seed=3", "optim.lr=1e-4"])


def test_list_shows_every_recipe_variant_and_component() -> None:
    result = openeva("list")
    assert result.exit_code == 0
    components = [name for kind in FOLDERS for name in component_names(kind)]
    for name in [*list_recipes(), *VARIANTS, *CLIP_VARIANTS, *components]:
        assert name in result.stdout
    assert "1,011," in result.stdout, "parameters of eva_g_14"
    title = find_recipe("pretrain/demo").read_text().partition("\n")[0].removeprefix("# ")
    assert title in result.stdout.replace("\n", " ")


def test_list_shows_released_weights_and_what_is_known_of_them() -> None:
    shown = openeva("list", "--weights").stdout
    assert all(name in shown for name in PRETRAINED)
    for part in ("IN-1K", "1,013,005,672", "336", "MIT", "OpenAI CLIP ViT-L/14", "89.622", "BAAI/EVA"):
        assert part in next(line for line in shown.splitlines() if "eva_21k_1k_336px_psz14_ema_89p6" in line)
    assert openeva("list", "large_patch14_448").stdout.count("eva02_L") == 6  # by timm's names
    facts = json.loads(openeva("list", "--weights", "eva_l*88p0", "--json").stdout)["weights"]
    assert [fact["name"] for fact in facts] == ["eva_l_psz14_196px_1k_ft_88p0"]
    assert facts[0]["published"]["imagenet_1k"]["top1"] == 88.0
    assert facts[0]["source"] == "BAAI/EVA: eva_l_psz14_196px_1k_ft_88p0.pt"


def test_list_of_nothing_is_an_error_with_a_suggestion() -> None:
    result = openeva("list", "--weights", "eva_psz15")
    assert result.exit_code == 2
    assert "no released weights fit 'eva_psz15'; did you mean 'eva_psz14'" in result.stderr
    result = openeva("list", "--recipes", "eva_psz14")
    assert result.exit_code == 2
    assert "--weights" in result.stderr


def test_all_lists_can_be_read_by_programs() -> None:
    sections = json.loads(openeva("list", "--json").stdout)
    assert set(sections) == {"recipes", "variants", "weights", "components"}
    assert {row["name"] for row in sections["variants"]} == {*VARIANTS, *CLIP_VARIANTS}
    assert [row["recipe"] for row in sections["recipes"]] == list_recipes()


def test_list_can_be_narrowed() -> None:
    result = openeva("list", "--recipes")
    assert "pretrain/demo" in result.stdout
    assert "eva_g_14 " not in result.stdout
    assert "image_folder" not in result.stdout


# ---------------------------------------------------------------------------------------------- doctor


def test_doctor_finds_released_weights_and_what_a_run_starts_from(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    result = openeva("doctor", recipe, "task.init_from=eva_psz14")
    assert result.exit_code == 1
    assert "task.init_from: eva_psz14: the weights of BAAI/EVA are neither in the local cache" in result.stdout
    assert "OPENEVA_WEIGHTS: not set" in result.stdout
    monkeypatch.setenv("OPENEVA_WEIGHTS", str(tmp_path))
    (tmp_path / "eva_psz14.pt").touch()
    result = openeva("doctor", recipe, "task.init_from=eva_psz14")
    assert f"task.init_from: eva_psz14: {tmp_path / 'eva_psz14.pt'}" in result.stdout
    assert "holds 1 of" in result.stdout
    assert (
        "unknown weights 'eva_psz41'; did you mean 'eva_psz14'"
        in openeva("doctor", recipe, "task.init_from=eva_psz41").stdout
    )
    (tmp_path / "hub" / "models--BAAI--EVA" / "snapshots" / "1").mkdir(parents=True)
    (tmp_path / "hub" / "models--BAAI--EVA" / "snapshots" / "1" / "eva_l_psz14.pt").touch()
    assert "BAAI/EVA is in the local cache" in openeva("doctor", recipe, "task.init_from=eva_l_psz14").stdout


def test_doctor_looks_at_machine_data_weights_and_output(recipe: Path) -> None:
    result = openeva("doctor", recipe)
    assert result.exit_code == 0, result.output
    for part in (torch.__version__, sys.executable, "6 samples", "40 x 40 pixels", "random", "can be written to"):
        assert part in result.stdout


def test_doctor_shows_a_caption(tmp_path: Path) -> None:
    """A wrong column is seen before it is learnt."""
    file = tmp_path / "pairs.jsonl"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    file.write_text('{"image": "a.png", "caption": "a black square", "id": "7"}\n')
    for keys, words in (({}, "has 8 x 8 pixels and the caption 'a black square'"), ({"caption_column": "id"}, "'7'")):
        assert words in doctor._look_at_source(captions.Config(file=file, **keys))
    assert "caption" not in doctor._look_at_source(scenes.Config(num_images=1))


def test_doctor_fails_where_something_required_is_missing(recipe: Path) -> None:
    missing = ["data.train.0.roots=/no/such/folder", "task.target.teacher.weights=/no/such/file.pt"]
    result = openeva("doctor", recipe, *missing, "run.device=cuda:7")
    assert result.exit_code == 1
    failed = {line.split()[1] for line in result.stdout.splitlines() if line.startswith("fail")}
    assert {"data.train.0", "weights"} <= failed
    assert torch.cuda.is_available() or "device" in failed


@pytest.mark.parametrize(
    ("teacher", "repository", "fix"),
    [
        ("{name: timm, model: resnet10t}", "timm/resnet10t.c3_in1k", "weights: /path/to/file"),
        ("{name: timm, model: resnet10t.c3_in1k}", "timm/resnet10t.c3_in1k", "weights: /path/to/file"),
        (
            "{name: open_clip, model: ViT-B-32, pretrained: laion2b_s34b_b79k}",
            "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
            "pretrained: /path/to/file",
        ),
        ("{name: open_clip, model: 'hf-hub:lab/tower'}", "lab/tower", "model: local-dir:/path/to/folder"),
    ],
)
def test_doctor_says_whether_a_teacher_of_the_hub_is_here_or_in_reach(
    teacher: str, repository: str, fix: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def look() -> doctor.Check:
        checks = list(doctor.check_recipe(str(recipe), [f"task.target.teacher={teacher}"]))
        return next(check for check in checks if check.name == "weights")

    snapshot = tmp_path / "hub" / f"models--{repository.replace('/', '--')}" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()  # without the weights that is not enough
    check = look()
    assert check.status == "fail"
    for part in ("task.target.teacher", repository, "HF_HUB_OFFLINE", str(tmp_path / "hub"), fix):
        assert part in check.detail
    (snapshot / "model.safetensors").touch()
    check = look()
    assert check.status == "ok"
    assert f"{repository} is in the local cache" in check.detail


def test_doctor_reports_a_recipe_that_is_not_valid(recipe: Path) -> None:
    result = openeva("doctor", recipe, "run.batch_size=0", "run.lenght=3")
    assert result.exit_code == 1
    assert result.stdout.count("fail recipe ") == 2


def test_doctor_names_missing_and_outdated_packages_and_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["numpy>=999", "no-such-package>=1", "also-missing; extra == 'fancy'", "pytest; extra == 'there'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: texts)
    monkeypatch.setattr(
        doctor.importlib.metadata, "metadata", lambda _: type("M", (), {"get_all": lambda *_: ["fancy", "there"]})()
    )
    checks = {(check.name, check.status): check.detail for check in doctor.check_machine()}
    assert "no-such-package is missing" in checks["packages", "fail"]
    assert "needed >=999" in checks["packages", "fail"]
    assert "pip install 'openeva[fancy]'" in checks["extra", "note"]
    assert checks["extra", "ok"] == "there: installed"


# ---------------------------------------------------------------------------------------------- convert, data


def test_convert_accounts_for_the_tensors_and_writes_the_layout(recipe: Path, tmp_path: Path) -> None:
    assert openeva("train", recipe, "run.length=1 steps").exit_code == 0
    result = openeva("convert", tmp_path / "run" / "model", tmp_path / "official.pt", "--to", "official")
    assert result.exit_code == 0, result.output
    assert f"written: {tmp_path / 'official.pt'}" in result.stdout
    state_dict = torch.load(tmp_path / "official.pt", weights_only=True)["model"]
    assert "lm_head.weight" in state_dict
    assert "mask_token" in state_dict


def test_convert_refuses_a_file_that_holds_no_weights(tmp_path: Path) -> None:
    (tmp_path / "odd.pt").write_text("no weights")
    result = openeva("convert", "odd.pt", "out.pt", "--to", "timm")
    assert result.exit_code == 2
    assert "odd.pt" in result.stderr
    assert not (tmp_path / "out.pt").exists()


def test_data_index_indexes_a_folder_for_later_runs(tmp_path: Path) -> None:
    folder_of_images(tmp_path / "images", 5)
    result = openeva("data", "index", tmp_path / "images")
    assert result.exit_code == 0, result.output
    assert "5 images" in result.stdout
    assert list((tmp_path / "cache").iterdir())
    assert openeva("data", "index", tmp_path / "nothing").exit_code == 2


def test_output_that_nobody_reads_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """`openeva list | head -1` ends without a message."""

    def closed() -> list[tuple[str, str]]:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("openeva.catalogue.recipes", closed)
    assert openeva("list").stderr == ""


def test_convert_brings_an_official_file_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENEVA_WEIGHTS", str(tmp_path))
    source = tmp_path / "eva_psz14.pt"
    torch.save({"module": official(relative="shared"), "epoch": 3}, source)
    result = openeva("convert", "eva_psz14", "ours", "--to", "openeva")  # by its official name
    assert result.exit_code == 0, result.output
    assert "kept: rel_pos_bias.relative_position_index: in original.pt, for the way back" in result.stdout
    result = openeva("convert", "ours", "back/eva_psz14.pt", "--to", "official")
    assert "kept: epoch: from original.pt" in result.stdout
    assert Path("back/eva_psz14.pt").read_bytes() == source.read_bytes()
