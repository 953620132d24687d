"""Released EVA-CLIP models, and the EVA-02 E that two of them started from: rows for `pretrained.py`.

Source: spec sections 1.1, 1.9, 2.7, 3.3 and 5.3 of EVA-CLIP, and open_clip's registry. What they were pre-trained on
before is said by the rows of the weights that they started from, where there are such. The two largest, which are in
no source here, are written down after their paper (arXiv 2402.04252); nobody here has seen their files.
"""

from typing import Any

from openeva.checkpoints.released import EVA, LAION, Accuracy, PretrainedWeights

EVA_CLIP = "QuanSun/EVA-CLIP"
MERGED_2B, LAION_2B = "Merged-2B", "LAION-2B"
MIM_G, MIM_E = "EVA01_g_psz14 (eva_psz14)", "EVA02_E_psz14"
OPENAI_L, EVA_CLIP_G = "OpenAI CLIP ViT-L/14", "EVA-CLIP g/14"
TEXT_H, TEXT_BIG_G = "OpenCLIP ViT-H/14 laion2b_s32b_b79k", "OpenCLIP ViT-bigG/14 laion2b_s39b_b160k"
UNSEEN = "its file was never seen here: architecture and file name after the paper, not verified"

_G: dict[str, Any] = {"variant": "eva_g_14", "teacher": OPENAI_L, "licence": "MIT"}
_B: dict[str, Any] = {"variant": "eva02_b_14", "teacher": EVA_CLIP_G}
_L: dict[str, Any] = {"variant": "eva02_l_14", "teacher": EVA_CLIP_G}
_SUB_NORM: dict[str, Any] = {"sub_norm": "mlp_attention"}
# which norm comes first is in no shape of a file, so that it must stand here too
_E: dict[str, Any] = {"variant": "eva02_e_14", "teacher": EVA_CLIP_G, "overrides": {"norm_order": "post"}}

_ZERO_SHOT_G = {
    "imagenet_1k": Accuracy(78.53, 95.51), "imagenet_v2": Accuracy(71.52, 92.11), "imagenet_a": Accuracy(73.59, 90.93),
    "imagenet_r": Accuracy(92.5, 98.24), "imagenet_sketch": Accuracy(67.31, 89.07), "objectnet": Accuracy(72.33, 89.37),
}  # fmt: skip
_RETRIEVAL_G = {
    "flickr30k_t2i_r1": 72.64, "flickr30k_t2i_r5": 91.60, "flickr30k_t2i_r10": 95.12,
    "flickr30k_i2t_r1": 88.3, "flickr30k_i2t_r5": 98.3, "flickr30k_i2t_r10": 99.3,
    "coco_t2i_r1": 44.07, "coco_t2i_r5": 68.50, "coco_t2i_r10": 77.33,
    "coco_i2t_r1": 61.76, "coco_i2t_r5": 83.28, "coco_i2t_r10": 89.96,
}  # fmt: skip


def _clip(name: str, clip: str, num_parameters: int | None, data: str, **facts: Any) -> PretrainedWeights:
    facts = {"image_size": 224, "file": f"{name}.pt", "repository": EVA_CLIP, **facts}
    return PretrainedWeights(name, "clip", clip=clip, num_parameters=num_parameters, data=data, **facts)


def _numbers(top1: float, coco_t2i_r5: float) -> dict[str, Any]:
    return {"published": {"imagenet_1k": Accuracy(top1)}, "retrieval": {"coco_t2i_r5": coco_t2i_r5}}


CLIPS = (
    _clip(
        "eva_clip_psz14", "eva01_clip_g_14", 1_136_435_841, LAION, **_G, repository=EVA,
        started_from=(MIM_G, OPENAI_L), published=_ZERO_SHOT_G, retrieval=_RETRIEVAL_G,
        note="listed again as EVA01_CLIP_g_14_psz14_s11B in the later release",
    ),
    _clip(
        "EVA01_CLIP_g_14_psz14_s11B", "eva01_clip_g_14", 1_136_435_841, LAION, **_G,
        started_from=(MIM_G, OPENAI_L), published=_ZERO_SHOT_G, retrieval=_RETRIEVAL_G,
        timm=("eva_giant_patch14_clip_224.laion400m",), open_clip="EVA01-g-14:laion400m_s11b_b41k",
    ),
    _clip(
        "EVA01_CLIP_g_14_plus_psz14_s11B", "eva01_clip_g_14_plus", 1_366_621_569, MERGED_2B, **_G,
        started_from=(MIM_G, TEXT_H), **_numbers(79.3, 74.0),
        timm=("eva_giant_patch14_clip_224.merged2b",), open_clip="EVA01-g-14-plus:merged2b_s11b_b114k",
    ),
    _clip(
        "EVA02_CLIP_B_psz16_s8B", "eva02_clip_b_16", 149_691_137, MERGED_2B, **_B,
        overrides={"patch_size": 16, **_SUB_NORM}, started_from=("EVA02_B_psz14to16", "OpenAI CLIP ViT-B/16"),
        **_numbers(74.7, 66.9),
        timm=("eva02_base_patch16_clip_224.merged2b",), open_clip="EVA02-B-16:merged2b_s8b_b131k",
    ),
    _clip(
        "EVA02_CLIP_L_psz14_s4B", "eva02_clip_l_14", 427_755_457, MERGED_2B, **_L,
        overrides=_SUB_NORM, started_from=("EVA02_L_psz14", OPENAI_L), **_numbers(79.8, 71.2),
        timm=("eva02_large_patch14_clip_224.merged2b",), open_clip="EVA02-L-14:merged2b_s4b_b131k",
    ),
    _clip(
        "EVA02_CLIP_L_336_psz14_s6B", "eva02_clip_l_14_336", 428_083_137, MERGED_2B, **_L, image_size=336,
        overrides=_SUB_NORM, started_from=("EVA02_CLIP_L_psz14_s4B", "EVA02_CLIP_L_psz14_s4B"), **_numbers(80.4, 71.7),
        timm=("eva02_large_patch14_clip_336.merged2b",), open_clip="EVA02-L-14-336:merged2b_s6b_b61k",
    ),
    _clip(
        "EVA02_CLIP_E_psz14_s4B", "eva02_clip_e_14", 4_704_589_569, LAION_2B, **_E,
        started_from=(MIM_E, TEXT_H), **_numbers(81.9, 74.7),
        timm=("eva02_enormous_patch14_clip_224.laion2b",), open_clip="EVA02-E-14:laion2b_s4b_b115k",
    ),
    _clip(
        "EVA02_CLIP_E_psz14_plus_s9B", "eva02_clip_e_14_plus", 5_044_889_089, LAION_2B, **_E,
        started_from=(MIM_E, TEXT_BIG_G), **_numbers(82.0, 75.0),
        timm=("eva02_enormous_patch14_clip_224.laion2b_plus",), open_clip="EVA02-E-14-plus:laion2b_s9b_b144k",
    ),
    _clip(
        "EVA_CLIP_8B_psz14_s9B", "eva_clip_8b", None, "not known", repository="BAAI/EVA-CLIP-8B",
        variant="eva_8b_14", teacher="not known", licence=None, note=UNSEEN,
    ),
    _clip(
        "EVA_CLIP_18B_psz14_s6B", "eva_clip_18b", None, "not known", repository="BAAI/EVA-CLIP-18B",
        variant="eva_18b_14", teacher="not known", licence=None, note=UNSEEN,
    ),
    PretrainedWeights(
        "EVA02_E_psz14", "mim", image_size=224, num_parameters=4_350_558_720, data="not known", file="EVA02_E_psz14.pt",
        repository=EVA_CLIP, predict_width=1024, **_E,
    ),
)  # fmt: skip
