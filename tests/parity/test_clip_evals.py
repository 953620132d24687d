"""What a trained CLIP is measured by, against the official code: classifier made of texts, retrieval, pixels."""

import pytest
import torch
from safetensors.torch import load_file

from openeva.evals.retrieval import paired, retrieval_metrics
from openeva.text.prompts import IMAGENET_TEMPLATES, zero_shot_classifier, zero_shot_logits
from openeva.text.tokenizer import Tokenizer
from openeva.text.tower import TextConfig
from parity.golden import Case, cases


@pytest.mark.parametrize("case", cases("zero_shot_classifier"), ids=str)
def test_classifier_made_of_texts(case: Case) -> None:
    sizes = case.config["model_text"]
    sizes = {**sizes, "num_heads": sizes["heads"], "depth": sizes["layers"]}
    config = TextConfig(**{key: sizes[key] for key in ("vocab_size", "width", "num_heads", "depth", "context_length")})
    tower = config.build(sizes["embed_dim"]).eval()
    weights = load_file(case.path.with_name(case.json["uses"].split()[0]))
    weights = {key.removeprefix("sd."): value for key, value in weights.items() if key.startswith("sd.")}
    weights.pop("logit_scale", None)
    tower.load_state_dict(weights)
    tokenizer = Tokenizer(config.context_length)

    templates = case.json["templates"]
    for index, template in zip(case.json.get("template_indices_in_openai80", ()), templates, strict=False):
        assert IMAGENET_TEMPLATES[index] == template
    classifier_EV = zero_shot_classifier(
        lambda texts: tower(tokenizer(texts)), case.json["classnames"], templates, batch_size=16
    )
    case.close(classifier_EV, "out.classifier")
    logits_BV = zero_shot_logits(case.tensors["in.image_features_raw"], classifier_EV)
    case.close(logits_BV, "out.logits")
    right_BK = logits_BV.topk(min(5, logits_BV.shape[1])).indices == case.tensors["in.targets"][:, None]
    case.close(torch.stack([right_BK[:, 0].float().mean(), right_BK.any(1).float().mean()]), "out.top1_top5")


@pytest.mark.parametrize("case", cases("retrieval_metrics"), ids=str)
def test_ranks_and_recalls_of_pairs(case: Case) -> None:
    found = retrieval_metrics(paired(case.tensors["in.image_features"], case.tensors["in.text_features"]))
    ways, tolerance = {"image_to_text": "i2t", "text_to_image": "t2i"}, case.json["tolerance"]
    for name, expected in case.json["metrics"].items():
        way = next(way for way in ways if name.startswith(way))
        key = f"{ways[way]}_{name.removeprefix(way + '_').replace('R@', 'r')}"
        assert found[key] == pytest.approx(expected, rel=tolerance["rtol"], abs=tolerance["atol"]), name
