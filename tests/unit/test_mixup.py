import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats

from openeva.data.erasing import ErasingConfig
from openeva.data.mixup import MixupConfig, cutmix_box, mixed_target

LABELS = torch.tensor([0, 1, 2, 3])


def images(size=(32, 24), batch=4):
    """Image i is i + 1 everywhere."""
    return (torch.arange(batch) + 1.0)[:, None, None, None].expand(batch, 3, *size).clone()


def runs(config, count, size=(32, 24), seed=0):
    torch.manual_seed(seed)
    mixup = config.build()
    for _ in range(count):
        yield mixup(images(size), LABELS, 4, 0.0)


def test_mixup_mixes_an_image_and_its_target_with_the_reversed_batch():
    shares = []
    for image, target in runs(MixupConfig(mixup=0.8), 1500, (4, 4)):
        share = target[0, 0].item()
        shares.append(share)
        assert image[0, 0, 0, 0].item() == pytest.approx(share * 1 + (1 - share) * 4, abs=1e-5)
        assert image[1, 0, 0, 0].item() == pytest.approx(share * 2 + (1 - share) * 3, abs=1e-5)
        assert target[1].tolist() == pytest.approx([0, share, 1 - share, 0], abs=1e-6)
    assert stats.kstest(shares, stats.beta(0.8, 0.8).cdf).pvalue > 0.01


def test_cutmix_pastes_a_box_and_weighs_by_the_area_that_stays():
    areas = []
    for image, target in runs(MixupConfig(cutmix=1.0), 300):
        pasted = image[0, 0] == 4
        assert torch.equal(pasted, image[3, 0] == 1)
        assert torch.equal(pasted, image[1, 2] == 3)
        assert (image[0, 0][~pasted] == 1).all()
        rows, columns = pasted.any(1).nonzero(), pasted.any(0).nonzero()
        if len(rows):
            assert len(rows) == rows.max() - rows.min() + 1
            assert pasted.sum() == len(rows) * len(columns)
        areas.append(pasted.float().mean().item())
        assert target[0].tolist() == pytest.approx([1 - areas[-1], 0, 0, areas[-1]])
    assert 0.25 < np.mean(areas) < 0.45  # half of the image before what lies outside is cut off


def test_cutmix_box_reaches_half_its_side_both_ways():
    """An odd side loses a pixel: timm 0.5.4; a newer timm keeps it."""
    sizes = {(b - t, r - lft) for t, b, lft, r in (cutmix_box(100, 60, 1 - 0.15**2) for _ in range(300))}
    assert max(height for height, _ in sizes) == 14  # side int(100 * .15) = 15 (14 by rounding down) -> 2 * 7
    assert max(width for _, width in sizes) == 8  # side 9 -> 2 * 4
    boxes = [cutmix_box(40, 40, 0.0) for _ in range(400)]
    assert all(0 <= t <= b <= 40 and 0 <= lft <= r <= 40 for t, b, lft, r in boxes)
    assert min(b - t for t, b, _, _ in boxes) < 24


def test_which_of_both_and_how_often():
    config = MixupConfig(mixup=1.0, cutmix=1.0, prob=0.8, switch_prob=0.25)
    kinds = {"none": 0, "mixup": 0, "cutmix": 0}
    for image, target in runs(config, 2000, (16, 16)):
        values = len(image[0].unique())
        kind = "none" if target[0, 0] == 1 else "cutmix" if values == 2 or image[0].unique().item() == 4 else "mixup"
        kinds[kind] += 1
    assert kinds["cutmix"] / 2000 == pytest.approx(0.2, abs=0.04)
    assert kinds["mixup"] / 2000 == pytest.approx(0.6, abs=0.04)


def test_smoothing_and_switched_off():
    image = images(batch=3)
    mixed, target = MixupConfig().build()(image, LABELS[:3], 4, 0.2)
    assert mixed is image  # an odd batch is fine where nothing is mixed
    assert target[1].tolist() == pytest.approx([0.05, 0.85, 0.05, 0.05])
    torch.testing.assert_close(
        torch.nn.functional.cross_entropy(torch.eye(3, 4), target),
        torch.nn.functional.cross_entropy(torch.eye(3, 4), LABELS[:3], label_smoothing=0.2),
    )
    assert mixed_target(LABELS, 10, share=0.3, smoothing=0.1).sum(1).tolist() == pytest.approx([1.0] * 4)


def test_odd_batches_are_an_error_that_names_the_key():
    with pytest.raises(ValueError, match=r"3 is odd: choose an even micro-batch .*run\.micro_batch"):
        MixupConfig(cutmix=1.0).build()(images(batch=3), LABELS[:3], 4, 0.1)


def test_mixing_repeats_itself_from_the_saved_generator():
    config, erasing = MixupConfig(mixup=0.8, cutmix=1.0), ErasingConfig(prob=0.7)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = [(*config.build()(images(), LABELS, 4, 0.1), erasing(images())) for _ in range(5)]
    torch.set_rng_state(state)
    for before in first:
        again = (*config.build()(images(), LABELS, 4, 0.1), erasing(images()))
        assert all(torch.equal(a, b) for a, b in zip(before, again, strict=True))


# ----------------------------------------------------------------------------------------------------- erasing


def test_erasing_fills_one_box_with_noise():
    torch.manual_seed(0)
    image = torch.full((2000, 3, 24, 40), 9.0)
    erased = ErasingConfig(prob=0.25)(image)
    assert (image == 9).all()
    hit = erased != 9
    assert hit.any((1, 2, 3)).float().mean() == pytest.approx(0.25, abs=0.04)
    assert torch.equal(hit.all(1), hit.any(1))  # all channels
    shares, ratios = [], []
    for mask in hit[hit.any((1, 2, 3))].any(1):
        height, width = mask.any(1).sum().item(), mask.any(0).sum().item()
        assert mask.sum() == height * width
        shares.append(height * width / (24 * 40))
        ratios.append(height / width)
    assert 0.015 < min(shares) < 0.06
    assert 0.28 < max(shares) < 0.35
    assert min(ratios) < 0.45
    assert max(ratios) > 2
    noise = erased[hit]
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)


def test_no_erasing_is_the_very_image():
    image = images()
    assert ErasingConfig()(image) is image


def test_boxes_that_fit_nowhere_are_left_out():
    narrow = torch.zeros(50, 3, 64, 1)
    assert torch.equal(ErasingConfig(prob=1.0)(narrow), narrow)


def test_impossible_values_are_errors():
    for wrong in ({"prob": 2}, {"area": (0.3, 0.1)}, {"area": (0, 0.1)}, {"ratio": (2, 1)}):
        with pytest.raises(ValidationError):
            ErasingConfig(**wrong)
    for wrong in ({"mixup": -1}, {"prob": 1.5}, {"switch_prob": -0.1}):
        with pytest.raises(ValidationError):
            MixupConfig(**wrong)


def test_shuffled_partners_are_those_of_image_and_target_alike_and_may_be_odd():
    """Clips: every frame gets the same share, or the same box, of the same other clip."""
    met = set()
    for cut in (False, True):
        config = MixupConfig(cutmix=1.0, partners="shuffled") if cut else MixupConfig(mixup=0.8, partners="shuffled")
        for seed in range(60):
            torch.manual_seed(seed)
            clips = images((8, 8), batch=3)[:, None].expand(3, 2, 3, 8, 8).clone()
            mixed, target = config.build()(clips, torch.tensor([0, 1, 2]), 3, 0.0)
            assert torch.equal(mixed[:, 0], mixed[:, 1])
            for number in range(3):
                mean = (target[number] * torch.tensor([1.0, 2.0, 3.0])).sum().item()
                assert mixed[number].mean().item() == pytest.approx(mean, abs=1e-5)
                met.add(
                    (number, int(target[number].argsort(descending=True)[1])) if target[number].max() < 1 else number
                )
    assert {(0, 1), (0, 2), (2, 0), 0, 1, 2} <= met


def test_reversed_partners_need_an_even_number():
    with pytest.raises(ValueError, match="partners=shuffled"):
        MixupConfig(mixup=0.8).build().check(3)
