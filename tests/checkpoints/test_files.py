"""Weight files on disk: what is read, and what is refused with which words."""

import argparse
import io
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints.tiny import assert_same, official
from openeva.checkpoints.files import read_state_dict, read_weight_file, write_atomically, write_state_dict


def saved(path: Path, content: object, **options) -> Path:
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("keys", [("model",), ("module",), (), ("state_dict",), ("model", "module")])
@pytest.mark.parametrize("legacy", [False, True])
def test_wrappers(tmp_path: Path, keys: tuple[str, ...], legacy: bool) -> None:
    weights = official(dtype=torch.float16)
    content = weights
    for key in reversed(keys):
        content = {key: content, "epoch": 3}
    path = saved(tmp_path / "w.pt", content, _use_new_zipfile_serialization=not legacy)
    assert_same(read_state_dict(path), weights)


def test_averaged_weights_on_request(tmp_path: Path) -> None:
    plain, averaged = official(), {key: tensor + 1 for key, tensor in official().items()}
    path = saved(tmp_path / "w.pt", {"model": plain, "model_ema": averaged})
    assert_same(read_state_dict(path), plain)
    assert_same(read_state_dict(path, ema=True), averaged)
    with pytest.raises(ValueError, match="holds no averaged weights"):
        read_state_dict(saved(tmp_path / "x.pt", {"model": plain}), ema=True)
    with pytest.raises(ValueError, match="read it with ema"):
        read_state_dict(saved(tmp_path / "y.pt", {"model_ema": averaged, "epoch": 1}))


def test_names_of_distributed_data_parallel(tmp_path: Path) -> None:
    weights = official()
    path = saved(tmp_path / "w.pt", {"model": {f"module.{key}": tensor for key, tensor in weights.items()}})
    assert_same(read_state_dict(path), weights)


def test_a_linear_probe_file_with_its_arguments(tmp_path: Path) -> None:
    """`argparse.Namespace` is all that such a file needs beyond tensors; it stays forbidden elsewhere."""
    path = saved(tmp_path / "w.pth", {"model": official(), "args": argparse.Namespace(lr=1e-3), "epoch": 1})
    assert_same(read_state_dict(path), official())
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_a_file_that_needs_more_is_refused_with_the_reason(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Harmful:
        def __reduce__(self):
            return Path.touch, (ran,)

    path = saved(tmp_path / "w.pth", {"model": official(), "args": argparse.Namespace(x=Harmful())})
    with pytest.raises(ValueError, match=r"w\.pth is refused.*save the weights alone") as error:
        read_state_dict(path)
    assert "pathlib" in str(error.value)
    assert not ran.exists()
    with pytest.raises(ValueError, match="more than tensors"):
        read_state_dict(saved(tmp_path / "old.pth", Harmful(), _use_new_zipfile_serialization=False))
    assert not ran.exists()


def test_safetensors_whose_header_has_the_length_of_a_pickles_first_byte(tmp_path: Path) -> None:
    weights, path = official(), tmp_path / "w.safetensors"
    for length in range(0, 264, 8):
        save_file(weights, path, metadata={"note": "x" * length})
        if path.read_bytes()[:1] == b"\x80":
            break
    else:
        pytest.fail("no header of that length")
    found = read_weight_file(path)
    assert_same(found.state_dict, weights)
    assert found.metadata == {"note": "x" * length}  # torch.load of 2.15 would read such a file too, but not this


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_truncated(tmp_path: Path, suffix: str, share: float) -> None:
    whole = tmp_path / f"w.{suffix}"
    write_state_dict(whole, official())
    content = whole.read_bytes()
    whole.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=rf"w\.{suffix} is damaged or incomplete.*again"):
        read_state_dict(whole)


def test_a_flipped_bit(tmp_path: Path) -> None:
    """`torch.load` itself would read it without a word."""
    path = saved(tmp_path / "w.pt", {"model": official()})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        read_state_dict(path)


def archive(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, "x")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "was a web page saved"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "git lfs pull"),
        (archive(["photo.jpg"]), "not a PyTorch file"),
        (archive(["m/data.pkl", "m/constants.pkl"]), "TorchScript program"),
        (b"\x80\x02 not a pickle at all", "damaged or incomplete"),
    ],
)
def test_other_kinds_of_file(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"w\.pt.*{text}"):
        read_state_dict(path)


@pytest.mark.parametrize("content", [{"optimizer": {"state": {}}, "epoch": 3}, [torch.zeros(2)], {}, torch.zeros(3)])
def test_no_weights_inside(tmp_path: Path, content: object) -> None:
    with pytest.raises(ValueError, match=r"w\.pt holds no weights: expected tensors by name"):
        read_state_dict(saved(tmp_path / "w.pt", content))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_state_dict(tmp_path / "w.pt")


def test_the_content_tells_the_kind_not_the_name(tmp_path: Path) -> None:
    save_file(official(), tmp_path / "w.pt")
    assert_same(read_state_dict(tmp_path / "w.pt"), official())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    path.write_text("old")

    def fail(file: Path) -> None:
        file.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["w.bin"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    path.write_text("old")
    with path.open() as reader:
        write_atomically(path, lambda file: file.write_text("new") and None)
        assert reader.read() == "old"
    assert path.read_text() == "new"
