"""What a CLIP starts from: an image tower, a text tower, or a whole CLIP of other sizes.

init_image, init_text | init_from -> weights by address -> only what a tower takes -> resized -> model, with an account

From an image tower come its transformer and final norm, from a text tower all but its projection. Both projections and
the temperature always start fresh, unless a whole CLIP is taken. Whatever else is missing or too much is an error.

Source: spec section 1.9 (transfer rules) and 6.1 to 6.3. Deliberate differences: the official loader is not strict and
tells formats by names of files, so that a text tower can stay random without a word; here the names of the tensors
tell, and nothing stays random that was asked for.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from openeva.checkpoints.clip import PROJECTION, TEXT, TEXT_HEAD_WIDTH, holds_text, infer_text_config, text_of
from openeva.checkpoints.files import StateDict, read_state_dict
from openeva.checkpoints.load import (
    POSITIONS,
    LoadReport,
    Weights,
    adapt,
    check_unseen,
    drop_index_buffers,
    load_into,
    read_model,
    read_weights,
)
from openeva.checkpoints.native import model_path
from openeva.checkpoints.resize import Grid
from openeva.checkpoints.torchscript import is_torchscript, read_torchscript
from openeva.checkpoints.weights import split_open_clip_name

FRESH = "starts fresh in a new CLIP"
OTHER_TOWER = "not part of this tower"
TEXT_PROJECTION = "text.text_projection"


def start_towers(
    model: nn.Module,
    *,
    init_image: str | None = None,
    init_text: str | None = None,
    init_from: str | None = None,
    grid: Grid | None = None,
) -> LoadReport:
    """Put weights into a fresh CLIP.

    Args:
        model: With children `backbone` and `text` and openeva's names.
        init_image: Run, model folder, file or official name whose image transformer to start from: pre-trained, a
            classifier, or a CLIP.
        init_text: Whose text tower to start from: a file of OpenAI's CLIP, of open_clip, of transformers or of
            EVA-CLIP, a CLIP run, an official name, or open_clip's "name:tag".
        init_from: Whole CLIP to start from, projections and temperature included; positions and patch kernel are
            resized. Takes the place of the other two.
        grid: The image tower's patch grid (rows, columns).

    Returns:
        What became of every tensor.

    Raises:
        WeightsError: Nothing at an address, or not reachable.
        ValueError: Weights of another size or kind; every tensor that does not fit is named. The model is unchanged.
    """
    if init_from is not None:
        if init_image is not None or init_text is not None:
            raise ValueError("init_from is a whole CLIP; leave out init_image and init_text, or init_from")
        return _start_from_clip(model, init_from, grid)
    expected = dict(model.state_dict())
    adapted: StateDict = {}
    reports = []
    for address, take in ((init_image, _image_tower), (init_text, _text_tower)):
        if address is not None:
            tower, report = take(address, model, expected, grid)
            adapted |= tower
            reports.append(report)
    model.load_state_dict(adapted, strict=False)
    return _joined(reports, [key for key in expected if key not in adapted])


def _start_from_clip(model: nn.Module, address: str, grid: Grid | None) -> LoadReport:
    weights = read_weights(model_path(address))
    if not holds_text(weights.state_dict):
        raise ValueError(
            f"init_from {address} is no whole CLIP: it holds {' and '.join(weights.layout.parts)} but no text tower; "
            "use it as init_image"
        )
    _check_text(model, weights.state_dict, address, _recorded_heads(weights.config), "init_from")
    check_unseen(getattr(model.backbone, "config", None), weights, f"init_from {address}")
    report = load_into(model, weights, fresh=("logit_bias",), grid=grid)
    if surplus := [key for key in report.dropped if key.startswith((PROJECTION, "projection."))]:
        raise ValueError(f"init_from {address}: the model has no place for {', '.join(surplus)}")
    return report


# ------------------------------------------------------------------------------------------------------ image tower


def _image_tower(
    address: str, model: nn.Module, expected: Mapping[str, Tensor], grid: Grid | None
) -> tuple[StateDict, LoadReport]:
    weights = read_weights(model_path(address))
    check_unseen(getattr(model.backbone, "config", None), weights, f"init_image {address}")
    report = LoadReport(str(weights.source), f"image tower, {weights.described}", resized=dict(weights.moved))
    given, tables = drop_index_buffers(weights.state_dict)
    why = {key: _why_not_image(key) for key in given}
    report.dropped = tables | {key: text for key, text in why.items() if text}
    given = {key: tensor for key, tensor in given.items() if not why[key]}
    wanted = {
        key: tensor for key, tensor in expected.items() if key.startswith("backbone.") and not _why_not_image(key)
    }
    fresh = _fresh_norms(weights, given, wanted)
    fixed_positions = POSITIONS not in dict(model.named_parameters())
    try:
        adapted = adapt(
            given, wanted, report, fresh=fresh, grid=grid, source_grid=weights.grid, fixed_positions=fixed_positions
        )
    except ValueError as error:
        raise ValueError(f"init_image: {error}") from None
    dropped = [key for key in given if key in report.dropped and not (key == POSITIONS and fixed_positions)]
    if dropped:  # what other models may do without is a mistake here
        listed = "\n".join(f"  - {key}: {report.dropped[key]}" for key in dropped)
        raise ValueError(f"init_image: the weights of {weights.source} do not fit the image tower:\n{listed}")
    return adapted, report


def _why_not_image(key: str) -> str:
    """Why a tensor is no part of the transformer that a CLIP starts from; "" for one that is."""
    if key == "backbone.mask_token":
        return "nothing is masked in a CLIP"
    if key.startswith(PROJECTION):
        return FRESH
    return "" if key.startswith("backbone.") else OTHER_TOWER


def _fresh_norms(weights: Weights, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Norms that the weights' kind of model never had, and that start as identities.

    EVA-02's pre-trained models have no norm before the attention's output, which their CLIP has (spec section 4.1);
    classifiers that pool by mean have no final norm.
    """
    kinds = []
    if not any(".attn.norm." in key for key in given):
        kinds.append(".attn.norm.")
    if "backbone.norm.weight" not in given and "fc_norm" in weights.layout.parts:
        kinds.append("backbone.norm.")
    return [key for key in wanted if key not in given and any(kind in key for kind in kinds)]


# ------------------------------------------------------------------------------------------------------ text tower


def _text_tower(
    address: str, model: nn.Module, expected: Mapping[str, Tensor], grid: Grid | None
) -> tuple[StateDict, LoadReport]:
    path, heads = model_path(address), _heads_in_name(address)
    state_dict: StateDict
    if path.is_dir():
        state_dict, config = read_model(path)
        heads = _recorded_heads(config)
    else:
        state_dict = read_torchscript(path) if is_torchscript(path) else read_state_dict(path)
    given = text_of(state_dict)
    if not given:
        found = ", ".join(list(state_dict)[:4])
        raise ValueError(
            f"init_text: {path} holds no text tower (found {found}, ...); known are files of OpenAI's CLIP, open_clip, "
            "EVA-CLIP and transformers' CLIP"
        )
    _check_text(model, given, address, heads, "init_text")
    report = LoadReport(str(path), f"text tower, {_text_layout(state_dict)} names")
    report.dropped = {key: FRESH for key in given if key == TEXT_PROJECTION}
    others = [key for key in state_dict if key not in given and TEXT + key not in given and _is_other(key)]
    report.dropped |= dict.fromkeys(others, OTHER_TOWER)
    wanted = {key: tensor for key, tensor in expected.items() if key.startswith(TEXT) and key != TEXT_PROJECTION}
    surplus = [key for key in given if key not in wanted and key != TEXT_PROJECTION]
    if surplus:
        raise ValueError(f"init_text: the model's text tower has no place for {', '.join(surplus)} of {path}")
    try:
        adapted = adapt({key: given[key] for key in given if key in wanted}, wanted, report)
    except ValueError as error:
        raise ValueError(f"init_text: {error}") from None
    return adapted, report


def _is_other(key: str) -> bool:
    """Not of transformers' text tower, whose tensors are renamed and stacked."""
    return not key.startswith(("text_model.", "text_projection."))


def _text_layout(state_dict: Mapping[str, Tensor]) -> str:
    if any(key.startswith("text_model.") for key in state_dict):
        return "transformers'"
    return "separate (text.*)" if holds_text(state_dict) else "flat"


def _heads_in_name(address: str) -> int | None:
    """Heads of the text tower of a model that open_clip describes."""
    name = split_open_clip_name(address)
    if name is None:
        return None
    import open_clip

    config: Any = open_clip.get_model_config(name[0]) or {}
    return config.get("text_cfg", {}).get("heads")


def _recorded_heads(config: Mapping[str, Any]) -> int | None:
    return ((config.get("task") or {}).get("text") or {}).get("num_heads")


def _check_text(model: nn.Module, given: Mapping[str, Tensor], address: str, heads: int | None, key: str) -> None:
    """Say in one line where a text tower has another size, and where its heads differ, which no shape shows."""
    wanted = infer_text_config(_text_in(model), num_heads=1)
    own = getattr(getattr(model.get_submodule("text"), "config", None), "num_heads", None)
    try:
        found = infer_text_config({TEXT_PROJECTION: next(iter(given.values())), **given}, num_heads=1)
    except ValueError as error:
        raise ValueError(f"{key} {address}: {error}") from None
    width = found["width"]
    heads = heads or (width // TEXT_HEAD_WIDTH if width % TEXT_HEAD_WIDTH == 0 else None)
    differing = {name: (found[name], wanted[name]) for name in wanted if found[name] != wanted[name]}
    if heads is not None and own is not None and heads != own:
        differing["num_heads"] = (heads, own)
    if differing:
        told = ", ".join(f"{name} {theirs} instead of {ours}" for name, (theirs, ours) in differing.items())
        fix = ", ".join(f"{name}: {theirs}" for name, (theirs, _) in differing.items())
        raise ValueError(f"{key} {address}: its text tower has {told}; choose another one, or set task.text: {{{fix}}}")


def _text_in(model: nn.Module) -> StateDict:
    return {key: tensor for key, tensor in model.state_dict().items() if key.startswith(TEXT)}


# ------------------------------------------------------------------------------------------------------ the account


def _joined(reports: list[LoadReport], fresh: list[str]) -> LoadReport:
    """One account of both towers."""
    counts = [f"{len(report.used) + len(report.resized)} tensors of the {report.layout}" for report in reports]
    total = LoadReport(" and ".join(report.source for report in reports), "; ".join(counts), fresh=fresh)
    for report in reports:
        total = replace(
            total,
            used=total.used + report.used,
            resized=total.resized | report.resized,
            dropped=total.dropped | report.dropped,
        )
    return total
