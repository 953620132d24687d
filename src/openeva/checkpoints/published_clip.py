"""Published zero-shot accuracies and recalls of CLIPs, in percent: what a measurement is compared with.

name of released weights -> `published_zero_shot`: set -> (top-1, top-5, mean per class); `published_retrieval`: recalls

Source: clip_and_eva02 section 3.3: the README of EVA-CLIP, whose numbers come from CLIP_benchmark, and, for weights
that it does not list by set, open_clip's results file, made with converted weights (top-1 only; on ImageNet sets within
0.02 of the official numbers, 0.3 below them on ObjectNet). Three cells look wrong where they were published:
OpenCLIP-H's top-5 of Caltech-101 equals its top-1, EVA's top-5 of CIFAR-100 is hardly above its top-1, and the mean of
OpenAI's row is not that of its cells. Of videos the mean per class was not published.
"""

from openeva.checkpoints.pretrained import find_entry

Percent = tuple[float, float | None, float | None]
"""Top-1, top-5, mean per class; None where there is no number."""

EVA_G = ("eva_clip_psz14", "EVA01_CLIP_g_14_psz14_s11B")
OTHERS = ("ViT-L-14:openai", "ViT-H-14:laion2b_s32b_b79k", "ViT-g-14:laion2b_s12b_b42k")
"""Models in the same table that are not of this family, as open_clip calls them: OpenAI CLIP-L, OpenCLIP-H and -g."""

_TABLE: dict[str, tuple[Percent, Percent, Percent, Percent]] = {
    "imagenet_1k": ((75.55, 94.57, 75.55), (77.96, 95.23, 77.93), (76.65, 94.84, 76.66), (78.53, 95.51, 78.51)),
    "imagenet_a": ((70.76, 90.76, 67.88), (59.33, 85.64, 58.18), (57.19, 83.41, 56.55), (73.59, 90.93, 69.97)),
    "imagenet_r": ((87.83, 97.11, 86.44), (89.33, 97.36, 88.1), (88.69, 96.96, 87.51), (92.5, 98.24, 91.19)),
    "imagenet_sketch": ((59.58, 84.25, 59.61), (66.58, 88.12, 66.57), (65.17, 87.46, 65.21), (67.31, 89.07, 67.31)),
    "imagenet_v2": ((69.86, 90.91, 69.85), (70.87, 91.67, 70.92), (69.56, 90.86, 69.61), (71.52, 92.11, 71.56)),
    "objectnet": ((68.98, 88.06, 67.37), (69.71, 87.74, 68.45), (67.53, 86.7, 66.56), (72.33, 89.37, 70.88)),
    "sun397": ((67.57, 93.69, 68.3), (75.2, 96.08, 75.15), (75.41, 96.17, 75.28), (74.15, 95.52, 73.27)),
    "voc2007": ((78.27, 96.88, 86.45), (77.68, 94.22, 84.97), (81.07, 96.57, 85.75), (83.23, 96.94, 88.7)),
    "birdsnap": ((40.52, 64.81, 40.12), (52.92, 73.47, 52.91), (48.68, 71.1, 48.61), (50.0, 70.97, 50.07)),
    "caltech101": ((86.67, 96.85, 93.27), (88.24, 88.24, 94.56), (88.21, 97.24, 94.13), (87.72, 95.68, 94.81)),
    "cars": ((77.86, 98.4, 77.84), (93.4, 99.89, 93.41), (92.92, 99.88, 93.45), (91.71, 99.76, 91.66)),
    "cifar10": ((95.6, 99.63, 95.6), (97.45, 99.93, 97.45), (97.05, 99.93, 97.06), (98.31, 99.96, 98.29)),
    "cifar100": ((75.81, 92.76, 75.81), (84.73, 97.34, 84.73), (83.91, 97.31, 83.92), (88.66, 88.71, 88.65)),
    "country211": ((31.86, 59.36, 31.87), (29.88, 55.76, 29.86), (28.8, 54.24, 28.82), (28.63, 55.37, 28.64)),
    "dtd": ((55.43, 84.15, 55.48), (67.82, 92.45, 67.82), (68.03, 92.39, 68.09), (61.33, 87.5, 61.38)),
    "eurosat": ((62.4, 95.14, 63.72), (72.7, 95.09, 72.91), (63.22, 98.1, 63.71), (73.57, 98.75, 74.39)),
    "fer2013": ((49.89, 97.23, 49.33), (52.01, 96.55, 50.68), (47.16, 94.6, 48.44), (52.17, 94.79, 48.57)),
    "fgvc_aircraft": ((31.44, 78.04, 31.48), (42.75, 83.74, 42.65), (37.71, 79.9, 37.61), (32.37, 73.75, 32.29)),
    "flowers": ((79.2, 92.16, 79.32), (80.11, 92.91, 79.92), (77.41, 90.6, 77.92), (74.47, 90.65, 74.29)),
    "food101": ((93.05, 99.3, 93.06), (92.74, 99.22, 92.73), (91.55, 99.07, 91.55), (93.46, 99.32, 93.46)),
    "gtsrb": ((50.55, 76.08, 43.96), (58.36, 82.1, 54.32), (49.8, 76.88, 46.77), (49.12, 84.56, 47.08)),
    "mnist": ((76.35, 93.53, 75.88), (72.86, 94.21, 73.65), (68.57, 95.15, 68.97), (62.34, 90.81, 62.35)),
    "pets": ((93.49, 99.78, 93.45), (94.55, 99.86, 94.51), (94.36, 99.81, 94.35), (94.22, 99.86, 94.2)),
    "stl10": ((99.36, 100.0, 99.36), (98.48, 99.99, 98.48), (98.65, 99.98, 98.68), (98.89, 100.0, 98.89)),
    "resisc45": ((64.64, 93.21, 64.68), (70.54, 96.03, 70.55), (72.5, 96.12, 72.54), (70.3, 94.66, 70.3)),
    "pcam": ((51.98, None, 51.97), (54.24, None, 54.22), (56.11, None, 56.11), (49.88, None, 49.86)),
    "renderedsst2": ((68.86, None, 68.88), (64.25, None, 64.27), (64.14, None, 64.16), (58.38, None, 58.41)),
    "ucf101": ((76.39, 94.86, None), (78.16, 95.02, None), (77.73, 94.98, None), (76.05, 93.64, None)),
    "kinetics400": ((52.88, 76.06, None), (51.63, 74.49, None), (50.35, 73.03, None), (54.04, 76.42, None)),
    "kinetics600": ((52.41, 76.0, None), (52.25, 74.92, None), (50.79, 73.53, None), (52.76, 75.99, None)),
    "kinetics700": ((45.73, 69.63, None), (44.64, 67.54, None), (43.6, 66.39, None), (46.65, 70.16, None)),
}  # fmt: skip
"""Set -> accuracies of the three `OTHERS`, then of EVA-CLIP g/14."""

_OPEN_CLIP_SETS = (
    "imagenet_1k", "imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "objectnet", "cifar10", "cifar100",
)  # fmt: skip
_OPEN_CLIP: dict[str, tuple[float, ...]] = {
    "EVA01_CLIP_g_14_plus_psz14_s11B": (79.33, 72.14, 74.16, 92.46, 68.14, 74.91, 99.1, 90.08),
    "EVA02_CLIP_B_psz16_s8B": (74.72, 67.01, 53.96, 82.44, 57.71, 62.14, 98.46, 87.73),
    "EVA02_CLIP_L_psz14_s4B": (79.77, 72.95, 76.19, 92.72, 68.13, 74.89, 99.08, 90.71),
    "EVA02_CLIP_L_336_psz14_s6B": (80.39, 73.8, 82.89, 93.24, 68.91, 77.89, 98.92, 89.8),
}  # fmt: skip
"""Top-1 by open_clip's results file."""

_RECALLS: dict[str, dict[str, tuple[float, float, float]]] = {
    OTHERS[0]: {
        "flickr30k_t2i": (65.18, 87.28, 92.0), "flickr30k_i2t": (85.2, 97.3, 99.0),
        "coco_t2i": (36.51, 61.01, 71.11), "coco_i2t": (56.34, 79.32, 86.66),
    },
    OTHERS[1]: {
        "flickr30k_t2i": (77.78, 94.14, 96.62), "flickr30k_i2t": (90.8, 99.3, 99.7),
        "coco_t2i": (49.47, 73.4, 81.53), "coco_i2t": (65.96, 86.06, 91.9),
    },
    OTHERS[2]: {
        "flickr30k_t2i": (76.52, 93.62, 96.28), "flickr30k_i2t": (90.8, 99.1, 99.8),
        "coco_t2i": (47.99, 72.37, 80.75), "coco_i2t": (64.96, 85.3, 91.46),
    },
}  # fmt: skip
"""Model -> data set and direction -> recall at 1, 5, 10; those of released EVA-CLIPs stand with them."""


def published_zero_shot(weights: str) -> dict[str, Percent]:
    """Published zero-shot accuracies of some weights, or of one of `OTHERS`, by set; empty where there are none."""
    if weights in OTHERS:
        return {name: row[OTHERS.index(weights)] for name, row in _TABLE.items()}
    entry = find_entry(weights)
    if entry is None or entry.clip is None:
        return {}
    found: dict[str, Percent] = {name: (one.top1, one.top5, None) for name, one in entry.published.items()}
    top1 = zip(_OPEN_CLIP_SETS, _OPEN_CLIP.get(entry.name, ()), strict=False)
    found |= {name: (value, None, None) for name, value in top1}
    return found | ({name: row[-1] for name, row in _TABLE.items()} if entry.name in EVA_G else {})


def published_retrieval(weights: str) -> dict[str, float]:
    """Published recalls of some weights, or of one of `OTHERS`, such as `coco_t2i_r5`; empty where there are none."""
    if weights in _RECALLS:
        return {
            f"{name}_r{number}": value
            for name, values in _RECALLS[weights].items()
            for number, value in zip((1, 5, 10), values, strict=True)
        }
    entry = find_entry(weights)
    return {} if entry is None else dict(entry.retrieval)
