"""Model cards say what is so, and nothing is uploaded that was not looked at."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from typer.testing import CliRunner

import openeva
from openeva.backbones.vit import Config, VisionTransformer
from openeva.checkpoints.native import save_native
from openeva.checkpoints.pretrained import PRETRAINED
from openeva.cli import app
from openeva.heads.classifier import ImageClassifier
from openeva.hub import push_to_hub

SIZES = {"image_size": 32, "patch_size": 8, "width": 16, "depth": 1, "num_heads": 2, "mlp_hidden": 32}
OFFICIAL = "eva_21k_1k_336px_psz14_ema_89p6"


class FakeHub(HfApi):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__(endpoint="https://hub.example", token=False)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.repositories[repo_id] = options
        return f"https://hub.example/{repo_id}"

    def create_commit(self, repo_id: str, operations: list[CommitOperationAdd], *, commit_message: str) -> None:
        assert repo_id in self.repositories
        assert commit_message
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()


def model() -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(VisionTransformer(Config(**SIZES, final_norm=False)), 3).eval()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run: model, recipe and log."""
    folder, made = tmp_path / "run", model()
    task = {
        "name": "classify", "backbone": made.backbone.config.model_dump(mode="json"), "num_classes": 3,
        "class_names": ["a", "b", "c"], "pooling": "mean", "batch_norm": False, "init_from": "/home/someone/eva.pt",
    }  # fmt: skip
    save_native(folder / "model", made.state_dict(), {"task": task, "step": 70, "identity": {"at": "/home/someone/x"}})
    recipe = {"data": {"train": [{"name": "elpv"}], "val_crop": {"crop_pct": 0.875, "interpolation": "bicubic"}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    records = [{"step": 60, "loss": 0.5, "time": 1.0}, {"step": 70, "top1": 0.8125, "held_out_loss": 0.6, "time": 2.0}]
    records.append({"step": 70, "loss": 0.4, "time": 3.0})  # a log line that was late
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    """A folder as `openeva convert` makes it from an official file."""
    made = model()
    config = {
        "task": {"name": "classify", "backbone": made.backbone.config.model_dump(mode="json"), "num_classes": 3},
        "converted_from": {"file": f"{OFFICIAL}.pt", "layout": "official names, with backbone and classifier"},
    }
    save_native(tmp_path / "converted", made.state_dict(), config)
    return tmp_path / "converted"


def test_what_is_uploaded_loads_again(run: Path, tmp_path: Path) -> None:
    hub = FakeHub()
    pushed = push_to_hub(run, "me/mine", trained_by="Ada", licence="mit", private=True, api=hub)
    assert pushed.place == "https://hub.example/me/mine"
    assert hub.repositories == {"me/mine": {"private": True, "exist_ok": True}}
    assert sorted(hub.files) == ["README.md", "config.json", "model.safetensors"] == sorted(pushed.files)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in hub.files.items():
        (copy / name).write_bytes(content)
    again, image = openeva.load_checkpoint(str(copy)), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(image), model()(image), rtol=0, atol=0)


def test_a_trained_model_is_called_reproduced_and_by_whom(run: Path) -> None:
    with pytest.raises(ValueError, match="say by whom"):
        push_to_hub(run, "me/mine", dry_run=run / "dry")
    card = push_to_hub(run, "me/mine", trained_by="Ada", licence="apache-2.0", dry_run=run / "dry").card
    assert "**Reproduced, not official**: trained with openeva by Ada, starting from eva.pt" in card
    assert "| Data | elpv |" in card
    assert "| top1 | 0.8125 |" in card
    assert "divided by 0.875" in card
    assert "Measured by the run itself on its held-out images at step 70" in card
    facts = ModelCard(card).data
    assert (facts.license, facts.library_name, facts.pipeline_tag) == ("apache-2.0", "openeva", "image-classification")
    assert "reproduced" in facts.tags


def test_a_converted_model_names_its_authors_and_their_numbers(converted: Path) -> None:
    card = push_to_hub(converted, "me/copy", dry_run=converted / "dry").card
    entry = PRETRAINED[OFFICIAL]
    assert "**Converted, not trained here**" in card
    assert "every tensor as it was" in card
    assert f"https://huggingface.co/{entry.repository}" in card
    assert f"| Teacher of pre-training | {entry.teacher} |" in card
    assert f"| Data | {entry.data} |" in card
    assert "| ImageNet-1K | 89.62 | 98.93 |" in card
    assert "| ObjectNet | 60.91 | 82.77 |" in card
    assert "not measured again on this copy" in card
    facts = ModelCard(card).data
    assert facts.license == "mit"
    assert {result.dataset_type: result.metric_value for result in facts.eval_results}["imagenet-a"] == 86.154


@pytest.mark.parametrize(
    ("name", "size"),
    [(OFFICIAL, "at 336 pixels, bilinear"), ("eva02_L_pt_m38m_medft_in21k_ft_in1k_p14", "at 448 pixels")],
)
def test_the_protocol_of_the_published_numbers_is_that_of_their_code(converted: Path, name: str, size: str) -> None:
    file = converted / "config.json"
    config = json.loads(file.read_text())
    config["converted_from"]["file"] = f"{name}.pt"
    file.write_text(json.dumps(config))
    card = push_to_hub(converted, "me/copy", dry_run=converted / "dry").card
    assert f"ImageNet-V2 and ObjectNet {size}" in card


def test_a_resized_copy_does_not_claim_the_published_numbers(converted: Path) -> None:
    file = converted / "config.json"
    config = json.loads(file.read_text())
    config["converted_from"]["resized"] = ["backbone.pos_embed"]
    file.write_text(json.dumps(config))
    card = push_to_hub(converted, "me/copy", dry_run=converted / "dry").card
    assert "resized to this input: backbone.pos_embed" in card
    assert "of the official file at 336 pixels" in card
    assert not ModelCard(card).data.eval_results


def test_paths_of_this_machine_stay_here(run: Path) -> None:
    hub = FakeHub()
    push_to_hub(run, "me/mine", trained_by="Ada", api=hub)
    assert not any(b"someone" in content for content in hub.files.values())
    config = json.loads(hub.files["config.json"])
    assert config["task"]["init_from"] == "eva.pt"
    assert config["identity"] == {"at": "x"}


def test_a_dry_run_writes_card_and_list_and_asks_nobody(run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["push", str(run), "me/mine", "--trained-by", "Ada", "--dry-run", str(tmp_path / "dry")]
    )
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "dry").iterdir()) == ["README.md", "files.txt"]
    listed = dict(line.split("\t")[::-1] for line in (tmp_path / "dry" / "files.txt").read_text().splitlines())
    assert set(listed) == {"README.md", "config.json", "model.safetensors"}
    assert int(listed["model.safetensors"]) == (run / "model" / "model.safetensors").stat().st_size
    assert "nothing was uploaded" in result.stdout
    assert "`" not in ModelCard.load(tmp_path / "dry" / "README.md").data.to_yaml()


def test_a_model_in_memory_can_be_pushed(tmp_path: Path) -> None:
    hub = FakeHub()
    push_to_hub(model(), "me/mine", trained_by="Ada", api=hub)
    assert json.loads(hub.files["config.json"])["task"]["num_classes"] == 3


def test_mistakes_are_told(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="NAME/mine"):
        push_to_hub(run, "mine", trained_by="Ada")
    with pytest.raises(ValueError, match="a b/c"):
        push_to_hub(run, "a b/c", trained_by="Ada")
    with pytest.raises(ValueError, match="no complete model"):
        push_to_hub(tmp_path, "me/mine", trained_by="Ada")

    hub = FakeHub()

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("401 Client Error")

    monkeypatch.setattr(hub, "create_repo", refuse)
    with pytest.raises(ConnectionError, match=r"401 Client Error.*hf auth login"):
        push_to_hub(run, "me/mine", trained_by="Ada", api=hub)
