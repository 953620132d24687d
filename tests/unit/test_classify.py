"""The classification task: what it starts from, what it minimises, what it measures, what it refuses."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openeva.backbones.vit import Config as BackboneConfig
from openeva.checkpoints.native import save_native
from openeva.config import ConfigError, validate
from openeva.data.mixture import Mixture, Streams
from openeva.data.sources.base import Sample
from openeva.tasks.classify import ClassifyTask, Config
from openeva.tasks.pretrain import Config as Pretrain

VIT = {"name": "vit", "image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "num_heads": 2, "mlp_hidden": 64}


def task_of(num_classes: int = 3, **keys: Any) -> ClassifyTask:
    torch.manual_seed(0)
    return Config(backbone=VIT, num_classes=num_classes, **keys).build()


def batch_of(labels: list[int], **keys: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (len(labels), 3, 32, 32), dtype=torch.uint8, generator=generator)
    return {"image": image, "label": torch.tensor(labels), **keys}


class Labelled:
    """Samples of given labels, without images."""

    def __init__(self, labels: list[int], names: list[str]) -> None:
        self._labels, self.class_names, self.num_classes = labels, names, len(names)

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self) -> np.ndarray:
        return np.array(self._labels)

    def read(self, index: int) -> Sample:
        raise AssertionError("nothing needs to be read")


def data(labels: list[int], names: list[str]) -> Mixture:
    return Mixture([Labelled(labels, names)], [1.0])


class NoFiles:
    """A stream: samples that come one after another."""

    num_classes, samples_per_epoch, class_names = 2, 100, ("a", "b")

    def stream(self, *, epoch: int, seed: int, part: int, num_parts: int) -> Iterator[Sample]:
        raise AssertionError("nothing needs to be read")


# ------------------------------------------------------------------------------------------- what it starts from


@pytest.fixture(scope="module")
def mim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained model, as a run exports it."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("mim") / "model"
    teacher = {**VIT, "width": 16, "depth": 1}
    target, masking = {"name": "features", "teacher": teacher}, {"name": "random", "ratio": 0.4}
    config = Pretrain(backbone=VIT, target=target, masking=masking)
    save_native(folder, config.build().trainable.state_dict(), {"task": config.model_dump(mode="json")})
    return folder


def test_a_pre_trained_model_gives_its_backbone_but_not_head_norm_and_mask_token(mim: Path) -> None:
    task = Config(init_from=str(mim.parent), num_classes=3).build()  # the architecture is the file's
    report = task.load_report
    assert set(report.dropped) == {
        "head.weight", "head.bias", "backbone.mask_token", "backbone.norm.weight", "backbone.norm.bias"
    }  # fmt: skip
    assert set(report.fresh) == {"fc_norm.weight", "fc_norm.bias", "classifier.weight", "classifier.bias"}
    from safetensors.torch import load_file

    weights = load_file(mim / "model.safetensors")
    assert torch.equal(task.backbone.blocks[1].mlp.fc2.weight, weights["backbone.blocks.1.mlp.fc2.weight"])
    assert not any("mask_token" in name for name in task.trainable.state_dict())
    assert any(line.startswith("dropped: head.weight") for line in report.lines())


def test_cls_pooling_keeps_the_pre_trained_norm(mim: Path) -> None:
    task = Config(init_from=str(mim), num_classes=3, pooling="cls").build()
    assert "backbone.norm.weight" in task.load_report.used
    assert set(task.load_report.fresh) == {"classifier.weight", "classifier.bias"}


def test_keys_given_beside_init_from_win(mim: Path) -> None:
    task = Config(
        init_from=str(mim), num_classes=3, backbone={"name": "vit", "image_size": 64, "drop_path": 0.2}
    ).build()
    assert task.backbone.image_size == (64, 64)
    assert "backbone.pos_embed" in task.load_report.resized
    assert task.backbone.config.drop_path == 0.2


def test_fixed_positions_become_learned_ones(tmp_path: Path) -> None:
    """EVA-L is pre-trained with a sin-cos table, which its classifiers learn on."""
    assert Config(init_from="eva_l_psz14", num_classes=3).backbone.positions == "learned"
    assert Config(init_from="eva_l_psz14_21k_ft", num_classes=3).backbone.positions == "learned"
    fixed = {**VIT, "positions": "sincos"}
    state = Config(backbone={**fixed, "final_norm": True}, num_classes=3, pooling="cls").build().trainable.state_dict()
    save_native(tmp_path, state, {"task": {"name": "pretrain", "backbone": fixed}})
    task = Config(init_from=str(tmp_path), num_classes=3).build()
    assert task.backbone.pos_embed.requires_grad
    torch.testing.assert_close(task.backbone.pos_embed.detach(), state["backbone.pos_embed"])
    kept = Config(init_from=str(tmp_path), num_classes=3, backbone={"name": "vit", "positions": "sincos"})
    assert kept.backbone.positions == "sincos"


def exported(folder: Path, names: list[str]) -> str:
    task = task_of(len(names), class_names=names)
    with torch.no_grad():
        task.classifier.classifier.weight.fill_(0.5)
    save_native(folder, task.trainable.state_dict(), {"task": task.config.model_dump(mode="json")})
    return str(folder)


@pytest.mark.parametrize(
    ("names", "keys", "taken"),
    [(["a", "b"], {}, True), (["b", "a"], {}, False), (["a", "c"], {}, False), (["a", "b", "c"], {}, False),
     (["a", "b"], {"init_head": False}, False)],
)  # fmt: skip
def test_the_classifier_is_taken_over_for_the_same_classes_only(
    names: list[str], keys: dict[str, Any], taken: bool, tmp_path: Path
) -> None:
    task = Config(init_from=exported(tmp_path, ["a", "b"]), num_classes=len(names), class_names=names, **keys).build()
    assert bool((task.classifier.classifier.weight == 0.5).all()) == taken
    assert ("classifier.weight" in task.load_report.fresh) == (not taken)
    assert ("classifier.weight" in task.load_report.dropped) == (not taken)


def test_a_fresh_classifier_starts_near_zero_or_where_it_is_told() -> None:
    """Spec section 1.6: deviation 0.02 times 0.001."""
    official, wide = (task_of(400, **keys).classifier.classifier for keys in ({}, {"head_scale": 5.0}))
    assert float(official.weight.detach().std()) == pytest.approx(2e-5, rel=0.05)
    assert torch.allclose(wide.weight, official.weight * 5000)
    assert not official.bias.any()
    assert not wide.bias.any()
    with pytest.raises(ValueError, match="head_scale"):
        task_of(head_scale=0.0)


@pytest.mark.parametrize(("pooling", "norm"), [("mean", False), ("cls", True), ("attention", True)])
def test_the_final_norm_follows_the_pooling_unless_it_is_given(pooling: str, norm: bool) -> None:
    assert Config(backbone=VIT, pooling=pooling).backbone.final_norm is norm
    assert Config(backbone={**VIT, "final_norm": not norm}, pooling=pooling).backbone.final_norm is not norm


# --------------------------------------------------------------------------------------------- what it minimises


@pytest.mark.parametrize(
    "keys", [{}, {"pooling": "cls"}, {"pooling": "attention"}, {"batch_norm": True, "pooling": "cls"}]
)
def test_every_parameter_that_learns_gets_a_gradient(keys: dict[str, Any]) -> None:
    """Data-parallel training waits for all of them."""
    task = task_of(**keys).train()
    task(batch_of([0, 1, 2, 0]))[0].backward()
    without = [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_a_frozen_patch_embedding_does_not_learn() -> None:
    torch.manual_seed(0)
    task = Config(backbone={**VIT, "patch_grad_scale": 0.0}, num_classes=3).build().train()
    task(batch_of([0, 1]))[0].backward()
    frozen = {name for name, p in task.named_parameters() if not p.requires_grad}
    assert frozen == {f"trainable.backbone.patch_embed.proj.{part}" for part in ("weight", "bias")}


def test_attention_pooling_weighs_the_patches() -> None:
    pool = task_of(pooling="attention").classifier.attention_pool.eval()
    patches = torch.randn(1, 5, 32)
    same = patches[:, :1].expand(1, 5, 32)
    torch.testing.assert_close(pool(same), pool(patches[:, :1]))  # a mean of equal values
    with torch.no_grad():  # a query that finds the third patch
        pool.query.copy_(patches[:, 2:3] * 1000)
        for part in pool.attn.in_proj_weight.chunk(3)[:2]:
            part.copy_(torch.eye(32))
    torch.testing.assert_close(pool(patches), pool(patches[:, 2:3]))


def test_a_fresh_classifier_says_almost_nothing() -> None:
    logits = task_of().eval().logits(batch_of([0, 1])["image"])
    assert logits.abs().max() < 0.05


def test_class_weights_scale_samples() -> None:
    plain, weighted = task_of(smoothing=0.2), task_of(smoothing=0.2, class_weights=[1.0, 3.0, 0.5])
    logits, labels = torch.randn(4, 3), torch.tensor([1, 2, 0, 1])
    each = [plain.loss(logits[i : i + 1], labels[i : i + 1]) for i in range(4)]
    expected = (3 * each[0] + 0.5 * each[1] + each[2] + 3 * each[3]) / 4
    torch.testing.assert_close(weighted.loss(logits, labels), expected)
    mixed = 0.25 * F.one_hot(labels, 3).float() + 0.75 * F.one_hot(labels.flip(0), 3).float()
    once = F.cross_entropy(logits, mixed, reduction="none") @ (mixed @ torch.tensor([1.0, 3.0, 0.5])) / 4
    torch.testing.assert_close(weighted.loss(logits, mixed), once)


def test_images_are_mixed_and_erased_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(mixup={"cutmix": 1.0, "mixup": 0.8}, erasing={"prob": 1.0})
    seen: list[Tensor] = []
    monkeypatch.setattr(task.trainable, "forward", lambda image: seen.append(image) or torch.zeros(len(image), 3))
    batch = batch_of([0, 1, 2, 0])
    _, scalars = task.train()(batch)
    assert scalars == {}  # there is no single right answer
    _, scalars = task.eval()(batch)
    assert set(scalars) == {"accuracy"}
    task.logits(batch["image"])
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[0], seen[1])


def test_mixing_needs_an_even_number_of_images() -> None:
    with pytest.raises(ValueError, match="3 is odd: choose an even micro-batch"):
        task_of(mixup={"cutmix": 1.0}).train()(batch_of([0, 1, 2]))


# ---------------------------------------------------------------------------------------------- what it measures


def measure(logits: list[list[float]], labels: list[int], monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Metrics of given answers, in two batches of different sizes."""
    task = task_of(len(logits[0])).eval()
    rows = iter(torch.tensor(logits))
    monkeypatch.setattr(task, "logits", lambda image: torch.stack([next(rows) for _ in image]))
    return task.evaluate([batch_of(labels[:1]), batch_of(labels[1:])])


def test_metrics_of_several_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[6.0, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1], [0, 9, 0, 0, 0, 0]]
    labels = [0, 4, 5, 1]
    metrics = measure(rows, labels, monkeypatch)
    assert metrics["top1"] == 0.5
    assert metrics["top5"] == 0.75
    assert metrics["mean_class_accuracy"] == 0.5  # of the classes that there are: 0, 1 right; 4, 5 not
    expected = F.cross_entropy(torch.tensor(rows), torch.tensor(labels)).item()  # not smoothed
    assert metrics["held_out_loss"] == pytest.approx(expected)
    assert "auc" not in metrics


def test_metrics_of_two_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = measure([[3.0, 1], [2, 1], [1, 3], [9, 8.5], [0, 5]], [0, 0, 1, 1, 0], monkeypatch)
    assert metrics["top1"] == pytest.approx(3 / 5)
    assert metrics["mean_class_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert metrics["auc"] == pytest.approx(4 / 6)  # margins -2 -1 5 of class 0 against 2 and -.5 of class 1
    assert "top5" not in metrics


def test_no_auc_where_held_out_images_are_of_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "auc" not in measure([[3.0, 1], [2, 1]], [0, 0], monkeypatch)


# ----------------------------------------------------------------------------------------------- what it refuses


def test_classes_come_from_the_data() -> None:
    config = Config(backbone=VIT).fit_to(data([0, 1, 1], ["cat", "dog"]), data([1], ["cat", "dog"]))
    assert (config.num_classes, config.class_names) == (2, ["cat", "dog"])
    assert config.build().identity() == {"classes": "cat, dog"}
    more = Config(backbone=VIT, num_classes=4).fit_to(data([0, 1, 1], ["cat", "dog"]), None)
    assert more.class_names == ["cat", "dog", "2", "3"]


def test_many_classes_are_told_by_a_digest() -> None:
    names = [f"n{number:04}" for number in range(40)]
    one, other = (task_of(40, class_names=n).identity()["classes"] for n in (names, names[::-1]))
    assert one.startswith("40: n0000, n0001, n0002, ... (")
    assert len({one, other, task_of(40, class_names=[*names[:-1], "x"]).identity()["classes"]}) == 3


def test_balanced_classes_have_the_same_weight_in_all() -> None:
    labels = [0] * 6 + [1] * 2
    config = Config(backbone=VIT, class_weights="balanced").fit_to(data(labels, ["a", "b", "none"]), None)
    a, b, none = config.class_weights
    assert 6 * a == pytest.approx(2 * b)
    assert 6 * a + 2 * b == pytest.approx(8)  # one on average: the learning rate keeps its meaning
    assert none == 1.0
    sampled = Mixture([Labelled([0, 0], ["a", "b"]), Labelled([1], ["a", "b"])], [1.0, 2.0])
    assert Config(backbone=VIT, class_weights="balanced").fit_to(sampled, None).class_weights == [1.0, 1.0]


@pytest.mark.parametrize(
    ("train", "val", "keys", "words"),
    [(([-1, -1], []), None, {}, r"data.train.*no labels"),
     (([0, 1], ["a", "b"]), ([-1], []), {}, r"data.val.*no labels"),
     (([0, 0], ["a"]), None, {}, "one class only"),
     (([0, 1], ["a", "b"]), ([0], ["z"]), {}, "data.val"),
     (([0, 2], ["a", "b", "c"]), None, {"num_classes": 2}, "has 3 classes, but task.num_classes is 2"),
     (([0, 1], ["a", "b"]), None, {"class_weights": [1.0]}, "task.class_weights has 1 entries for 2"),
     (([0, 1], ["a", "b"]), None, {"class_names": ["x"]}, "task.class_names has 1 entries for 2")],
)  # fmt: skip
def test_data_that_does_not_suit_a_classifier(train: Any, val: Any, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config(backbone=VIT, **keys).fit_to(data(*train), data(*val) if val else None)


def test_what_no_probe_can_be_made_of_is_said_before_the_images_are_looked_at() -> None:
    config = Config(backbone=VIT, probe_first=True)
    config.fit_to(data([0, 0, 1, 1], ["a", "b", "none"]), None)
    with pytest.raises(ConfigError, match=r"two training images; b: only one; set task\.probe_first=false"):
        config.fit_to(data([0, 0, 1], ["a", "b"]), None)
    with pytest.raises(ConfigError, match=r"streams do not allow; set task\.probe_first=false"):
        config.fit_to(Streams([NoFiles()], [1.0]), None)


def test_the_number_of_classes_must_be_known_and_more_than_one() -> None:
    with pytest.raises(ValueError, match="num_classes is auto"):
        Config(backbone=VIT).build()
    with pytest.raises(ValueError, match="needs two classes"):
        Config(backbone=VIT, num_classes=1)


def test_flops_count_a_frozen_backbone_once() -> None:
    task = task_of()
    learning = task.flops_per_sample()
    task.backbone.requires_grad_(False)
    assert math.isclose(learning - task.flops_per_sample(), 2 * task.backbone.flops())


def test_another_number_of_heads_is_refused_though_shapes_agree(tmp_path: Path) -> None:
    save_native(tmp_path, task_of(2).trainable.state_dict(), {"task": {"name": "classify", "backbone": VIT}})
    other = {**VIT, "num_heads": 2 * VIT["num_heads"]}
    with pytest.raises(ValueError, match=rf"init_from .*num_heads {VIT['num_heads']} instead of {other['num_heads']}"):
        Config(backbone=other, num_classes=2, init_from=str(tmp_path)).build()
    with pytest.raises(ValueError, match=rf"weights .*set task\.backbone: {{num_heads: {VIT['num_heads']}}}"):
        validate(BackboneConfig, {**other, "weights": str(tmp_path)}).build()
