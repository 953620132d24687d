"""Evaluations of frozen features: what is shared, who computes, and what they say of unfit data."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from openeva.backbones.base import Backbone, Features, Normalisation
from openeva.data.masking import BlockMasking
from openeva.evals import knn, linear_probe, masked_cosine
from openeva.evals.base import extract_features, shared_features
from openeva.evals.linear_probe import probe


class Colours(Backbone):
    """Features are mean colours, put through a weight so that its type matters."""

    width = 3
    normalisation = Normalisation((0.0,) * 3, (1.0,) * 3)

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, 3)
        self.seen = 0

    def forward(self, image_BCYX, mask_BN=None, layers=()):
        self.seen += len(image_BCYX)
        pooled_BD = self.mix(image_BCYX.mean((2, 3)))
        return Features(pooled_BD, pooled_BD[:, None], (1, 1))


def batches(num=24, size=4, label=None):
    """Two classes, told apart by their red."""
    generator = torch.Generator().manual_seed(0)
    image_BCYX = torch.randint(0, 99, (num, 3, 8, 8), dtype=torch.uint8, generator=generator)
    label_B = torch.arange(num) % 2
    image_BCYX[:, 0] += (100 * label_B[:, None, None]).byte()
    label_B = label_B if label is None else torch.full((num,), label)
    parts = zip(image_BCYX.split(size), label_B.split(size), torch.arange(num).split(size), strict=True)
    return [{"image": image, "label": labels, "index": index} for image, labels, index in parts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_of_reduced_weights_are_features(dtype):
    torch.manual_seed(0)
    backbone = Colours()
    expected = extract_features(backbone, batches())
    found = extract_features(backbone.to(dtype), batches())
    assert found.pooled.dtype == torch.float32
    torch.testing.assert_close(found.pooled, expected.pooled, rtol=0.03, atol=0.02)
    assert found.labels.tolist() == [0, 1] * 12


def test_evaluations_of_one_round_share_their_features():
    task, loaders = SimpleNamespace(backbone=Colours()), {"train": batches(), "val": batches(8)}
    both = [knn.Config(k=3).build(), linear_probe.Config(folds=2).build()]
    with shared_features():
        together = [evaluation.run(task, loaders) for evaluation in both]
    assert task.backbone.seen == 24 + 8
    assert together == [evaluation.run(task, loaders) for evaluation in both]
    assert together[0]["knn_accuracy"] == together[1]["probe_accuracy"] == 1.0
    with torch.no_grad():
        task.backbone.mix.weight.zero_()
    with shared_features():  # another round sees the new weights
        assert both[0].run(task, loaders)["knn_accuracy"] < 1


def test_unlabelled_data_is_named_at_its_first_batch():
    backbone = Colours()
    with pytest.raises(ValueError, match=r"needs labels, .* remove it from `evals`, or give labels"):
        extract_features(backbone, batches(label=-1))
    assert backbone.seen == 0


def test_small_probes_use_one_thread(monkeypatch):
    """Threads that meet thousands of times cost a busy machine twenty times the time."""
    from threadpoolctl import threadpool_info

    seen = []
    fit = linear_probe.LogisticRegressionCV.fit
    monkeypatch.setattr(
        linear_probe.LogisticRegressionCV,
        "fit",
        lambda *args: [seen.extend(pool["num_threads"] for pool in threadpool_info()), fit(*args)][1],
    )
    rng = np.random.default_rng(0)
    train_ND, label_N = rng.standard_normal((40, 5)), np.arange(40) % 2
    probe(train_ND, label_N, train_ND, label_N)
    assert seen
    assert set(seen) == {1}


# ---------------------------------------------------------------------------------------------- hidden patches

GRID = (4, 4)


class Guess(nn.Module):
    """A task whose student sees nothing of hidden patches and whose target is the image's colours."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.grid, self.target = GRID, SimpleNamespace(width=3)
        self.masking = BlockMasking(num_masked=6, min_block=2).build(GRID)
        self.backbone = SimpleNamespace(normalisation=Normalisation((0.0,) * 3, (1.0,) * 3))
        self.masks = {}

    def targets(self, batch):
        self.index = batch["index"]
        return F.adaptive_avg_pool2d(batch["image"].float() / 255, GRID).flatten(2).transpose(1, 2)

    def student(self, image_BCYX, mask_BN, index_M):
        self.masks |= {int(i): mask_N.tolist() for i, mask_N in zip(self.index, mask_BN, strict=True)}
        patches_BNV = F.adaptive_avg_pool2d(image_BCYX, GRID).flatten(2).transpose(1, 2)
        return (patches_BNV + torch.arange(48.0).view(16, 3) / 48).flatten(0, 1)


def test_masked_cosine_does_not_depend_on_the_batches():
    evaluation = masked_cosine.Config().build()
    tasks, found = [Guess(), Guess()], []
    for task, size in zip(tasks, (24, 5), strict=True):
        found.append(evaluation.run(task, {"train": batches(size=size), "val": batches(24, size)}))
    assert tasks[0].masks == tasks[1].masks
    assert len({str(mask) for mask in tasks[0].masks.values()}) > 12
    for name in ("masked_cosine", "visible_mean", "position_mean"):
        assert found[0][name] == pytest.approx(found[1][name], abs=1e-6)
    other = masked_cosine.Config(seed=1).build().run(Guess(), {"train": batches(), "val": batches()})
    assert other["masked_cosine"] != found[0]["masked_cosine"]


@pytest.mark.parametrize(("channel", "cosine"), [(0, 1.0), (1, 0.0)])
def test_the_other_image_is_a_training_image(channel, cosine):
    """Red training images: at right angles to green held-out ones, and just like red ones."""
    train, val = batches(6, 2), batches(3, 1)
    for parts, number in ((train, 0), (val, channel)):
        for batch in parts:
            batch["image"][:] = 0
            batch["image"][:, number] = 200
    found = masked_cosine.Config().build().run(Guess(), {"train": train, "val": val})
    assert found["other_image"] == pytest.approx(cosine, abs=1e-6)


def test_a_loader_that_is_gone_leaves_its_features_to_no_other():
    """Evaluations with images of their own make a loader each; the memory of one becomes that of the next."""
    backbone = Colours()
    with shared_features():
        for number in range(20):
            loader = batches(8, label=number)
            assert set(extract_features(backbone, loader).labels.tolist()) == {number}
            del loader
