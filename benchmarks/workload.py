"""The grid that is timed: layers x doses of a direction over two-choice claims in chat form."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jobs.data.claims import ClaimQuestion, load_questions
from jobs.data.pairs import load_pairs
from jobs.directions.contrast import mean_difference
from jobs.engine.capture import capture_last
from jobs.engine.interventions import Add
from jobs.engine.lockstep import skipped
from jobs.engine.prefixes import Family
from jobs.engine.replica import Replica
from jobs.engine.tables import row_tables

LAYERS = (8, 11, 14, 17, 20, 23)
DOSES = (-0.3, -0.15, 0.0, 0.15, 0.3)
CLAIMS = 64
NEW_TOKENS = 30


class Cell(NamedTuple):
    """A configuration of the grid: the vector that is added to the output of a block."""

    layer: int
    dose: float
    vector: np.ndarray


class Workload(NamedTuple):
    """Prompts as token ids, and the configurations that each is completed under."""

    prompts: list[list[int]]
    cells: list[Cell]

    def rows(self) -> list[list[Add]]:
        """The configurations as interventions."""
        return [[Add(layer=cell.layer, vector=cell.vector)] for cell in self.cells]


def make_workload(replica: Replica, layers: Sequence[int] = LAYERS, claims: int = CLAIMS) -> Workload:
    """The workload for a model: a mean-difference direction of tone, doses in mean residual norms."""
    pairs = load_pairs("tone_pairs")
    positive_NLD = capture_last(replica, [replica.encode(pair.positive) for pair in pairs])
    negative_NLD = capture_last(replica, [replica.encode(pair.negative) for pair in pairs])
    cells = []
    for layer in layers:
        sides = positive_NLD[:, layer].float(), negative_NLD[:, layer].float()
        direction = mean_difference(*sides)
        unit = (direction / direction.norm() * torch.cat(sides).norm(dim=-1).mean()).numpy()
        cells += [Cell(layer, dose, dose * unit) for dose in DOSES]
    questions = load_questions("claims", extract=0, select=claims, report=0)
    return Workload([replica.encode_chat(_asked(question)) for question in questions], cells)


def _asked(question: ClaimQuestion) -> str:
    """The question with what all claims share first, as prompts are written for a prefix cache."""
    first, second = ("True", "False") if question.true_letter == "A" else ("False", "True")
    return (
        "Is the claim below true or false? Answer with one letter only, A or B.\n"
        f"(A) {first}\n(B) {second}\n\nClaim: {question.claim.statement}"
    )


def block_flops(replica: Replica) -> float:
    """Floating-point operations of one token in one block, attention over the past left out."""
    matrices = [weight for weight in replica.blocks[0].parameters() if weight.dim() == 2]
    return 2.0 * sum(weight.numel() for weight in matrices)


def head_flops(replica: Replica) -> float:
    """Floating-point operations of one token's logits."""
    weight: Tensor = replica.model.get_output_embeddings().weight
    return 2.0 * weight.numel()


def needed_flops(
    replica: Replica,
    workload: Workload,
    found: Sequence[Family],
    completions: Sequence[Sequence[int]] | None,
    *,
    most: int,
) -> float:
    """Floating-point operations that the workload needs once everything that can be shared is.

    Equal configurations are one. Every prompt is read once without steering, and from the steered block on
    once a configuration; the prefix of a family once a configuration. A new token costs the blocks below the
    steered one once for all configurations whose text is the same so far. Attention over the past is left
    out: about 2 % at these lengths.

    Args:
        replica: The model.
        workload: Prompts and configurations.
        found: Prompts that begin alike.
        completions: New tokens, cell by cell; None if only the first one's logits are wanted.
        most: Most new tokens; the last of a full completion is not read.
    """
    tables = row_tables(replica, workload.rows())
    rows = [row for row, first in enumerate(tables.same) if row == first]
    prompts, layers = len(workload.prompts), replica.layers
    prompt_tokens = sum(family.prefix for family in found) + sum(
        len(workload.prompts[prompt]) - family.prefix for family in found for prompt in family.prompts
    )
    changed = [tables.shared[row] for row in rows if tables.shared[row] <= layers]
    blocks = prompt_tokens * (layers + sum(layers - shared for shared in changed))
    heads = prompts * (1 + len(changed))
    if completions is not None:
        untouched = [tables.untouched[row] for row in rows]
        for prompt in range(prompts):
            texts = [completions[row * prompts + prompt][: most - 1] for row in rows]
            blocks += _blocks_of_new_tokens(texts, untouched, layers)
            heads += sum(map(len, texts))
    return blocks * block_flops(replica) + heads * head_flops(replica)


def _blocks_of_new_tokens(texts: Sequence[Sequence[int]], untouched: Sequence[int], layers: int) -> int:
    """Blocks that reading the new tokens of one prompt takes, under all configurations together."""
    blocks = 0
    for read in range(1, max(map(len, texts)) + 1):
        reading = [index for index, text in enumerate(texts) if len(text) >= read]
        known, _ = skipped(
            [tuple(texts[index][:read]) for index in reading], [untouched[index] for index in reading], layers
        )
        blocks += sum(layers - number for number in known)
    return blocks
