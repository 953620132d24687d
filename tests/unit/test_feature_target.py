"""A frozen teacher's features as the target: resizing, freezing, precision, statistics, cache."""

import json
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from openeva.backbones.base import Backbone, Features, Normalisation
from openeva.config import ComponentConfig
from openeva.data import feature_cache
from openeva.data.feature_cache import CacheWriter, FeatureCache, finish
from openeva.data.loader import EvalLoader
from openeva.data.mixture import Mixture
from openeva.data.sources.base import Sample
from openeva.data.views import CropConfig, ViewSpec, normalise
from openeva.engine.loop import to_device
from openeva.losses.cosine import negative_cosine
from openeva.targets.features import Config, store_reduced

TIMM = {"name": "timm", "weights": "random", "image_size": 64}
VIT = TIMM | {"model": "vit_tiny_patch16_224"}


class PixelTeacher(Backbone):
    """Patches are the mean colours of 8x8 pixels: anything that happens to them afterwards can be seen."""

    def __init__(self, image_size, identity):
        super().__init__()
        self.width, self.stride, self.num_layers, self.identity = 3, 8, 1, identity
        self.image_size = (image_size, image_size)
        self.normalisation = Normalisation((0.0,) * 3, (1.0,) * 3)

    def forward(self, image_BCYX, mask_BN=None, layers=()):
        map_BDyx = F.avg_pool2d(image_BCYX, 8)
        patches_BND = map_BDyx.flatten(2).transpose(1, 2)
        return Features(patches_BND.mean(1), patches_BND, tuple(map_BDyx.shape[2:]), dict.fromkeys(layers, map_BDyx))

    def flops(self):
        return 7.0


class PixelConfig(ComponentConfig):
    name: str = "unit.test_feature_target"
    image_size: int = 32
    identity: str = "pixels"

    def build(self):
        return PixelTeacher(self.image_size, self.identity)


def pixel_target(grid=(4, 4), teacher=None, **options):
    return Config(teacher=teacher or PixelConfig(), **{"precision": "fp32", **options}).build(grid)


def test_a_teacher_of_clips_is_refused() -> None:
    clips = {"name": "vit", "width": 8, "depth": 1, "num_heads": 2, "mlp_hidden": 8, "image_size": 16, "patch_size": 8}
    with pytest.raises(ValueError, match="needs one that sees images"):
        Config(teacher={**clips, "num_frames": 2, "tubelet": 1}).build((2, 2))


class Images(list):
    """Batches as the evaluation loader gives them."""

    def __init__(self, image_BCYX, index_B, batch_size=4, flip=False, data="these"):
        self.num_samples = len(image_BCYX)
        self.identity = {"data": data}
        self.passes = 0
        super().__init__(
            {"image": image, "index": index, "flip": torch.full((len(index),), flip)}
            for image, index in zip(image_BCYX.split(batch_size), index_B.split(batch_size), strict=True)
        )

    def __iter__(self):
        self.passes += 1
        return super().__iter__()

    def part(self, *, limit=None, rank=0, world_size=1):
        whole = {key: torch.cat([batch[key] for batch in self]) for key in self[0]}
        chosen = slice(rank, limit, world_size)
        part = Images(whole["image"][chosen], whole["index"][chosen], flip=bool(whole["flip"].any()))
        if "target_image" in whole:
            for number, target_image in enumerate(whole["target_image"][chosen].split(4)):
                part[number]["target_image"] = target_image
        return part


def some_images(seed=0, num=10, size=32):
    generator = torch.Generator().manual_seed(seed)
    image_BCYX = torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8, generator=generator)
    index_B = torch.tensor([7, 0, 3, 20, 1, 2, 9, 8, 4, 13])[:num]
    return Images(image_BCYX, index_B), image_BCYX, index_B


def directly(target, image_BCYX):
    return target(normalise(image_BCYX, target.view.normalisation.mean, target.view.normalisation.std))


# ---------------------------------------------------------------------------------------------------------- loss


def test_loss_is_a_mean_over_tokens_of_minus_the_cosine():
    predicted_MV = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    target_MV = torch.tensor([[5.0, 0.0], [0.0, -0.1], [1.0, 0.0]])
    torch.testing.assert_close(negative_cosine(predicted_MV, target_MV), torch.tensor(-(1 - 1 + 0.5**0.5) / 3))
    weight_M = torch.tensor([1.0, 0.0, 1.0])
    torch.testing.assert_close(negative_cosine(predicted_MV, target_MV, weight_M), torch.tensor(-(1 + 0.5**0.5) / 2))


def test_loss_ignores_padding_in_the_gradient_too():
    predicted_MV = torch.randn(6, 8, requires_grad=True)
    weight_M = torch.tensor([1.0, 1, 0, 1, 0, 0])
    negative_cosine(predicted_MV, torch.randn(6, 8), weight_M).backward()
    assert predicted_MV.grad[weight_M == 0].eq(0).all()
    assert predicted_MV.grad[weight_M == 1].ne(0).all()
    assert negative_cosine(predicted_MV, torch.randn(6, 8), torch.zeros(6)) == 0


def test_loss_is_computed_in_fp32():
    predicted_MV, target_MV = torch.randn(64, 256).bfloat16(), torch.randn(64, 256).half()
    with torch.autocast("cpu", torch.bfloat16):
        loss = negative_cosine(predicted_MV, target_MV)
    assert loss.dtype == torch.float32
    expected = -F.cosine_similarity(predicted_MV.double(), target_MV.double()).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------------------- frozen teacher


def test_teacher_learns_nothing_and_stays_in_eval_mode():
    target = Config(teacher=TIMM | {"model": "resnet18"}).build((2, 2)).train()
    nn.ModuleList([target]).train()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    image_BCYX = torch.randn(4, 3, 64, 64, requires_grad=True)
    target_BNV = target(image_BCYX)
    assert not target_BNV.requires_grad
    assert not any(parameter.requires_grad for parameter in target.parameters())
    assert not any(module.training for module in target.teacher.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())  # batch norms too


@pytest.mark.parametrize(
    ("teacher", "layer", "grid", "width"),
    [
        (VIT, None, (4, 4), 192),
        (VIT, 2, (4, 4), 192),
        (TIMM | {"model": "convnext_atto", "layer": 2}, None, (7, 7), 160),
        (TIMM | {"model": "convnext_atto"}, 1, (3, 5), 80),
        (TIMM | {"model": "vit_small_patch14_dinov2", "image_size": 56}, None, (8, 8), 384),
        ({"name": "open_clip", "model": "ViT-S-32-alt", "pretrained": "random", "image_size": 64}, None, (4, 4), 256),
    ],
)
def test_any_backbone_teaches_any_grid(teacher, layer, grid, width):
    target = Config(teacher=teacher, layer=layer).build(grid)
    assert target.width == width
    target_BNV = target(torch.randn(2, 3, *target.view.image_size))
    assert target_BNV.shape == (2, grid[0] * grid[1], width)
    assert target_BNV.dtype == torch.float32
    assert target_BNV.std() > 0.01
    assert target.flops() == target.teacher.flops() > 1e6


@pytest.mark.parametrize("grid", [(4, 4), (2, 2), (2, 4), (8, 8)])
@pytest.mark.parametrize("resize", ["bilinear", "bicubic"])
def test_resizing_keeps_places(grid, resize):
    """Red grows downwards and green to the right; resized features tell rows and columns in raster order."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    image_BCYX = torch.stack([y, x, torch.full_like(x, 5.0)])[None] + 0.5
    target = pixel_target(grid, PixelConfig(image_size=64), resize=resize)
    map_yxV = target(image_BCYX)[0].unflatten(0, grid)
    rows, columns = ((torch.arange(n) + 0.5) * 64 / n for n in grid)
    torch.testing.assert_close(map_yxV[..., 0], rows[:, None].expand(grid), rtol=0, atol=6.0)  # edges are flattened
    torch.testing.assert_close(map_yxV[..., 1], columns.expand(grid), rtol=0, atol=6.0)
    torch.testing.assert_close(map_yxV[..., 2], torch.full(grid, 5.5))


@pytest.mark.parametrize("resize", ["bilinear", "bicubic"])
def test_resizing_averages_what_it_shrinks(resize):
    """Antialiased: of 16 teacher patches none is passed over."""
    noise_BCYX = torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    all_patches = pixel_target((8, 8), PixelConfig(image_size=64))(noise_BCYX)
    shrunk = pixel_target((2, 2), PixelConfig(image_size=64), resize=resize)(noise_BCYX)
    assert shrunk.std() < 0.4 * all_patches.std()


def test_image_size_is_the_teachers_business():
    target = pixel_target(image_size=64)
    assert target.view.image_size == (64, 64)
    assert target(torch.zeros(1, 3, 64, 64)).shape == (1, 16, 3)
    assert pixel_target().view.image_size == (32, 32)


def test_precision_holds_inside_autocast():
    image_BCYX = torch.randn(2, 3, 64, 64)
    exact = Config(teacher=VIT, precision="fp32").build((4, 4))
    reduced = Config(teacher=VIT, precision="bf16").build((4, 4))
    with torch.no_grad():
        expected = exact.teacher(image_BCYX).patches
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(exact(image_BCYX), expected)
        coarse = reduced(image_BCYX)
    assert coarse.dtype == torch.float32
    assert 1e-4 < (coarse - expected).abs().mean() < 0.05


def test_identity_says_what_is_predicted():
    identities = [
        Config(teacher=VIT).build((4, 4)).identity,
        Config(teacher=VIT | {"seed": 1}).build((4, 4)).identity,
        Config(teacher=VIT, layer=3).build((4, 4)).identity,
        Config(teacher=VIT, standardise=True).build((4, 4)).identity,
    ]
    assert len(set(identities)) == 4
    assert identities[0] == Config(teacher=VIT, precision="fp32").build((4, 4)).identity
    others = [
        Config(teacher=VIT, image_size=96),
        Config(teacher=VIT | {"layer": 3}),
        Config(teacher=VIT | {"norm": False}),
        Config(teacher=VIT | {"statistics": "clip"}),
        Config(teacher=VIT, resize="bicubic"),
    ]
    assert len({*identities, *(other.build((4, 4)).identity for other in others)}) == 9
    assert identities[2] == Config(teacher=VIT, layer=-9).build((4, 4)).identity


def test_identity_tells_random_transformers_of_our_own_apart():
    teacher = {"name": "vit", "image_size": 32, "patch_size": 8, "width": 32, "depth": 1, "num_heads": 2} | {
        "mlp_hidden": 64
    }
    identities = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        identities.append(Config(teacher=teacher).build((4, 4)).identity)
    assert identities[0] == identities[2] != identities[1]


# ---------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("cache", [False, True])
def test_standardised_channels_have_mean_0_and_deviation_1(tmp_path, cache):
    images, image_BCYX, index_B = some_images()
    for batch in images:
        batch["image"][:, 1] //= 16
        batch["image"][:, 2] = 100  # never changes
    target = pixel_target(standardise=True, cache=cache)
    assert target.needs_preparation
    target.prepare(images, tmp_path)
    target_MV = (
        target.lookup(index_B, torch.zeros(10, dtype=torch.bool)) if cache else directly(target, image_BCYX)
    ).flatten(0, 1)
    torch.testing.assert_close(target_MV.mean(0), torch.zeros(3), rtol=0, atol=2e-3)
    torch.testing.assert_close(target_MV[:, :2].std(0), torch.ones(2), rtol=1e-2, atol=0)
    torch.testing.assert_close(target_MV[:, 2], torch.zeros(len(target_MV)), rtol=0, atol=2e-3)


class Greys:
    """Images of one grey each, brighter from one to the next, as folders are often sorted."""

    num_classes = 0

    def __len__(self):
        return 256

    def read(self, index):
        return Sample(Image.new("RGB", (32, 32), (index,) * 3), str(index))


@pytest.mark.parametrize("cache", [False, True])
def test_statistics_are_of_the_whole_data_set(tmp_path, cache):
    crop = CropConfig(kind="center", crop_pct=1, hflip=0)
    images = EvalLoader(Mixture([Greys()], [1.0]), ViewSpec((32, 32)), crop, batch_size=16)
    target = pixel_target(standardise=True, cache=cache, standardise_images=64)
    target.prepare(images, tmp_path)
    torch.testing.assert_close(target.mean_V, torch.full((3,), 0.5), rtol=0, atol=0.06)
    torch.testing.assert_close(target.std_V, torch.full((3,), 1 / 12**0.5), rtol=0.15, atol=0)


def test_statistics_are_kept_for_a_continued_run(tmp_path):
    first = pixel_target(standardise=True, standardise_images=6)
    done = []
    first.prepare(some_images(seed=0)[0], tmp_path, done.append)
    assert sum(done) == 6
    again = pixel_target(standardise=True)
    images = some_images(seed=1)[0]
    again.prepare(images, tmp_path)
    assert torch.equal(again.mean_V, first.mean_V)
    assert torch.equal(again.std_V, first.std_V)
    assert images.passes == 0
    with pytest.raises(ValueError, match=r"statistics of another teacher \(pixels, .* delete it or choose another"):
        pixel_target(standardise=True, teacher=PixelConfig(identity="other")).prepare(images, tmp_path)


# --------------------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("standardise", [False, True])
def test_cache_equals_computing(tmp_path, standardise):
    images, image_BCYX, index_B = some_images(size=64)
    target = Config(teacher=VIT, cache=True, standardise=standardise, precision="fp32").build((3, 3))
    assert not target.cached
    assert target.flops() > 0
    done = []
    target.prepare(images, tmp_path, done.append)
    assert sum(done) == 10
    assert target.cached
    assert target.flops() == 0
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    flip_B = torch.arange(10) % 3 == 0
    seen_BCYX = torch.where(flip_B[:, None, None, None], image_BCYX.flip(-1), image_BCYX)
    expected_BNV = directly(target, seen_BCYX)
    found_BNV = target.lookup(index_B[order], flip_B[order])
    assert found_BNV.dtype == torch.float32
    torch.testing.assert_close(found_BNV, expected_BNV[order], rtol=2e-3, atol=5e-3)
    file = tmp_path / "features/features-0-of-1.npy"
    assert np.load(file, mmap_mode="r").shape == (10, 2, 9, 192)
    assert 0 <= file.stat().st_size - target.cache_bytes(10) <= 256


def test_the_loop_leaves_on_the_host_what_the_cache_is_asked_by():
    """From the device they could be read only by waiting for it, in every step."""
    batch = {"image": torch.zeros(1, 3, 8, 8), "index": torch.tensor([3]), "flip": torch.tensor([True]), "broken": []}
    moved = to_device(batch, torch.device("meta"))
    assert moved["image"].is_meta
    assert moved["index"].tolist() == [3]
    assert moved["flip"].tolist() == [True]


def test_cache_is_made_once(tmp_path):
    pixel_target(cache=True).prepare(some_images()[0], tmp_path)
    images, image_BCYX, index_B = some_images()
    again = pixel_target(cache=True)
    again.prepare(images, tmp_path, lambda _: pytest.fail("computed again"))
    found_BNV = again.lookup(index_B, torch.zeros(10, dtype=torch.bool))
    torch.testing.assert_close(found_BNV, directly(again, image_BCYX), rtol=1e-3, atol=1e-3)


def test_stale_cache_is_refused(tmp_path):
    pixel_target(cache=True).prepare(some_images()[0], tmp_path)
    for target, images, word in [
        (pixel_target(cache=True, teacher=PixelConfig(identity="other")), some_images()[0], "teacher: cached 'pixels"),
        (pixel_target(cache=True), some_images(seed=1)[0], "pixels: cached"),
        (pixel_target(cache=True), Images(*some_images()[1:], data="those"), "data: cached 'these', now 'those'"),
        (pixel_target(cache=True, image_size=64), some_images()[0], "teacher: cached .*64 x 64 px"),
        (pixel_target(cache=True), some_images(num=8)[0], "num_images: cached 10, now 8"),
        (pixel_target((2, 2), cache=True), some_images()[0], "grid"),
        (pixel_target(cache=True, layer=0), some_images()[0], "teacher: cached .*layer 0"),
        (pixel_target(cache=True, resize="bicubic"), some_images()[0], "teacher: cached .*bicubic"),
    ]:
        with pytest.raises(ValueError, match=rf"something else \(.*{word}.*\); delete it or choose another run\.out"):
            target.prepare(images, tmp_path)


def test_interrupted_cache_is_made_anew(tmp_path):
    images, image_BCYX, index_B = some_images()

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pixel_target(cache=True).prepare(images, tmp_path, interrupt)
    assert not list((tmp_path / "features").glob("*.json"))
    (tmp_path / "features/.features-0-of-1.npy.tmp").write_bytes(b"left by a killed run")
    target = pixel_target(cache=True)
    target.prepare(images, tmp_path)
    found_BNV = target.lookup(index_B, torch.ones(10, dtype=torch.bool))
    torch.testing.assert_close(found_BNV, directly(target, image_BCYX.flip(-1)), rtol=1e-3, atol=1e-3)


def test_cache_takes_the_targets_own_view_of_the_crop(tmp_path):
    images, image_BCYX, index_B = some_images()
    for batch in images:
        batch["target_image"] = 255 - batch["image"]
    target = pixel_target(cache=True)
    target.prepare(images, tmp_path)
    found_BNV = target.lookup(index_B, torch.zeros(10, dtype=torch.bool))
    torch.testing.assert_close(found_BNV, directly(target, 255 - image_BCYX), rtol=1e-3, atol=1e-3)


def test_cache_misuse_says_what_is_wrong(tmp_path, monkeypatch):
    images, image_BCYX, index_B = some_images()
    target = pixel_target(cache=True)
    with pytest.raises(ValueError, match=r"set cache: true and call prepare\(\)"):
        target.lookup(index_B, torch.zeros(10, dtype=torch.bool))
    with pytest.raises(ValueError, match="set hflip to 0"):
        target.prepare(Images(image_BCYX, index_B, flip=True), tmp_path / "flipped")
    target.prepare(images, tmp_path)
    for unknown in (5, 21, -1):
        with pytest.raises(ValueError, match=rf"samples \[{unknown}\] have no cached teacher features"):
            target.lookup(torch.tensor([0, unknown]), torch.zeros(2, dtype=torch.bool))

    usage = namedtuple("usage", "free")
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: usage(target.cache_bytes(10) - 1))
    with pytest.raises(ValueError, match=r"needs 0\.0 GB and the disk of .* has 0\.0 GB free; choose another run\.out"):
        pixel_target(cache=True).prepare(images, tmp_path / "full")


def test_cache_refuses_what_fp16_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="above 65504"), CacheWriter(tmp_path, 0, 1, 1, 1) as writer:
        writer.append(np.array([0]), np.full((1, 2, 1, 1), 1e5, np.float32))
    assert not list(tmp_path.iterdir())


def test_parts_of_several_processes_are_one_cache(tmp_path):
    """Whatever the number of processes that reads it."""
    features = np.arange(6 * 2 * 2 * 3, dtype=np.float32).reshape(6, 2, 2, 3)
    for part in range(2):
        with CacheWriter(tmp_path, part, 2, 2, 3) as writer:
            for index in range(part, 6, 2):
                writer.append(np.array([index]), features[[index]])
    finish(tmp_path, {"teacher": "pixels"}, 2)
    assert json.loads((tmp_path / "cache.json").read_text())["num_parts"] == 2
    cache = FeatureCache(tmp_path)
    index_B, flip_B = np.array([4, 1, 5, 0]), np.array([True, False, False, True])
    np.testing.assert_array_equal(cache.lookup(index_B, flip_B), features[index_B, flip_B.astype(int)])
    assert cache.samples.tolist() == [0, 1, 2, 3, 4, 5]


# ---------------------------------------------------------------------------------------------------------- speed


SMALL_VIT = {"name": "vit", "image_size": 64, "patch_size": 16, "width": 32, "depth": 2, "num_heads": 2,
             "mlp_hidden": 64}  # fmt: skip


@pytest.mark.parametrize("teacher", [SMALL_VIT, VIT, TIMM | {"model": "convnext_atto"}], ids=str)
def test_weights_stored_in_reduced_precision_give_the_same_features(teacher):
    target = Config(teacher=teacher, precision="bf16").build((4, 4))
    image_BCYX = torch.randn(2, 3, 64, 64)
    before_BNV = target(image_BCYX)
    store_reduced(target.teacher, torch.bfloat16)
    assert torch.equal(target(image_BCYX), before_BNV)
    by_dtype = dict.fromkeys((torch.float32, torch.bfloat16), 0)
    for parameter in target.teacher.parameters():
        by_dtype[parameter.dtype] += parameter.numel()
    assert by_dtype[torch.bfloat16] > 10 * by_dtype[torch.float32] > 0
    assert all(p.dtype == torch.float32 for m in target.modules() if "Norm" in type(m).__name__ for p in m.parameters())


@pytest.mark.parametrize("compile_forward", [False, True])
def test_a_teacher_is_compiled_where_asked_for_and_stays_as_it_is_on_a_cpu(compile_forward, monkeypatch):
    target, compiled = Config(teacher=SMALL_VIT, precision="bf16").build((4, 4)), []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))  # noqa: PLW0108  a method
    target.speed_up(compile_forward=compile_forward)
    assert compiled == [target.teacher] * compile_forward
    assert {parameter.dtype for parameter in target.teacher.parameters()} == {torch.float32}
