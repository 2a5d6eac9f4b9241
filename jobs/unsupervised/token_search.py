"""Greedy coordinate gradient: tokens that move the target as a vector moves it.

Source: Zou et al., "Universal and transferable adversarial attacks on aligned language models",
arXiv:2307.15043, algorithm 1; what is maximised here is a cosine of changes of activations.
C candidates, T tokens, D hidden.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jobs.engine.memory import in_batches
from jobs.engine.replica import Replica
from jobs.engine.sites import Place, picked
from jobs.engine.slices import Slice


class Found(NamedTuple):
    """What a search ends with.

    Attributes:
        tokens: The best text.
        cosine: Its cosine.
        history: The best cosine at the start and after each step.
    """

    tokens: list[int]
    cosine: float
    history: list[float]


class TokenSearch:
    """Texts inside of a prompt, and how alike what they do to its last token is to what a vector does.

    Args:
        replica: The model.
        prompt: Token ids without the text.
        place: How many of them stand before the text.
        source: Block to whose output the vector is added.
        target: Block at whose output both are compared, at the prompt's last token.
        vector_D: The vector, in stream units.
    """

    def __init__(
        self,
        replica: Replica,
        prompt: Sequence[int],
        place: int,
        *,
        source: int,
        target: int,
        vector_D: np.ndarray,
    ) -> None:
        self._replica = replica
        self._before, self._after = list(prompt[:place]), list(prompt[place:])
        self._target = target
        upper = Slice(replica, [prompt], source=source, target=target)
        with torch.no_grad():
            self._wanted_D = upper.deltas(torch.tensor(vector_D).to(upper.wide)[None], [0])[0, -1]
        self._bare_D = upper.targets_NTD[0, -1]

    @cached_property
    def allowed(self) -> np.ndarray:
        """Ids of the tokens that a text may hold: all that the tokenizer knows but its special ones."""
        known = self._replica.model.get_input_embeddings().weight.shape[0]
        tokens = np.arange(min(known, len(self._replica.tokenizer)))
        found: np.ndarray = tokens[~np.isin(tokens, self._replica.tokenizer.all_special_ids)]
        return found

    def cosines(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """How alike each text's change is to the vector's."""
        prompts = [[*self._before, *text, *self._after] for text in texts]
        place = Place(self._target, "after")

        @torch.no_grad()
        def run(batch: list[int]) -> list[Tensor]:
            with picked(self._replica, [place], lambda h_BTD: h_BTD[:, -1].clone()) as found:
                self._replica.logits([prompts[index] for index in batch], keep=1)
            return list(found[place])

        ends_CD = torch.stack(in_batches(self._replica, [*map(len, prompts)], run))
        found: list[float] = self._alike(ends_CD).tolist()
        return found

    def slopes(self, text: Sequence[int]) -> Tensor:
        """How much the cosine would rise with each allowed token at each place, to first order.

        Returns:
            Shape (T, allowed tokens).
        """
        prompt = [*self._before, *text, *self._after]
        lower = Slice(self._replica, [prompt], source=-1, target=self._target)
        with torch.enable_grad():
            moves_1TD = torch.zeros_like(lower.inputs_NTD).requires_grad_()
            ends_1D = lower.run(lower.inputs_NTD + moves_1TD, [0])[:, -1]
            (gradient_1TD,) = torch.autograd.grad(self._alike(ends_1D).sum(), moves_1TD)
        chosen_TD = gradient_1TD[0, len(self._before) : len(self._before) + len(text)]
        table = self._replica.model.get_input_embeddings().weight[torch.from_numpy(self.allowed)]
        slopes: Tensor = chosen_TD @ table.to(chosen_TD).T
        return slopes

    def _alike(self, ends_CD: Tensor) -> Tensor:
        wide = torch.promote_types(ends_CD.dtype, torch.float32)
        moved_CD = (ends_CD - self._bare_D).to(wide)
        return torch.nn.functional.cosine_similarity(moved_CD, self._wanted_D.to(wide)[None], dim=1)


def search(
    task: TokenSearch, *, tokens: int, steps: int, likeliest: int, candidates: int, seed: int
) -> Found:
    """The best text that a number of rounds find; a round keeps the text unless a candidate is better.

    Args:
        task: What is searched for.
        tokens: Length of the text; it starts as random tokens.
        steps: Rounds.
        likeliest: Tokens that are considered at each place.
        candidates: Texts a round, each with one of its tokens replaced.
        seed: Of the start and of the candidates.
    """
    generator = np.random.default_rng(seed)
    best = generator.choice(task.allowed, size=tokens).tolist()
    [cosine] = task.cosines([best])
    history = [cosine]
    for _ in range(steps):
        most = min(likeliest, len(task.allowed))
        tops = task.allowed[task.slopes(best).topk(most, dim=1).indices.cpu().numpy()]
        places = generator.integers(tokens, size=candidates)
        tried = []
        for place in places:
            tried.append([*best])
            tried[-1][place] = int(generator.choice(tops[place]))
        found = task.cosines(tried)
        if max(found) > cosine:
            cosine = max(found)
            best = tried[found.index(cosine)]
        history.append(cosine)
    return Found(best, cosine, history)
