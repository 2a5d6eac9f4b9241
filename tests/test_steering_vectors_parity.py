"""Greedy completions of the real small model equal those of the package steering_vectors, token for token."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from steering_vectors import SteeringVector
from torch import Tensor

from jobs import extract
from jobs.engine.decoding import Decoding, Work, generate
from jobs.engine.interventions import Add
from jobs.engine.replica import Replica
from jobs.engine.tables import row_tables
from tests.models import Artifacts

pytestmark = pytest.mark.slow

LAYERS = (8, 15, 22)
MULTIPLIERS = (-40.0, 50.0)
QUESTIONS = (
    "How was your day?",
    "What do you think of Mondays, and why do people talk about them so much?",
)
NEW_TOKENS = 16
NEAR_TIE = 1e-3
"""Gap of the lone run's two largest logits below which float32 may decide either way."""


class PackageRun(NamedTuple):
    """What the package generates for one prompt alone: the new tokens and the top-two gap before each."""

    tokens: list[int]
    gaps: list[float]


@pytest.fixture(scope="module")
def directions(smollm2: Replica) -> Tensor:
    [outcome] = Artifacts(smollm2).run("jobs.extract", [extract.Params(pairs="tone_pairs", count=12)])
    return torch.tensor(outcome.tensors["directions"])


@torch.inference_mode()
def with_the_package(
    replica: Replica, prompt: list[int], layer: int, vector: Tensor, multiplier: float
) -> PackageRun:
    ids = torch.tensor([prompt])
    with SteeringVector({layer: vector}, "decoder_block").apply(replica.model, multiplier=multiplier):
        found = replica.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
        )
    largest = torch.cat(found.logits).topk(2).values
    return PackageRun(found.sequences[0, len(prompt) :].tolist(), (largest[:, 0] - largest[:, 1]).tolist())


def completed(
    replica: Replica, prompts: list[list[int]], rows: list[list[Add]], work: list[Work]
) -> list[list[int]]:
    decoding = Decoding(max_new_tokens=NEW_TOKENS)
    found = dict(generate(replica, prompts, row_tables(replica, rows), work, decoding))
    return [found[index].tokens for index in range(len(work))]


def test_a_pack_of_all_layers_and_multipliers_says_what_the_package_says_one_by_one(
    smollm2: Replica, directions: Tensor, record_property: Callable[[str, object], None]
) -> None:
    prompts = [smollm2.encode_chat(question) for question in QUESTIONS]
    work = [
        (layer, factor, place) for layer in LAYERS for factor in MULTIPLIERS for place in range(len(prompts))
    ]
    rows = [[Add(layer=layer, vector=(factor * directions[layer]).numpy())] for layer, factor, _ in work]
    ours = completed(smollm2, prompts, rows, [Work(place, row) for row, (_, _, place) in enumerate(work)])
    near_ties = 0
    for (layer, factor, place), mine in zip(work, ours, strict=True):
        theirs = with_the_package(smollm2, prompts[place], layer, directions[layer], factor)
        ended = mine + sorted(smollm2.stop_ids)[: NEW_TOKENS - len(mine)]
        assert len(smollm2.stop_ids) == 1
        differing = [
            step for step, pair in enumerate(zip(ended, theirs.tokens, strict=False)) if len({*pair}) > 1
        ]
        if not differing:
            assert len(ended) == len(theirs.tokens)
            continue
        gap = theirs.gaps[differing[0]]
        assert gap < NEAR_TIE, (
            f"layer {layer}, multiplier {factor}, prompt {place}, token {differing[0]}: gap {gap}"
        )
        near_ties += 1
    record_property("completions", len(work))
    record_property("differing_at_a_near_tie", near_ties)
    if near_ties:
        warnings.warn(f"{near_ties} of {len(work)} completions differ after a near tie", stacklevel=1)
    unsteered = completed(smollm2, prompts, [[]], [Work(place, 0) for place in range(len(prompts))])
    changed = sum(mine != unsteered[place] for (_, _, place), mine in zip(work, ours, strict=True))
    assert changed > len(work) / 2, "the vectors are too weak for this test to mean anything"
