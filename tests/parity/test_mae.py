"""Pre-training with an encoder that sees visible patches only, against the official code."""

import pytest
import torch

from openeva.backbones.vit import Config
from openeva.checkpoints.official import from_official, official_name, to_official
from openeva.data.masking import RandomMasking
from openeva.heads.mae_decoder import MaeDecoderConfig, MaeStudent
from openeva.losses.cosine import negative_cosine
from parity.golden import Case, cases


def student_of(case: Case) -> MaeStudent:
    official = case.config
    width, decoder_width = official["embed_dim"], official["decoder_embed_dim"]
    backbone = Config(
        image_size=official["img_size"],
        patch_size=official["patch_size"],
        width=width,
        depth=official["depth"],
        num_heads=official["num_heads"],
        mlp_hidden=width * official["mlp_ratio"],
        norm_eps=official["ln_eps"],
        qkv_bias="full" if official["qkv_bias"] == "all" else "qv",
        positions="sincos",
    ).build()
    decoder = MaeDecoderConfig(
        width=decoder_width,
        depth=official["decoder_depth"],
        num_heads=official["decoder_num_heads"],
        mlp_hidden=decoder_width * official["mlp_ratio"],
    )
    masking = RandomMasking(ratio=official["mask_ratio"]).build(backbone.grid)
    return decoder.build(backbone, masking, official["predict_feature_dim"])


@pytest.mark.parametrize("case", cases("mae_asymmetric"), ids=str)
def test_student(case: Case) -> None:
    student = student_of(case)
    own = to_official(student.state_dict())
    case.close(own["pos_embed"], "out.sincos_pos_embed")
    case.close(own["decoder_pos_embed"], "out.sincos_decoder_pos_embed")
    assert student.num_visible == case.config["keep"]
    assert {official_name(name) for name, p in student.named_parameters() if p.requires_grad} == set(
        case.json["state_dict_keys"]
    ) - set(case.json["frozen_params"])

    student.load_state_dict(from_official(case.prefix("sd.")), strict=True)
    image, mask = case.tensors["in.image"], case.tensors["out.mask"] > 0
    every = torch.arange(mask.numel())
    case.close(student.eval()(image, mask, every), "out.pred")

    index = mask.flatten().nonzero()[:, 0]
    loss = negative_cosine(student(image, mask, index), case.tensors["in.teacher"].flatten(0, 1)[index])
    loss.backward()
    case.close(loss, "out.loss")
    case.close(-loss, "out.cosine_mean_released")  # the released code has the other sign
    compared = 0
    for name, parameter in student.named_parameters():
        expected = f"out.grad.{official_name(name)}"
        if expected in case.tensors:
            case.close(parameter.grad, expected, "grad_tolerance")
            compared += 1
    assert compared == len(case.prefix("out.grad.")) > 0


@pytest.mark.parametrize("case", cases("mae_asymmetric"), ids=str)
def test_encoder_in_the_official_order_of_patches(case: Case) -> None:
    """The official code encodes visible patches in the order of their noise; the order makes no difference."""
    student = student_of(case).eval()
    student.load_state_dict(from_official(case.prefix("sd.")), strict=True)
    image, shuffled_BM = case.tensors["in.image"], case.tensors["in.noise"].argsort(dim=1)[:, : student.num_visible]
    features = student.backbone.forward_visible(image, shuffled_BM)
    case.close(torch.cat([features.cls[:, None], features.patches], dim=1), "out.latent")
    every = torch.arange(case.tensors["out.mask"].numel())
    case.close(student.decoder(features.cls, features.patches, shuffled_BM, every), "out.pred")
