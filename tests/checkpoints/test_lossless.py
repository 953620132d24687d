"""Every official layout, in every container it was released in: converted to openeva and back, it is the same file."""

import argparse
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.tiny import DEPTH, HEADS, PREDICT, WIDTH, assert_same, official, official_eva02
from openeva.checkpoints.convert import convert
from openeva.checkpoints.load import read_weights
from openeva.checkpoints.native import read_native, save_native
from openeva.checkpoints.original import ORIGINAL_FILE
from parity.golden import Case, cases

Weights = dict[str, Tensor]


def mae() -> Weights:
    """EVA-L before fine-tuning: all of qkv with one bias, a decoder, fixed positions."""
    weights = official(qkv_bias="full", head="none")
    block = {
        k.replace("blocks.0.", "decoder_blocks.0."): t + 1 for k, t in weights.items() if k.startswith("blocks.0.")
    }
    names = ("decoder_embed.weight", "decoder_embed.bias", "decoder_norm.weight", "decoder_norm.bias")
    weights |= block | {key: torch.randn(3, 3) for key in (*names, "decoder_pred.weight", "decoder_pred.bias")}
    return weights | {"mask_token": torch.randn(1, 1, 8), "decoder_pos_embed": torch.randn(1, 17, 8)}


def probe() -> Weights:
    weights = official(head="none")
    weights |= {"head.0.running_mean": torch.randn(WIDTH), "head.0.running_var": torch.rand(WIDTH)}
    weights |= {"head.0.num_batches_tracked": torch.tensor(7), "head.1.weight": torch.randn(5, WIDTH)}
    return weights | {"head.1.bias": torch.randn(5)}


LAYOUTS: dict[str, Callable[[], Weights]] = {
    "eva_mim": official,
    "eva_mim_fp16": lambda: official(dtype=torch.float16),
    "eva_in1k": lambda: official(head="classifier"),
    "eva_probe": probe,
    "eva_l_mim": mae,
    "eva_l_in1k": lambda: official(head="classifier", qkv_bias="full"),
    "eva_index_shared": lambda: official(relative="shared", layer_scale=True),
    "eva_index_decoupled": lambda: official(relative="per_block_decoupled"),
    "eva02_s_mim": lambda: official_eva02(sub_norm=False),
    "eva02_b_mim_fp16": lambda: official_eva02(sub_norm=True, dtype=torch.float16),
    "eva02_b_in1k": lambda: official_eva02(sub_norm=True, head="classifier"),
    "eva02_old_rope": lambda: official_eva02(sub_norm=True, rope="old"),
    "eva02_s_old_rope": lambda: official_eva02(sub_norm=False, rope="old", head="classifier"),
}


def in_deepspeed(weights: Weights) -> Any:
    """Raw and averaged weights side by side, with what the trainer needs to go on."""
    averaged = {key: tensor + 1 for key, tensor in weights.items()}
    return {"module": OrderedDict(weights), "epoch": 3, "lr": [1e-3, {"a": None}], "model_ema": averaged}


def in_trainer(weights: Weights) -> Any:
    """The linear probe's: optimizer state, loss scale and the command line's arguments."""
    state = {"state": {0: {"momentum": torch.randn(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    arguments = argparse.Namespace(model="eva", drop=0.0, crop=(1, 2), output_dir=None)
    return {"model": weights, "optimizer": state, "epoch": 89, "scaler": {"scale": 2.0}, "args": arguments}


def of_module(weights: Weights) -> Any:
    """A state dict as PyTorch makes it, with the versions of its modules."""
    content = OrderedDict(weights)
    content._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return {"model": content}


CONTAINERS: dict[str, Callable[[Weights], Any]] = {
    "bare": dict,
    "model": lambda weights: {"model": weights},
    "module": lambda weights: {"module": weights},
    "state_dict": lambda weights: {"state_dict": weights, "epoch": 1},
    "nested": lambda weights: {"model": {"state_dict": weights}, "x": 1},
    "deepspeed": in_deepspeed,
    "trainer": in_trainer,
    "of_module": of_module,
    "data_parallel": lambda weights: {"model": {f"module.{key}": tensor for key, tensor in weights.items()}},
    "backwards": lambda weights: {"model": dict(reversed(weights.items()))},
}


def there_and_back(source: Path, **options: Any) -> Path:
    ours, back = source.parent / "ours", source.parent / "back" / source.name
    convert(source, ours, "openeva", num_heads=HEADS, **options)
    convert(ours, back, "official")
    return back


def assert_same_content(actual: Any, expected: Any) -> None:
    """Types, order, dtypes and bits."""
    assert type(actual) is type(expected)
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        assert vars(actual) == vars(expected) if isinstance(expected, OrderedDict) else True
        for key, value in expected.items():
            assert_same_content(actual[key], value)
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same_content(one, other)
    else:
        assert actual == expected


def load(path: Path) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("container", ["model", "deepspeed"])
def test_every_layout(tmp_path: Path, layout: str, container: str) -> None:
    source = tmp_path / "eva.pt"
    torch.save(CONTAINERS[container](LAYOUTS[layout]()), source)
    back = there_and_back(source)
    assert_same_content(load(back), load(source))


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("legacy", [False, True])
def test_every_container(tmp_path: Path, container: str, legacy: bool) -> None:
    source = tmp_path / "eva.pt"
    torch.save(CONTAINERS[container](official()), source, _use_new_zipfile_serialization=not legacy)
    back = there_and_back(source)
    assert_same_content(load(back), load(source))
    if not legacy:  # PyTorch's own writing, so that even the bytes must agree
        again = tmp_path / "again" / "eva.pt"
        again.parent.mkdir()
        torch.save(load(source), again)
        assert back.read_bytes() == again.read_bytes()


def test_matrices_of_unlike_types_that_openeva_stacks(tmp_path: Path) -> None:
    weights = official_eva02(sub_norm=True)
    weights |= {key: weights[key].half() for key in ("blocks.0.attn.k_proj.weight", "blocks.1.mlp.w1.weight")}
    torch.save({"model": weights}, tmp_path / "eva.pt")
    assert_same_content(load(there_and_back(tmp_path / "eva.pt")), {"model": weights})


def test_the_averaged_weights(tmp_path: Path) -> None:
    source = tmp_path / "eva.pt"
    torch.save(in_deepspeed(official()), source)
    back = there_and_back(source, ema=True)
    assert_same_content(load(back), load(source))
    ours = read_weights(tmp_path / "ours")
    assert torch.equal(ours.state_dict["backbone.cls_token"], official()["cls_token"] + 1)


def test_safetensors_with_metadata(tmp_path: Path) -> None:
    source = tmp_path / "eva.safetensors"
    save_file(official(relative="shared"), source, metadata={"format": "pt", "note": "x"})
    back = there_and_back(source)
    assert_same(load_file(back), load_file(source))
    with safe_open(back, "pt") as one, safe_open(source, "pt") as other:
        assert one.metadata() == other.metadata()


@pytest.mark.parametrize(
    "case",
    [
        case
        for kind in ("mim_model", "classifier", "mae_asymmetric", "eva02_mim_model", "eva02_classifier")
        for case in cases(kind)
    ],
    ids=str,
)
def test_weights_of_the_official_code(tmp_path: Path, case: Case) -> None:
    source, weights = tmp_path / "eva.pt", case.prefix("sd.")
    torch.save({"model": weights}, source)
    convert(source, tmp_path / "ours", "openeva", num_heads=case.config["num_heads"])
    convert(tmp_path / "ours", tmp_path / "back.pt", "official")
    assert_same_content(load(tmp_path / "back.pt"), {"model": weights})


def test_the_account_says_what_is_kept_and_where(tmp_path: Path) -> None:
    torch.save(in_trainer(official(relative="shared")), tmp_path / "eva.pt")
    report = convert(tmp_path / "eva.pt", tmp_path / "ours", "openeva")
    lines = report.lines()
    assert "kept: rel_pos_bias.relative_position_index: in original.pt, for the way back" in lines
    assert {f"kept: {key}: beside the weights, in original.pt" for key in ("optimizer", "epoch", "scaler", "args")} <= {
        *lines
    }
    recorded = read_native(tmp_path / "ours")[1]["converted_from"]
    assert recorded["weights_under"] == ["model"]
    assert recorded["dtypes"] == ["torch.float32", "torch.int64"]


def test_weights_that_were_changed_are_written_plainly(tmp_path: Path) -> None:
    """The outline is of other weights then, and none of its tables may come back."""
    torch.save({"module": official(relative="shared")}, tmp_path / "eva.pt")
    convert(tmp_path / "eva.pt", tmp_path / "ours", "openeva")
    convert(tmp_path / "ours", tmp_path / "larger.pt", "official", grid=(6, 6))
    larger = load(tmp_path / "larger.pt")
    assert list(larger) == ["model"]
    assert not any(key.endswith("_index") for key in larger["model"])
    convert(tmp_path / "ours", tmp_path / "half", "openeva", dtype="fp16")
    assert not (tmp_path / "half" / ORIGINAL_FILE).exists()
    weights, config = read_native(tmp_path / "ours")
    del weights["head.bias"]
    save_native(tmp_path / "ours", weights, config)
    convert(tmp_path / "ours", tmp_path / "less.pt", "official")
    assert "lm_head.bias" not in load(tmp_path / "less.pt")["model"]


def test_a_copy_of_the_folder_keeps_the_way_back_and_another_model_in_its_place_does_not(tmp_path: Path) -> None:
    source = tmp_path / "eva.pt"
    torch.save({"module": official(relative="shared")}, source)
    convert(source, tmp_path / "ours", "openeva")
    convert(tmp_path / "ours", tmp_path / "copy", "openeva")
    convert(tmp_path / "copy", tmp_path / "back.pt", "official")
    assert_same_content(load(tmp_path / "back.pt"), load(source))
    convert(tmp_path / "eva.pt", tmp_path / "copy", "openeva", grid=(6, 6))
    assert not (tmp_path / "copy" / ORIGINAL_FILE).exists()


def test_a_damaged_outline_is_named(tmp_path: Path) -> None:
    torch.save({"module": official()}, tmp_path / "eva.pt")
    convert(tmp_path / "eva.pt", tmp_path / "ours", "openeva", num_heads=HEADS)
    (tmp_path / "ours" / ORIGINAL_FILE).write_bytes(b"\x80 nothing")
    with pytest.raises(ValueError, match=r"original\.pt is damaged"):
        convert(tmp_path / "ours", tmp_path / "back.pt", "official")


@pytest.mark.parametrize("layout", ["eva_in1k", "eva_l_in1k", "eva02_s_old_rope", "eva02_b_in1k"])
def test_official_to_timm_and_back(tmp_path: Path, layout: str) -> None:
    """timm has all weights of a classifier, so that nothing is lost on the way through its names either."""
    weights = {key: tensor for key, tensor in LAYOUTS[layout]().items() if "rope" not in key}
    torch.save({"model": weights}, tmp_path / "eva.pt")
    convert(tmp_path / "eva.pt", tmp_path / "timm.safetensors", "timm")
    convert(tmp_path / "timm.safetensors", tmp_path / "ours", "openeva", num_heads=HEADS)
    convert(tmp_path / "ours", tmp_path / "timm2.safetensors", "timm")
    assert (tmp_path / "timm2.safetensors").read_bytes() == (tmp_path / "timm.safetensors").read_bytes()
    convert(tmp_path / "ours", tmp_path / "back.pt", "official", wrapper="model")
    found = {key: tensor for key, tensor in load(tmp_path / "back.pt")["model"].items() if "rope" not in key}
    assert_same(found, weights)


def test_sizes_of_the_tiny_files() -> None:
    """The layouts above are what the specification lists: names that only one of them has."""
    assert {"lm_head.weight", "mask_token"} <= set(official())
    assert official()["lm_head.weight"].shape == (PREDICT, WIDTH)
    assert LAYOUTS["eva02_old_rope"]()["rope.freqs_cos"].shape == (4, 4, WIDTH // HEADS)
    assert len([key for key in LAYOUTS["eva02_b_mim_fp16"]() if "rope" in key]) == 2 * (1 + DEPTH)
    assert {tensor.dtype for tensor in LAYOUTS["eva_mim_fp16"]().values()} == {torch.float16}
