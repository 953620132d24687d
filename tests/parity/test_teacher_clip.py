"""OpenAI's CLIP tower as a teacher: patch tokens of the last block, through the final norm and the projection."""

import pytest
import torch
from safetensors.torch import save_file

from openeva.backbones.open_clip import Config
from parity.golden import Case, cases


@pytest.mark.parametrize("case", cases("teacher_clip"), ids=str)
@pytest.mark.parametrize("image", ["image", "image_larger"])
def test_patches_of_official_teacher(case: Case, image: str, tmp_path):
    """The architecture comes from the shapes in the file alone; a larger image gets resized positions."""
    save_file(case.prefix("sd."), tmp_path / "clip.safetensors")
    image_BCYX = case.tensors[f"in.{image}"]
    size = image_BCYX.shape[-1]
    teacher = Config(pretrained=str(tmp_path / "clip.safetensors"), image_size=size).build().eval()
    assert teacher.stride == case.config["patch_size"]
    assert teacher.num_layers == case.config["layers"]
    with torch.no_grad():
        features = teacher(image_BCYX)
    case.close(features.patches, f"out.{image.replace('image', 'features')}")
