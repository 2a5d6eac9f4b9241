"""Hidden states of prompts and of what follows them, at any layers, sites and positions, in one pass each.

States leave the device batch by batch and are handed over as they come.
S sequences, T tokens, K states, D hidden.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from jobs.engine.decoding import Decoding, Work, generate
from jobs.engine.groups import check_work
from jobs.engine.interventions import SITES, Site
from jobs.engine.memory import in_batches, micro_batches, within_memory
from jobs.engine.replica import Replica
from jobs.engine.sites import Place, picked
from jobs.engine.tables import Counts, RowTables, Steering, steered
from jobs.errors import SpecError

GENERATED = "generated"
"""Name of the states that predicted the tokens of a completion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which states are captured.

    Attributes:
        layers: Blocks, counted from 0.
        sites: Where in each of them: the residual stream `before` and `after` the block, and what its
            `attention` and its `mlp` add.
        positions: For each prompt, name -> positions in it, counted from its first token, or from its end
            where negative (-1 = the last one); () captures none of the prompts' tokens.
        decoding: How prompts are completed, to capture the state that predicted each token of the
            completion; None completes nothing.
        mean: Whether the states of each name, the generated ones too, are averaged.
    """

    layers: Sequence[int]
    sites: Sequence[Site] = ("after",)
    positions: Sequence[Mapping[str, Sequence[int]]] = ()
    decoding: Decoding | None = None
    mean: bool = False


class Point(NamedTuple):
    """Which token a state belongs to.

    Attributes:
        name: Name of the positions it is one of, or `generated`.
        position: Its token, counted from 0 over the prompt and its completion; None for a mean.
        step: Number of the new token that the state predicted, from 0; None for a mean, and for states that
            were not asked for as generated.
    """

    name: str
    position: int | None
    step: int | None


class Captured(NamedTuple):
    """States of one prompt under one configuration.

    Attributes:
        points: What each of the K states of a place belongs to.
        states: Place -> states of shape (K, D), float32 or wider, on the CPU.
        completion: New tokens, up to and without the first stop token.
        finite: Whether all logits of the completion were; it ends before the first that were not.
        fired: Place -> at how many tokens the pass that captured was changed there.
        intended: Place -> at how many it was to be changed; equal to `fired` unless a model runs its blocks
            in a way that hooks do not see.
    """

    points: list[Point]
    states: Mapping[Place, Tensor]
    completion: list[int]
    finite: bool
    fired: Counts
    intended: Counts


class _Size(NamedTuple):
    """Tokens of a text, and how many of its states are handed over at each place."""

    tokens: int
    states: int


class _Text(NamedTuple):
    """A prompt and, where states of its completion are wanted, all of that but the last token.

    Attributes:
        tokens: Token ids.
        prompt_tokens: How many of them are the prompt's.
        row: Row of the tables.
        positions: Name -> positions whose states are wanted, from 0.
        completion: Token ids of the whole completion.
        finite: Whether all logits of the completion were.
    """

    tokens: list[int]
    prompt_tokens: int
    row: int
    positions: Mapping[str, Sequence[int]]
    completion: list[int]
    finite: bool

    def size(self, *, mean: bool) -> _Size:
        return _Size(len(self.tokens), len(self.points(mean=mean)))

    def points(self, *, mean: bool) -> list[Point]:
        if mean:
            return [Point(name, None, None) for name in self.positions]
        return [
            Point(name, at, at - self.prompt_tokens + 1 if name == GENERATED else None)
            for name, positions in self.positions.items()
            for at in positions
        ]


def capture(
    replica: Replica,
    prompts: Sequence[Sequence[int]],
    tables: RowTables,
    work: Sequence[Work],
    wanted: Wanted,
) -> Iterator[tuple[int, Captured]]:
    """States of all work, each with its index, as soon as its batch is through.

    Completions are generated first and read again with their prompts in one pass. That gives the states
    that predicted them: a state depends only on the tokens up to its own and on what steering does there,
    which is given by the token's position and the prompt's length, and all of these are the same. Only
    the rounding differs.

    Args:
        replica: The model.
        prompts: Token ids; they may differ in length.
        tables: The configurations; a row without interventions captures the unsteered model.
        work: Which prompts to read under which of them.
        wanted: Which states.

    Raises:
        SpecError: If a layer, a site or a position does not exist; nothing has run then.
        OutOfMemory: If a single text does not fit.
    """
    places = _places(replica, wanted)
    _check_positions(prompts, wanted)
    new_tokens = wanted.decoding.max_new_tokens if wanted.decoding else 0
    check_work(replica, prompts, tables, [(each.prompt, each.row) for each in work], new_tokens=new_tokens)
    return _capture(replica, prompts, tables, work, wanted, places)


def _places(replica: Replica, wanted: Wanted) -> list[Place]:
    if wrong := [layer for layer in wanted.layers if not 0 <= layer < replica.layers]:
        raise SpecError(f"layers {wrong} do not exist; the model has 0 to {replica.layers - 1}")
    if unknown := [site for site in wanted.sites if site not in SITES]:
        raise SpecError(f"sites {unknown} do not exist; there are {list(SITES)}")
    places = [Place(layer, site) for layer in wanted.layers for site in wanted.sites]
    if not places or len(set(places)) < len(places):
        raise SpecError(
            f"layers {list(wanted.layers)}, sites {list(wanted.sites)}; each takes at least one, each once"
        )
    return places


def _check_positions(prompts: Sequence[Sequence[int]], wanted: Wanted) -> None:
    if len(wanted.positions) not in (0, len(prompts)):
        raise SpecError(f"positions of {len(wanted.positions)} prompts; {len(prompts)} were given")
    for number, (prompt, named) in enumerate(zip(prompts, wanted.positions, strict=False)):
        for name, positions in named.items():
            if name == GENERATED and wanted.decoding is not None:
                raise SpecError(f"prompt {number}: {name!r} names what is generated; choose another name")
            if not positions:
                raise SpecError(f"prompt {number}: {name!r} names no token")
            if wrong := [at for at in positions if not -len(prompt) <= at < len(prompt)]:
                raise SpecError(
                    f"prompt {number}: {name!r} names the positions {wrong} of a prompt that has "
                    f"{-len(prompt)} to {len(prompt) - 1}"
                )


@torch.inference_mode()
def _capture(
    replica: Replica,
    prompts: Sequence[Sequence[int]],
    tables: RowTables,
    work: Sequence[Work],
    wanted: Wanted,
    places: Sequence[Place],
) -> Iterator[tuple[int, Captured]]:
    completions: dict[int, tuple[list[int], bool]] = {}
    if wanted.decoding is not None:
        found = generate(replica, prompts, tables, work, wanted.decoding)
        completions = {index: (each.tokens, each.finite) for index, each in found}

    def text(index: int) -> _Text:
        prompt, row, _ = work[index]
        named = wanted.positions[prompt] if wanted.positions else {}
        return _text(prompts[prompt], row, named, *completions.get(index, ([], True)))

    # A batch hands over at most as many bytes as the replica may keep.
    sizes = [text(index).size(mean=wanted.mean) for index in range(len(work))]
    state_bytes = len(places) * max(replica.state_bytes, 4 * replica.hidden_size)
    bytes_per_token = 1 + max((states * state_bytes // tokens for tokens, states in sizes), default=0)

    def run(left: list[int]) -> Iterator[tuple[int, Captured]]:
        budget = min(replica.token_budget, replica.memory // bytes_per_token)
        for batch in micro_batches([sizes[index].tokens for index in left], budget):
            chosen = [left[place] for place in batch]
            texts = [text(index) for index in chosen]
            yield from zip(chosen, _read(replica, tables, texts, places, mean=wanted.mean), strict=True)

    yield from within_memory(replica, range(len(work)), run)


def _text(
    prompt: Sequence[int], row: int, named: Mapping[str, Sequence[int]], completion: list[int], finite: bool
) -> _Text:
    positions = {name: [at % len(prompt) for at in each] for name, each in named.items()}
    if completion:
        positions[GENERATED] = [len(prompt) - 1 + step for step in range(len(completion))]
    return _Text([*prompt, *completion[:-1]], len(prompt), row, positions, completion, finite)


def _read(
    replica: Replica, tables: RowTables, texts: Sequence[_Text], places: Sequence[Place], *, mean: bool
) -> list[Captured]:
    """States of a batch from one pass."""
    longest = max(len(text.tokens) for text in texts)
    groups = [
        (sequence, [longest - len(text.tokens) + at for at in positions])
        for sequence, text in enumerate(texts)
        for positions in text.positions.values()
    ]
    sequences_K = torch.tensor([sequence for sequence, columns in groups for _ in columns], dtype=torch.int64)
    columns_K = torch.tensor([column for _, columns in groups for column in columns], dtype=torch.int64)

    def pick(h: Tensor) -> Tensor:
        h_STD = h.reshape(len(texts), longest, h.shape[-1])
        picked_KD = h_STD[sequences_K.to(h.device), columns_K.to(h.device)]
        return _means(picked_KD, [len(columns) for _, columns in groups]) if mean else picked_KD

    steering = Steering(tables.take([text.row for text in texts]), [text.prompt_tokens for text in texts])
    with steered(replica, steering), picked(replica, places, pick) as found:
        replica.logits([text.tokens for text in texts], keep=1)
    points = [text.points(mean=mean) for text in texts]
    parts = {place: _widened(found[place].cpu()).split([*map(len, points)]) for place in places}
    return [
        Captured(
            points[number],
            {place: part[number] for place, part in parts.items()},
            text.completion,
            text.finite,
            {place: count for place, count in fired.items() if count},
            tables.intended(text.row, text.prompt_tokens, len(text.tokens)),
        )
        for number, (text, fired) in enumerate(zip(texts, steering.counts(), strict=True))
    ]


def _widened(states: Tensor) -> Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _means(states_KD: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mean of each run of so many states, float32 or wider; a run that is not finite spoils no other."""
    wide_KD = _widened(states_KD)
    return torch.cat([wide_KD[:0], *(part.mean(dim=0, keepdim=True) for part in wide_KD.split(list(sizes)))])


@torch.inference_mode()
def capture_last(replica: Replica, prompts: Sequence[Sequence[int]], *, offset: int = 1) -> Tensor:
    """Output of every block at one token of each prompt, counted from the end.

    Args:
        replica: The model.
        prompts: Token ids.
        offset: 1 = last token, 2 = the one before, and so on.

    Returns:
        Shape (prompts, layers, hidden), the model's dtype, on the CPU.

    Raises:
        SpecError: If there is no prompt, or one is shorter than `offset`.
    """
    if not prompts or offset < 1:
        raise SpecError(f"{len(prompts)} prompts, offset={offset}; each takes 1 or more")
    for prompt in prompts:
        replica.check_text(prompt)
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths) < offset:
        raise SpecError(
            f"offset={offset}, and prompt {lengths.index(min(lengths))} has only {min(lengths)} tokens"
        )

    places = [Place(layer, "after") for layer in range(replica.layers)]

    def capture(batch: list[int]) -> Sequence[Tensor]:
        with picked(replica, places, lambda h_STD: h_STD[:, -offset].cpu()) as found:
            replica.logits([prompts[index] for index in batch], keep=1)
        return torch.stack([found[place] for place in places], dim=1).unbind()

    return torch.stack(in_batches(replica, lengths, capture))
