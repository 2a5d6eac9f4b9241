"""Generation of many configurations at once against a plain loop: one text, no cache, hooks written out."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from jobs.engine.decoding import Continuation, Decoding, Work, generate
from jobs.engine.groups import next_token
from jobs.engine.interventions import SITES, Add, Clamp, Intervention, ProjectOut, Replace
from jobs.engine.replica import Replica
from jobs.engine.sampling import Sampling, choose
from jobs.engine.tables import row_tables
from jobs.errors import SpecError
from tests.models import ARCHITECTURES, HIDDEN, LAYERS, WINDOW, tiny_replica

TEMPLATE = [30, 31, 32, 33]
PROMPTS = [
    [*TEMPLATE, 40, 41, 42],
    [*TEMPLATE, 50, 51, 52, 53, 54, 55, 56, 57, 58],
    [*TEMPLATE, 60],
    [*TEMPLATE, *range(70, 84)],
    [*TEMPLATE, *range(90, 90 + WINDOW)],
]
REPLICAS: dict[str, Replica] = {}


def replica_of(name: str) -> Replica:
    if name not in REPLICAS:
        REPLICAS[name] = tiny_replica(name)
    return REPLICAS[name]


def vector(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(*shape, HIDDEN))


def plain(
    replica: Replica, prompt: list[int], changes: Sequence[Intervention], max_new_tokens: int
) -> tuple[list[int], dict[Any, int]]:
    """Greedy search that reads the whole text anew for every token, and how often each place was changed."""
    text, fired = list(prompt), {}
    for _ in range(max_new_tokens):
        fired = {(change.layer, change.site): 0 for change in changes}
        with ExitStack() as hooks, torch.inference_mode():
            for change in changes:
                hooks.callback(_attach(replica, change, len(prompt), fired).remove)
            token = int(replica.model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax())
        if token in replica.stop_ids:
            break
        text.append(token)
    return text[len(prompt) :], fired


def _attach(replica: Replica, change: Intervention, prompt: int, fired: dict[Any, int]) -> Any:
    def changed(hidden: torch.Tensor) -> torch.Tensor:
        shape = hidden.shape  # OPT's feed-forward part gives (tokens, hidden)
        hidden = hidden.clone().view(1, -1, HIDDEN)
        for place, at in enumerate(_tokens(change, prompt, hidden.shape[1])):
            fired[change.layer, change.site] += 1
            hidden[0, at] = torch.from_numpy(_one(change, hidden[0, at].numpy(), place)).to(hidden.dtype)
        return hidden.view(shape)

    def on_output(module: Any, inputs: Any, output: Any) -> Any:
        return (changed(output[0]), *output[1:]) if isinstance(output, tuple) else changed(output)

    def on_input(module: Any, inputs: Any, options: Any) -> Any:
        if inputs:
            return (changed(inputs[0]), *inputs[1:]), options
        return inputs, {**options, "hidden_states": changed(options["hidden_states"])}

    block = replica.blocks[change.layer]
    if change.site == "before":
        return block.register_forward_pre_hook(on_input, with_kwargs=True)
    parts = dict(block.named_modules())
    names = {
        "after": [""],
        "attention": ["self_attn", "attn", "attention"],
        "mlp": ["mlp", "fc2"],
    }[change.site]
    [module] = [parts[name] for name in names if name in parts]
    return module.register_forward_hook(on_output)


def _tokens(change: Intervention, prompt: int, length: int) -> list[int]:
    if change.tokens == "all":
        return list(range(length))
    if change.tokens == "prompt":
        return list(range(prompt))
    if change.tokens == "generated":
        return list(range(prompt, length))
    return [at if at >= 0 else prompt + at for at in change.tokens]


def _one(change: Intervention, hidden: np.ndarray, place: int) -> np.ndarray:
    if isinstance(change, (Add, Replace)):
        own = change.vector if change.vector.ndim == 1 else change.vector[place]
        return hidden + own if isinstance(change, Add) else own
    unit = change.direction / np.linalg.norm(change.direction)
    wanted = change.value if isinstance(change, Clamp) else 0.0
    return hidden + (wanted - hidden @ unit) * unit


def changes(seed: int) -> list[Intervention]:
    """One or two random interventions."""
    random = np.random.default_rng(seed)
    found: list[Intervention] = []
    for number in range(int(random.integers(0, 3))):
        where: dict[str, Any] = {
            "layer": int(random.integers(LAYERS)),
            "site": str(random.choice(SITES)),
            "tokens": [("all"), ("prompt"), ("generated"), (0, 2), (-1,), (1, -2)][int(random.integers(6))],
        }
        own = vector(7 * seed + number)
        several = vector(seed, 2) if isinstance(where["tokens"], tuple) and len(where["tokens"]) == 2 else own
        found.append(
            [
                Add(vector=2 * several, **where),
                ProjectOut(direction=own, **where),
                Clamp(direction=own, value=3.0, **where),
                Replace(vector=several, **where),
            ][int(random.integers(4))]
        )
    return found


def completions(
    replica: Replica, rows: Sequence[Sequence[Intervention]], work: Sequence[Work], **decoding: Any
) -> list[Continuation]:
    found = dict(generate(replica, PROMPTS, row_tables(replica, rows), work, Decoding(**decoding)))
    assert sorted(found) == list(range(len(work)))
    return [found[index] for index in range(len(work))]


@pytest.mark.parametrize("name", ARCHITECTURES)
@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])  # shrinking takes minutes and says little
@given(data=st.data())
def test_any_mixture_in_any_order_gives_what_a_plain_loop_gives_alone(name: str, data: st.DataObject) -> None:
    replica = replica_of(name)
    rows = [changes(data.draw(st.integers(0, 10_000), label="row")) for _ in range(4)]
    pairs = [(prompt, row) for prompt in range(len(PROMPTS)) for row in range(len(rows))]
    pairs = data.draw(st.permutations(pairs), label="order")[: data.draw(st.integers(1, 12), label="number")]
    slots = data.draw(st.sampled_from([1, 3, 8, 64]), label="slots")
    work = [Work(prompt, row) for prompt, row in pairs]
    found = completions(replica, rows, work, max_new_tokens=5, slots=slots)
    for (prompt, row), continuation in zip(pairs, found, strict=True):
        tokens, fired = plain(replica, PROMPTS[prompt], rows[row], 5)
        assert continuation.tokens == tokens
        assert continuation.fired == {place: number for place, number in fired.items() if number}
        assert continuation.intended == continuation.fired


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_what_a_row_draws_does_not_depend_on_its_batch_mates(name: str) -> None:
    replica = replica_of(name)
    rows = [changes(seed) for seed in range(3)]
    sampling = Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.2)
    work = [Work(prompt, row, seed=10 * prompt + row) for prompt in range(5) for row in range(3)]
    together = completions(replica, rows, work, max_new_tokens=6, sampling=sampling)
    alone = [
        completions(replica, rows, [each], max_new_tokens=6, sampling=sampling, slots=1)[0] for each in work
    ]
    assert [each.tokens for each in together] == [each.tokens for each in alone]
    other = [each._replace(seed=each.seed + 1) for each in work]
    found = completions(replica, rows, other, max_new_tokens=6, sampling=sampling)
    assert [each.tokens for each in together] != [each.tokens for each in found]


def test_draws_follow_the_probabilities_of_the_likeliest_tokens() -> None:
    logits = torch.tensor([[2.0, 0.5, 1.0, -1.0]], dtype=torch.float64).expand(4000, -1)
    drawn = choose(
        logits,
        Sampling(temperature=2.0, top_p=0.8),
        texts=[[]] * 4000,
        generators=generators(*range(4000)),
    )
    warped = TopPLogitsWarper(top_p=0.8)(torch.tensor([[0]]), logits[:1] / 2)
    expected = warped.softmax(dim=-1)[0]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    assert (shares[expected == 0] == 0).all()
    torch.testing.assert_close(shares.double(), expected, atol=0.03, rtol=0)


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    logits = torch.randn((3, 20), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    texts = [[1, 2, 2], [int(logits[1].argmax())], [5]]
    expected = [
        int(RepetitionPenaltyLogitsProcessor(penalty=3.0)(torch.tensor([text]), row[None]).argmax())
        for text, row in zip(texts, logits, strict=True)
    ]
    before = logits.clone()
    found = choose(logits, Sampling(repetition_penalty=3.0), texts=texts, generators=generators(0, 0, 0))
    assert found == expected
    assert found != logits.argmax(dim=-1).tolist(), "the penalty changes the choice"
    assert torch.equal(logits, before)


def test_a_row_whose_logits_are_not_finite_ends_and_its_batch_mates_go_on() -> None:
    replica = replica_of("llama")
    broken = [Add(layer=1, vector=np.full(HIDDEN, 1e308)), Add(layer=2, vector=np.full(HIDDEN, 1e308))]
    rows: list[list[Intervention]] = [broken, []]
    found = completions(replica, rows, [Work(0, 0), Work(0, 1)], max_new_tokens=4)
    assert (found[0].finite, found[0].tokens) == (False, [])
    assert found[1].finite
    assert found[1].tokens == plain(replica, PROMPTS[0], [], 4)[0]


@pytest.mark.parametrize("slots", [3, 30])
def test_what_is_not_finite_is_gone_when_another_sequence_takes_its_slot(slots: int) -> None:
    replica = replica_of("llama")
    broken = [Add(layer=1, vector=np.full(HIDDEN, 1e308)), Add(layer=2, vector=np.full(HIDDEN, 1e308))]
    rows: list[list[Intervention]] = [[], broken, [Add(layer=0, vector=vector(1))]]
    prompts = [list(range(5, 6 + length)) for length in (30, 4, 12, 1, 25, 3, 18, 2, 9, 21)]
    work = [Work(prompt, row) for prompt in range(len(prompts)) for row in range(len(rows))]
    decoding = Decoding(max_new_tokens=8, slots=slots)
    for index, found in generate(replica, prompts, row_tables(replica, rows), work, decoding):
        prompt, row, _ = work[index]
        assert found.finite == (row != 1)
        assert row == 1 or found.tokens == plain(replica, prompts[prompt], rows[row], 8)[0]


@pytest.mark.parametrize(
    ("prompt", "row", "named"),
    [
        ([5], -1, r"prompt 0 under row -1; there are 1 prompts and 1 rows"),
        ([5], 1, r"prompt 0 under row 1"),
        ([], 0, "prompt 0: the text has no token"),
        ([5, 10**6], 0, "prompt 0: tokens from 5 to 1000000"),
    ],
)
def test_work_that_is_not_there_is_refused(prompt: list[int], row: int, named: str) -> None:
    replica = replica_of("llama")
    with pytest.raises(SpecError, match=named):
        next(
            generate(replica, [prompt], row_tables(replica, [[]]), [Work(0, row)], Decoding(max_new_tokens=1))
        )


def test_a_rotary_embedding_with_factors_for_long_texts_takes_short_ones() -> None:
    replica = tiny_replica("llama")
    replica.model.config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 16}
    with pytest.raises(SpecError, match="context of 16"):
        replica.check_text([5] * 17)


def test_a_temperature_close_to_0_draws_the_likeliest_token() -> None:
    logits_SV = torch.tensor([[1.0, 3.0, 2.0], [-5.0, -6.0, -float("inf")]])
    for temperature in (1e-310, 1e-5):
        tokens = choose(
            logits_SV, Sampling(temperature=temperature), texts=[[], []], generators=generators(0, 1)
        )
        assert tokens == [1, 0]


@pytest.mark.parametrize("name", ["temperature", "top_p", "repetition_penalty"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_sampling_takes_what_has_a_meaning(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Sampling(**{name: value})


@pytest.mark.parametrize("tokens", [(7,), (-8,), (0, -7)])
def test_a_position_that_a_prompt_has_not_is_refused_before_anything_runs(tokens: tuple[int, ...]) -> None:
    replica = replica_of("llama")
    rows = [[], [Add(layer=0, vector=vector(0), tokens=tokens)]]
    tables = row_tables(replica, rows)
    with pytest.raises(SpecError, match="row 1: positions"):
        next(generate(replica, PROMPTS[:1], tables, [Work(0, 0), Work(0, 1)], Decoding(max_new_tokens=1)))


def test_a_text_longer_than_the_context_is_refused_before_anything_runs() -> None:
    replica = replica_of("llama")
    long = [list(range(5, 69)) * 8]
    assert replica.context == len(long[0])
    tables = row_tables(replica, [[]])
    replica.model.config.max_position_embeddings -= 4
    try:
        with pytest.raises(SpecError, match=r"prompt 0: .*513 tokens.*context of 508"):
            next(generate(replica, long, tables, [Work(0, 0)], Decoding(max_new_tokens=1)))
        with pytest.raises(SpecError, match=r"prompt 0: .*512 tokens"):
            next(next_token(replica, long, tables, [(0, 0)]))
    finally:
        replica.model.config.max_position_embeddings += 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (Add(layer=LAYERS, vector=vector(0)), f"layer {LAYERS} does not exist"),
        (Add(layer=0, vector=vector(0)[:-1]), f"shape \\({HIDDEN - 1},\\)"),
        (Add(layer=0, vector=vector(0) * np.nan), "NaN"),
        (Add(layer=0, vector=vector(0), site="middle"), "'middle'.*'before'"),  # type: ignore[arg-type]
        (Add(layer=0, vector=vector(0, 2)), "shape \\(2, "),
        (Add(layer=0, vector=vector(0), tokens=(1, 1)), "distinct positions"),
        (ProjectOut(layer=0, direction=np.zeros(HIDDEN)), "points nowhere"),
        (Add(layer=0, vector=[1.0] * HIDDEN), "is a list"),  # type: ignore[arg-type]
        (Add(layer=0, vector=vector(0) * 1j), "complex128 array"),
        (Add(layer=1.0, vector=vector(0)), "layer 1.0"),  # type: ignore[arg-type]
        (Add(layer=0, vector=vector(0), tokens=(1.5,)), "distinct positions"),  # type: ignore[arg-type]
        (Clamp(layer=0, direction=vector(0), value=float("inf")), "value=inf"),
    ],
)
def test_an_intervention_that_cannot_be_meant_names_its_row(change: Intervention, named: str) -> None:
    with pytest.raises(SpecError, match=f"row 1: .*{named}"):
        row_tables(replica_of("llama"), [[], [change]])


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_the_length_of_a_direction_does_not_matter(size: float) -> None:
    replica = replica_of("llama")
    rows: list[list[Intervention]] = [
        [ProjectOut(layer=1, direction=factor * vector(0))] for factor in (1.0, size)
    ]
    one, other = (
        logits
        for _, logits in sorted(next_token(replica, PROMPTS[:1], row_tables(replica, rows), [(0, 0), (0, 1)]))
    )
    torch.testing.assert_close(one, other)
