"""The text side against the official code: token ids of both tokenizers, the text tower on short and on full rows."""

import pytest
import torch

from openeva.text.tokenizer import END, START, Tokenizer
from openeva.text.tower import TextConfig, TextTower
from parity.golden import Case, cases

TOKENIZERS = [*cases("text_tower_and_tokenizer"), *cases("tokenizer")]
SPECIALS = {"text_tower_and_tokenizer": "eva01", "tokenizer": "eva02"}
"""Whose spelling of the special tokens a kind was recorded with."""


def tokenizer_of(case: Case) -> Tokenizer:
    return Tokenizer(case.config["context_length"], SPECIALS[case.json["kind"]])


def official_ids(case: Case) -> torch.Tensor:
    name = "in.token_ids" if "in.token_ids" in case.tensors else "out.token_ids"
    return case.tensors[name].long()


def tower_of(case: Case) -> TextTower:
    config = case.config
    tower = TextConfig(
        context_length=config["context_length"],
        vocab_size=config["vocab_size"],
        width=config["width"],
        num_heads=config["heads"],
        depth=config["layers"],
    ).build(config["embed_dim"])
    weights = {name: value.float() for name, value in case.prefix("sd.").items()}
    weights.pop("logit_scale", None)  # EVA-01 keeps it in the text tower
    tower.load_state_dict(weights, strict=True)
    return tower.eval()


@pytest.mark.parametrize("case", TOKENIZERS, ids=str)
def test_token_ids(case: Case) -> None:
    tokenizer = tokenizer_of(case)
    strings = case.json["strings"]
    for text, ids in zip(strings, case.json["raw_encode"], strict=True):
        assert tokenizer.encode(text) == ids, text
    ids_BL = tokenizer(strings, padded=True)
    assert torch.equal(ids_BL, official_ids(case))
    assert (case.json.get("sot_id", START), case.json.get("eot_id", END)) == (START, END)


@pytest.mark.parametrize("case", TOKENIZERS, ids=str)
def test_rows_as_long_as_the_longest_hold_the_same_ids(case: Case) -> None:
    tokenizer = tokenizer_of(case)
    for text, official_L in zip(case.json["strings"], official_ids(case), strict=True):
        ids_L = tokenizer([text])[0]
        length = int((official_L == END).nonzero()[-1]) + 1
        assert len(ids_L) == min(-(-length // 8) * 8, tokenizer.context_length)
        assert torch.equal(ids_L, official_L[: len(ids_L)])
        assert not official_L[len(ids_L) :].any()


@pytest.mark.parametrize("case", cases("text_tower_and_tokenizer"), ids=str)
def test_only_too_long_texts_raise_without_truncation(case: Case) -> None:
    tokenizer = tokenizer_of(case)
    raised = []
    for number, text in enumerate(case.json["strings"]):
        try:
            tokenizer([text], truncate=False)
        except ValueError:
            raised.append(number)
    assert raised == case.json["strings_that_raise_without_truncate"]


@pytest.mark.parametrize("case", cases("text_tower_and_tokenizer"), ids=str)
def test_text_tower(case: Case) -> None:
    tower, ids_BL = tower_of(case), official_ids(case)
    normed: dict[str, torch.Tensor] = {}
    tower.ln_final.register_forward_hook(lambda module, args, out: normed.update(out=out))
    with torch.no_grad():
        features_BE = tower(ids_BL)
    case.close(features_BE, "out.text_features")
    case.close(normed["out"], "out.text_prehead")
    assert torch.equal(ids_BL.argmax(1), case.tensors["out.eot_index"])


@pytest.mark.parametrize("case", cases("text_tower_and_tokenizer"), ids=str)
def test_text_tower_gives_the_same_on_short_rows(case: Case) -> None:
    tower, tokenizer = tower_of(case), tokenizer_of(case)
    lengths, features = set(), []
    with torch.no_grad():
        for text in case.json["strings"]:
            ids_BL = tokenizer([text])
            lengths.add(ids_BL.shape[1])
            features.append(tower(ids_BL))
    counts = [int((official_L == END).nonzero()[-1]) + 1 for official_L in official_ids(case)]
    assert lengths == {min(-(-count // 8) * 8, tokenizer.context_length) for count in counts}
    case.close(torch.cat(features), "out.text_features")
