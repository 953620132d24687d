"""Every official EVA-01, EVA-L, EVA-02 and EVA-CLIP checkpoint by name: what it is, and where it is found.

name -> `find_entry` -> facts; name or path -> `resolve` -> file: `OPENEVA_WEIGHTS` first, then the hub

A name is the stem of the official file ("eva_21k_1k_336px_psz14_ema_89p6"), timm's `model.tag`
("eva_giant_patch14_336.m30m_ft_in22k_in1k"), which stands for the same weights (of a CLIP: its image tower) in timm's
own repository, or open_clip's "name:tag" ("EVA02-B-16:merged2b_s8b_b131k"). What no source says is None or left out,
not guessed. The rows of EVA-CLIP are in `released_clip.py`.

Source: specs of EVA-01 (sections 1.1, 6 and 7: recipes and published accuracies), of video (sections 2.1 and 5) and of
EVA-02 (sections 4.1, 4.6, 4.7 and 5.3), comments and registry of timm 1.0.31. timm differs in three facts, kept as the
official code has them here: statistics of the two `m30m` models (timm: ImageNet's), `crop_pct` of EVA-CLIP 224 and of
the pre-trained ones (timm: 0.9), and images that timm squashes into a square for some tags.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openeva.checkpoints.released import LAION, Accuracy, Kind, PretrainedWeights
from openeva.checkpoints.released_clip import CLIPS
from openeva.checkpoints.weights import (
    WeightsError,
    fetch,
    fetch_open_clip,
    find_weights,
    is_file_address,
    split_open_clip_name,
)
from openeva.registry import did_you_mean

VARIABLE = "OPENEVA_WEIGHTS"
"""Environment variable with the folders (separated like PATH) in which files of known weights are looked for first."""
MODEL_FILE = "model.safetensors"
"""What openeva's model folders and timm's repositories call their weights."""
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")

EVA_02 = "Yuxin-CV/EVA-02"
OPENAI_L, EVA_CLIP_G = "OpenAI CLIP ViT-L/14", "EVA-CLIP g/14"


def _in1k(top1: float, top5: float | None = None, **others: Accuracy) -> dict[str, Accuracy]:
    return {"imagenet_1k": Accuracy(top1, top5), **others}


_ROBUST_G_336 = {
    "imagenet_v2": Accuracy(81.570, 96.230), "imagenet_real": Accuracy(90.828, 98.683),
    "imagenet_a": Accuracy(86.154, 96.509), "imagenet_r": Accuracy(88.283, 95.830),
    "imagenet_sketch": Accuracy(67.724, 87.964), "objectnet": Accuracy(60.907, 82.768),
}  # fmt: skip
_ROBUST_L02_M38M = {
    "imagenet_v2": Accuracy(82.430, 96.360), "imagenet_real": Accuracy(91.075, 98.689),
    "imagenet_a": Accuracy(87.720, 96.893), "imagenet_r": Accuracy(89.907, 96.957),
    "imagenet_sketch": Accuracy(70.131, 89.617), "objectnet": Accuracy(62.801, 84.636),
}  # fmt: skip
_ROBUST_B02 = {
    "imagenet_v2": Accuracy(79.8), "imagenet_real": Accuracy(90.8), "imagenet_a": Accuracy(78.1),
    "imagenet_r": Accuracy(76.8), "imagenet_sketch": Accuracy(57.7), "objectnet": Accuracy(55.3),
}  # fmt: skip

MERGED_30M, IN21K, IN1K, MERGED_38M = "Merged-30M", "ImageNet-21K", "ImageNet-1K", "Merged-38M"


def _mim(name: str, variant: str, num_parameters: int, data: str, teacher: str, **facts: Any) -> PretrainedWeights:
    facts = {"image_size": 224, "file": f"{name}.pt", **facts}
    return PretrainedWeights(name, "mim", variant, num_parameters=num_parameters, data=data, teacher=teacher, **facts)


def _classifier(
    name: str, variant: str, image_size: int, num_parameters: int, data: str, teacher: str, **facts: Any
) -> PretrainedWeights:
    kind: Kind = "in21k" if data.endswith(IN21K) else "in1k"
    facts = {"file": f"{name}.pt", "kind": kind, "pooling": "mean", **facts}
    num_classes = 21841 if facts["kind"] == "in21k" else 1000
    return PretrainedWeights(
        name, facts.pop("kind"), variant, image_size, num_parameters, data, teacher, num_classes=num_classes, **facts
    )


_EVA_01 = (
    _mim("eva_psz14", "eva_g_14", 1_012_229_632, MERGED_30M, OPENAI_L, predict_width=768),
    _mim(
        "eva_psz14to16", "eva_g_14", 1_012_398_592, MERGED_30M, OPENAI_L,
        predict_width=768, overrides={"patch_size": 16},
    ),
    _classifier(
        "eva_21k_224px_psz14", "eva_g_14", 224, 1_041_920_081, f"{MERGED_30M}, {IN21K}", OPENAI_L
    ),
    _classifier(
        "eva_21k_1k_336px_psz14_ema_89p6", "eva_g_14", 336, 1_013_005_672, f"{MERGED_30M}, {IN21K}, {IN1K}", OPENAI_L,
        averaged=True, timm=("eva_giant_patch14_336.m30m_ft_in22k_in1k",),
        published=_in1k(89.622, 98.930, **_ROBUST_G_336),
    ),
    _classifier(
        "eva_21k_1k_560px_psz14_ema_89p7", "eva_g_14", 560, 1_014_447_464, f"{MERGED_30M}, {IN21K}, {IN1K}", OPENAI_L,
        averaged=True, timm=("eva_giant_patch14_560.m30m_ft_in22k_in1k",), published=_in1k(89.712, 98.958),
    ),
    PretrainedWeights(
        "eva_clip_psz14_vision_enc", "clip", "eva_g_14", 224, None, f"{MERGED_30M}, {LAION}", OPENAI_L,
        "eva_clip_psz14_vision_enc.pt", repository=None,
    ),
    _classifier(
        "eva_clip_vis_enc_sz224_ftcls_89p1", "eva_g_14", 224, 1_012_555_112, f"{MERGED_30M}, {LAION}, {IN1K}", OPENAI_L,
        averaged=True, timm=("eva_giant_patch14_224.clip_ft_in1k",), published=_in1k(89.074, 98.710),
    ),
    _classifier(
        "eva_clip_vis_enc_sz336_ftcls_89p4", "eva_g_14", 336, 1_013_005_672, f"{MERGED_30M}, {LAION}, {IN1K}", OPENAI_L,
        averaged=True, timm=("eva_giant_patch14_336.clip_ft_in1k",), published=_in1k(89.378, 98.792),
    ),
    _classifier(
        "eva_clip_vis_enc_sz224_lincls_86p5", "eva_g_14", 224, 1_012_555_112, f"{MERGED_30M}, {LAION}, {IN1K}",
        OPENAI_L, kind="probe", file="eva_clip_vis_enc_sz224_lincls_86p5.pth", pooling="cls", batch_norm=True,
        published=_in1k(86.462, 98.034),
    ),
    _classifier(
        "eva_clip_vis_enc_sz336_lincls_86p5", "eva_g_14", 336, 1_013_005_672, f"{MERGED_30M}, {LAION}, {IN1K}",
        OPENAI_L, kind="probe", file="eva_clip_vis_enc_sz336_lincls_86p5.pth", pooling="cls", batch_norm=True,
        published=_in1k(86.498, 98.026),
    ),
    _mim("eva_l_psz14", "eva_l_14", 316_576_768, IN21K, EVA_CLIP_G, predict_width=1024),
    _classifier("eva_l_psz14_21k_ft", "eva_l_14", 224, 325_565_777, f"{IN21K}, {IN21K}", EVA_CLIP_G),
    _classifier(
        "eva_l_psz14_196px_1k_ft_88p0", "eva_l_14", 196, 304_142_312, f"{IN21K}, {IN1K}", EVA_CLIP_G,
        averaged=True, timm=("eva_large_patch14_196.in22k_ft_in1k",), published=_in1k(88.0, 98.496),
    ),
    _classifier(
        "eva_l_psz14_336px_1k_ft_88p65", "eva_l_14", 336, 304_531_432, f"{IN21K}, {IN1K}", EVA_CLIP_G,
        averaged=True, timm=("eva_large_patch14_336.in22k_ft_in1k",), published=_in1k(88.65, 98.746),
    ),
    _classifier(
        "eva_l_psz14_196px_21k_to_1k_ft_88p6", "eva_l_14", 196, 304_142_312, f"{IN21K}, {IN21K}, {IN1K}", EVA_CLIP_G,
        averaged=True, timm=("eva_large_patch14_196.in22k_ft_in22k_in1k",), published=_in1k(88.6, 98.658),
    ),
    _classifier(
        "eva_l_psz14_336px_21k_to_1k_ft_89p2", "eva_l_14", 336, 304_531_432, f"{IN21K}, {IN21K}, {IN1K}", EVA_CLIP_G,
        averaged=True, timm=("eva_large_patch14_336.in22k_ft_in22k_in1k",), published=_in1k(89.2, 98.854),
    ),
)  # fmt: skip


def _video(num_classes: int, num_frames: int, num_parameters: int, top1: float, top5: float) -> PretrainedWeights:
    name = f"eva_video_k{num_classes}"
    data = "Kinetics-722" if num_classes == 722 else f"Kinetics-722, Kinetics-{num_classes}"
    return PretrainedWeights(
        name, "video", "eva_g_14", 224, num_parameters, f"{MERGED_30M}, {data}", OPENAI_L, f"{name}.pth",
        overrides={"num_frames": num_frames}, num_classes=num_classes, pooling="mean", statistics="imagenet",
        crop_pct=0.875, interpolation="bilinear", published={f"kinetics_{num_classes}": Accuracy(top1, top5)},
    )  # fmt: skip


_VIDEO = (
    _video(722, 8, 1_014_686_546, 84.875, 96.828),
    _video(400, 16, 1_017_116_432, 89.686, 98.264),
    _video(600, 16, 1_017_398_232, 89.808, 98.398),
    _video(700, 16, 1_017_539_132, 82.892, 96.146),
)
"""The numbers are those of the logs, of the best epoch by the very videos; the file names were not seen."""


def _mim_02(size: str, num_parameters: int, data: str, *, patch: str = "p14", **facts: Any) -> PretrainedWeights:
    name = f"eva02_{size}_pt_{_SHORT[data]}_{patch}"
    return _mim(
        name, f"eva02_{size.lower()}_14", num_parameters, data, EVA_CLIP_G,
        predict_width=1024, repository=EVA_02, file=f"eva02/pt/{name}.pt",
        overrides={"patch_size": 16} if patch == "p14to16" else {}, **facts,
    )  # fmt: skip


def _classifier_02(size: str, image_size: int, num_parameters: int, *data: str, **facts: Any) -> PretrainedWeights:
    tail = {(IN1K,): "ft_in1k", (IN21K,): "medft_in21k", (IN21K, IN1K): "medft_in21k_ft_in1k"}[data[1:]]
    folder = {"ft_in1k": "in1k", "medft_in21k": "in21k", "medft_in21k_ft_in1k": "in21k_to_in1k"}[tail]
    name = f"eva02_{size}_pt_{_SHORT[data[0]]}_{tail}_p14"
    return _classifier(
        name, f"eva02_{size.lower()}_14", image_size, num_parameters, ", ".join(data), EVA_CLIP_G,
        repository=EVA_02, file=f"eva02/cls/{folder}/{name}.pt", **facts,
    )  # fmt: skip


_SHORT = {IN21K: "in21k", MERGED_38M: "m38m"}
_B448, _L448 = "eva02_base_patch14_448", "eva02_large_patch14_448"

_EVA_02 = (
    _mim_02("Ti", 5_699_968, IN21K, timm=("eva02_tiny_patch14_224.mim_in22k",)),
    _mim_02("S", 22_015_744, IN21K, timm=("eva02_small_patch14_224.mim_in22k",)),
    _mim_02("B", 86_546_944, IN21K, timm=("eva02_base_patch14_224.mim_in22k",)),
    _mim_02("B", 86_639_104, IN21K, patch="p14to16"),
    _mim_02("L", 304_319_424, IN21K, timm=("eva02_large_patch14_224.mim_in22k",)),
    _mim_02("L", 304_442_304, IN21K, patch="p14to16"),
    _mim_02("L", 304_319_424, MERGED_38M, timm=("eva02_large_patch14_224.mim_m38m",)),
    _mim_02("L", 304_442_304, MERGED_38M, patch="p14to16"),
    _classifier_02("B", 448, 103_144_273, IN21K, IN21K, timm=(f"{_B448}.mim_in22k_ft_in22k",)),
    _classifier_02("L", 448, 326_442_257, IN21K, IN21K, timm=(f"{_L448}.mim_in22k_ft_in22k",)),
    _classifier_02("L", 448, 326_442_257, MERGED_38M, IN21K, timm=(f"{_L448}.mim_m38m_ft_in22k",)),
    _classifier_02(
        "Ti", 336, 5_756_584, IN21K, IN1K,
        timm=("eva02_tiny_patch14_336.mim_in22k_ft_in1k",), published=_in1k(80.714, 95.536),
    ),
    _classifier_02(
        "S", 336, 22_129_000, IN21K, IN1K,
        timm=("eva02_small_patch14_336.mim_in22k_ft_in1k",), published=_in1k(85.780, 97.598),
    ),
    _classifier_02(
        "B", 448, 87_117_544, IN21K, IN1K, timm=(f"{_B448}.mim_in22k_ft_in1k",), published=_in1k(88.282, 98.528)
    ),
    _classifier_02(
        "L", 448, 305_080_232, IN21K, IN1K,
        averaged=True, timm=(f"{_L448}.mim_in22k_ft_in1k",), published=_in1k(89.626, 98.954),
    ),
    _classifier_02(
        "L", 448, 305_080_232, MERGED_38M, IN1K,
        averaged=True, timm=(f"{_L448}.mim_m38m_ft_in1k",), published=_in1k(89.570, 98.924),
    ),
    _classifier_02(
        "B", 448, 87_117_544, IN21K, IN21K, IN1K,
        averaged=True, timm=(f"{_B448}.mim_in22k_ft_in22k_in1k",), published=_in1k(88.570, 98.650, **_ROBUST_B02),
    ),
    _classifier_02(
        "L", 448, 305_080_232, IN21K, IN21K, IN1K,
        averaged=True, timm=(f"{_L448}.mim_in22k_ft_in22k_in1k",), published=_in1k(89.904, 98.974),
    ),
    _classifier_02(
        "L", 448, 305_080_232, MERGED_38M, IN21K, IN1K,
        averaged=True, timm=(f"{_L448}.mim_m38m_ft_in22k_in1k",), published=_in1k(89.974, 99.022, **_ROBUST_L02_M38M),
    ),
)  # fmt: skip

PRETRAINED: dict[str, PretrainedWeights] = {entry.name: entry for entry in (*_EVA_01, *_VIDEO, *_EVA_02, *CLIPS)}
"""All of them, by the stem of the official file."""

TIMM: dict[str, str] = {tag: entry.name for entry in PRETRAINED.values() for tag in entry.timm}
"""timm's `model.tag` -> name in `PRETRAINED`."""

OPEN_CLIP: dict[str, str] = {entry.open_clip: entry.name for entry in PRETRAINED.values() if entry.open_clip}
"""open_clip's "name:tag" -> name in `PRETRAINED`."""

_OTHERS = {**TIMM, **OPEN_CLIP}


def find_entry(name: str) -> PretrainedWeights | None:
    """The facts about weights named by an official stem (a file name or path will do), timm or open_clip, or None."""
    known = known_name(Path(name).name)
    return None if known is None else PRETRAINED[_OTHERS.get(known, known)]


def resolve(weights: str) -> Path:
    """The weight file or openeva model folder that an address stands for; a run's folder stands for the model in it.

    Args:
        weights: A path; `package:NAME/GLOB`; an official stem or timm's `model.tag`, which is looked for in the folders
            of `OPENEVA_WEIGHTS` and then on the hub; or open_clip's "name:tag" of any of its models.

    Raises:
        WeightsError: No such file or name, or neither here nor reachable.
    """
    path = Path(weights).expanduser()
    for folder in (path, path / "model"):
        if (folder / MODEL_FILE).is_file():
            return folder
    if path.is_file() or weights.startswith("package:"):
        return find_weights(weights)
    if (known := known_name(weights)) is not None:
        return _find_known(known)
    if (other := split_open_clip_name(weights)) is not None:
        return fetch_open_clip(*other)
    if path.is_dir():
        raise WeightsError(f"weights {weights!r}: the folder holds no {MODEL_FILE} (nor model/{MODEL_FILE})")
    if is_file_address(weights):
        return find_weights(weights)
    raise WeightsError(
        f"unknown weights {weights!r}{did_you_mean(weights, [*PRETRAINED, *_OTHERS])}; `openeva list --weights` shows"
        " all names; a path to a file, a run or a model folder is taken too"
    )


def _find_known(name: str) -> Path:
    """The file of a name of this table, in the local folders or on the hub."""
    found = find_local(name)
    if found is not None:
        return found
    if name in OPEN_CLIP:
        return fetch_open_clip(*name.split(":"))
    entry, (repository, file) = PRETRAINED[_OTHERS.get(name, name)], hub_place(name)
    looked = f"{VARIABLE} ({', '.join(map(str, _folders()))})" if _folders() else f"{VARIABLE} (not set)"
    if repository is None:
        raise WeightsError(
            f"weights {name!r} are not published on a hub and not in {looked}; put {entry.file} into a folder and set"
            f" {VARIABLE} to it, or give its path"
        )

    def download() -> Path:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repository, file))

    kept_as = f"{name}{Path(file).suffix}"
    return fetch(
        download,
        f"{name} (not in {looked}; hub: {repository}, {file})",
        f"download {file} from {repository} where that can be reached, put it into a folder here as {kept_as}, and set"
        f" {VARIABLE} to that folder",
    )


def find_local(name: str) -> Path | None:
    """The file of a name of this table in the folders of `OPENEVA_WEIGHTS`; None where there is none.

    Raises:
        WeightsError: A folder of `OPENEVA_WEIGHTS` does not exist.
    """
    missing = [str(folder) for folder in _folders() if not folder.is_dir()]
    if missing:
        raise WeightsError(f"{VARIABLE} names folders that do not exist: {', '.join(missing)}")
    candidates = _candidates(name, PRETRAINED[_OTHERS.get(name, name)], _folders())
    return next((path for path in candidates if path.is_file() or (path / MODEL_FILE).is_file()), None)


def hub_place(name: str) -> tuple[str | None, str]:
    """(repository, file) of a name of this table; no repository where the file is not published."""
    entry = PRETRAINED[_OTHERS.get(name, name)]
    return (f"timm/{name}", MODEL_FILE) if name in TIMM else (entry.repository, entry.file)


def known_name(weights: str) -> str | None:
    """The name in this table that an address stands for (an ending such as ".pt" is ignored); None if there is none."""
    suffix = Path(weights).suffix
    name = weights.removesuffix(suffix) if suffix in SUFFIXES else weights
    return name if name in PRETRAINED or name in _OTHERS else None


def _folders() -> list[Path]:
    return [Path(folder).expanduser() for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder]


def _candidates(name: str, entry: PretrainedWeights, folders: list[Path]) -> Iterator[Path]:
    """Places of a file: under the name that was asked for, then under others for the same weights.

    timm's files of pre-trained models lack mask token and head, those of a CLIP the text tower, so they do not stand
    for the official ones.
    """
    others = [entry.name, *(entry.timm if entry.kind not in {"mim", "clip"} else ())]
    for folder in folders:
        for known in dict.fromkeys([name, *others]):
            yield folder / known
            yield from (folder / f"{known}{suffix}" for suffix in SUFFIXES)
            if known == entry.name:
                yield folder / entry.file
