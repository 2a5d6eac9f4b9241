"""Job: search for a text that makes a prompt's activations move as a learned vector moves them.

From the thread under MELBO's write-up: if a text is found that does what a vector does, the behaviour can be
had without touching activations. The search is greedy coordinate gradient: Zou et al., arXiv:2307.15043.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jobs import melbo
from jobs.asking import encode_prompt
from jobs.checks import at_least
from jobs.spec import UNSTEERED, Context, Metric, Outcome, Requirement, Row, Size, Status

if TYPE_CHECKING:
    from jobs.engine.replica import Replica
    from jobs.unsupervised.token_search import Found


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Which vector, how long a text, and how long the search.

    Attributes:
        learned: `jobs.melbo` with its parameters as JSON behind its name; random vectors are searched for
            with `jobs.melbo{"optimiser": "none"}`.
        vector: Which of its vectors, from 0.
        tokens: Length of the text, which is put behind the prompt's own words.
        steps: Rounds of the search; each changes one token at most.
        likeliest: Tokens that are considered at each place, by the gradient.
        candidates: Texts that are tried in a round.
        max_new_tokens: Most tokens of the replies that are compared.
        encoder: Of the sentence embeddings that replies are compared with.
    """

    learned: str = "jobs.melbo"
    vector: int = 0
    tokens: int = 8
    steps: int = 50
    likeliest: int = 64
    candidates: int = 64
    max_new_tokens: int = 30
    encoder: str = "all-minilm-l6-v2"

    def __post_init__(self) -> None:
        at_least(self, 1, "tokens", "steps", "likeliest", "candidates", "max_new_tokens")
        melbo.check_vector(self.learned, self.vector)


METRICS = {
    "cosine": Metric("cosine", "of what the text does to the target with what the vector does"),
    "cosine_start": Metric("cosine", "the same of the text that the search starts with"),
    "text_nll": Metric("nats/token", "of the text in its place under the model"),
    "likeness": Metric("cosine", "of the reply to prompt and text with the reply under the vector"),
    "likeness_unsteered": Metric("cosine", "of the reply to the bare prompt with the reply under the vector"),
}
PACK_BY = None
DATA: tuple[str, ...] = ()
LAYERS: tuple[str, ...] = ()
CONTROL = ""


def size(params: Params) -> Size:
    """Texts of about 55 tokens, half of the model."""
    return Size(params.candidates, 55 * params.candidates * params.steps)


def requires(params: Params) -> Sequence[Requirement]:
    """The set of vectors."""
    return [Requirement(job="jobs.melbo", params=melbo.canonical(melbo.parse(params.learned)))]


def check(params: Params) -> None:
    """The prompts of the set can be read. Raises SpecError if not."""
    melbo.check(melbo.parse(params.learned))


def control(params: Params) -> None:
    """Its texts stand beside each other already."""


def canonical(params: Params) -> Params:
    """Every parameter matters."""
    return params


def run(replica: "Replica", rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """Search for each row's text, behind the first prompt that its vectors were learned from.

    Tensors of the outcome, float64: `tokens` (tokens,), the ids of the text, and `history` (steps + 1,), the
    best cosine so far. Table `completions`, split extract: the reply to the bare prompt, the reply under the
    vector, and the reply to prompt and text, the variant `text`.

    Raises:
        ModelError: If there is no chat template, the encoder is absent, or the blocks cannot run alone.
    """
    for index, row in enumerate(rows):
        yield index, _run(replica, row, context)


def _run(replica: "Replica", row: Row, context: Context) -> Outcome:
    from jobs.unsupervised.token_search import TokenSearch, search

    params: Params = row.params
    learned = melbo.parse(params.learned)
    prompt = learned.read_prompts()[0].prompt
    vector_D = context.artifact(requires(params)[0])["vectors"][params.vector]
    before, after = _around(replica, prompt, learned)
    task = TokenSearch(
        replica,
        [*before, *after],
        len(before),
        source=learned.source,
        target=learned.target,
        vector_D=vector_D,
    )
    found = search(
        task,
        tokens=params.tokens,
        steps=params.steps,
        likeliest=params.likeliest,
        candidates=params.candidates,
        seed=row.seed,
    )
    text = replica.decode(found.tokens)
    replies = _replies(replica, [*before, *after], [*before, *found.tokens, *after], vector_D, params)
    if isinstance(replies, str):
        return Outcome(status=Status.FAILED, reason=replies)
    return _outcome(replica, [prompt, prompt, prompt + text], replies, (before, found), params)


def _around(replica: "Replica", prompt: str, learned: melbo.Params) -> tuple[list[int], list[int]]:
    """Token ids of the asked prompt before and behind the place where a text can be put into it."""
    whole = encode_prompt(replica, prompt, learned)
    # One of two words that share no token is no word that the prompt itself ends with.
    behind = min(
        _equal_end(whole, encode_prompt(replica, f"{prompt} {word}", learned)) for word in ("a", "1")
    )
    return whole[: len(whole) - behind], whole[len(whole) - behind :]


def _equal_end(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts have in common at their ends."""
    pairs = zip(reversed(first), reversed(second), strict=False)
    return next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def _replies(
    replica: "Replica", bare: list[int], extended: list[int], vector_D: np.ndarray, params: Params
) -> list[list[int]] | str:
    """Tokens of the three replies, or why they cannot be trusted."""
    from jobs.engine.decoding import Decoding, Work, generate
    from jobs.engine.interventions import Add
    from jobs.engine.tables import row_tables
    from jobs.reading.completions import flaw_of

    tables = row_tables(replica, [[], [Add(layer=melbo.parse(params.learned).source, vector=vector_D)]])
    work = [Work(0, 0), Work(0, 1), Work(1, 0)]
    decoding = Decoding(max_new_tokens=params.max_new_tokens)
    found = dict(generate(replica, [bare, extended], tables, work, decoding))
    if flaw := next(filter(None, map(flaw_of, found.values())), None):
        return flaw
    return [found[number].tokens for number in range(len(work))]


def _outcome(
    replica: "Replica",
    asked: Sequence[str],
    replies: Sequence[list[int]],
    found: "tuple[list[int], Found]",
    params: Params,
) -> Outcome:
    from jobs.reading.rereading import unsteered_nll
    from jobs.scoring.similarity import cosine_similarity, embed

    before, best = found
    texts = [replica.decode(reply) for reply in replies]
    bare, under, extended = embed(texts, params.encoder)
    [nll] = unsteered_nll(replica, [before], [best.tokens])
    metrics = {
        "cosine": best.cosine,
        "cosine_start": best.history[0],
        "text_nll": nll,
        "likeness": float(cosine_similarity(extended[None], under[None])[0, 0]),
        "likeness_unsteered": float(cosine_similarity(bare[None], under[None])[0, 0]),
    }
    completions = [
        {
            "split": "extract",
            "item": number,
            "variant": variant,
            "prompt": prompt,
            "text": text,
            "tokens": len(reply),
        }
        for number, (variant, prompt, text, reply) in enumerate(
            zip((UNSTEERED, f"vector {params.vector}", "text"), asked, texts, replies, strict=True)
        )
    ]
    return Outcome(
        metrics={"extract": metrics},
        tables={"completions": completions},
        tensors={"tokens": np.array(best.tokens, dtype=np.float64), "history": np.array(best.history)},
    )
