"""Captured states against transformers' own and plain hooks on lone texts; the job; and what is stored."""

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jobs.engine.capture import GENERATED, Captured, Point, Wanted, capture
from jobs.engine.decoding import Decoding, Work, generate
from jobs.engine.interventions import SITES, Add, Intervention, Replace
from jobs.engine.positions import every_token, find_tokens, from_end
from jobs.engine.replica import Replica
from jobs.engine.sampling import Sampling
from jobs.engine.sites import Place
from jobs.engine.tables import Steering, row_tables
from jobs.errors import ModelError, OutOfMemory, SpecError
from jobs.resolve import load_job, make_params
from jobs.spec import Context, Outcome, Requirement, Status
from orchestrator.pool import Delivery, Order, OrderRow
from orchestrator.worker import Worker
from search_spaces.base import Grid, Objective
from storage.durable import StoreError
from storage.query import open_sweep
from storage.store import Store
from tests import fake_job
from tests.fakes import MODEL, InlinePool
from tests.models import (
    ARCHITECTURES,
    HIDDEN,
    LAYERS,
    WINDOW,
    Artifacts,
    tiny_model,
    tiny_replica,
    tiny_tokenizer,
)
from tests.sweeps import drive, make_space

PROMPTS = [
    [40, 41, 42],
    [50, 51, 52, 53, 54, 55, 56, 57, 58],
    [60],
    list(range(70, 84)),
    list(range(90, 90 + WINDOW)),
]
ALL_LAYERS = range(LAYERS)
ALL_PLACES = [Place(layer, site) for layer in ALL_LAYERS for site in SITES]
PARTS = {"attention": ("self_attn", "attn", "attention"), "mlp": ("mlp", "fc2")}


@pytest.fixture(params=ARCHITECTURES)
def replica(request: pytest.FixtureRequest) -> Replica:
    return tiny_replica(request.param)


def vector(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=HIDDEN)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Some architectures norm and route in float32 whatever their weights are."""
    tolerance = 1e-6 if expected.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def captured(
    replica: Replica,
    wanted: Wanted,
    rows: Sequence[Sequence[Intervention]] = ((),),
    *,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    seed: int = 0,
) -> list[Captured]:
    """Every prompt under the row of its number, or under the only one."""
    work = [Work(prompt, prompt % len(rows), seed) for prompt in range(len(prompts))]
    found = list(capture(replica, prompts, row_tables(replica, rows), work, wanted))
    assert sorted(index for index, _ in found) == list(range(len(work)))
    return [each for _, each in sorted(found, key=lambda pair: pair[0])]


@contextmanager
def plain_hooks(replica: Replica, additions: Sequence[Add], prompt: int) -> Iterator[dict[Place, Any]]:
    """A plain addition to block outputs, and after it plain hooks that keep the state at every place."""
    states: dict[Place, Any] = {}

    def adding(change: Add) -> Any:
        def add(module: Any, inputs: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            first = prompt if change.tokens == "generated" else 0
            hidden[:, first:] += torch.from_numpy(change.vector).to(hidden.dtype)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return add

    def keeping(place: Place) -> Any:
        def keep(module: Any, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            states[place] = hidden.reshape(-1, HIDDEN).clone()

        return keep

    def keeping_input(place: Place) -> Any:
        def keep(module: Any, inputs: Any, options: Any) -> None:
            states[place] = (inputs[0] if inputs else options["hidden_states"])[0].clone()

        return keep

    with ExitStack() as hooks:
        for change in additions:
            hooks.callback(replica.blocks[change.layer].register_forward_hook(adding(change)).remove)
        for place in ALL_PLACES:
            block = replica.blocks[place.layer]
            if place.site == "before":
                handle = block.register_forward_pre_hook(keeping_input(place), with_kwargs=True)
            else:
                names = PARTS.get(place.site, ("",))
                [module] = [part for name, part in block.named_modules() if name in names]
                handle = module.register_forward_hook(keeping(place))
            hooks.callback(handle.remove)
        yield states


@torch.inference_mode()
def alone(
    replica: Replica, text: Sequence[int], additions: Sequence[Add] = (), *, prompt: int = 0
) -> tuple[dict[Place, torch.Tensor], int]:
    """States of shape (T, D) of an unpadded text at every place, and the likeliest next token."""
    with plain_hooks(replica, additions, prompt or len(text)) as states:
        logits = replica.model(torch.tensor([list(text)]), use_cache=False).logits
    return states, int(logits[0, -1].argmax())


class TestPrompts:
    @pytest.mark.parametrize("name", ARCHITECTURES)
    @pytest.mark.parametrize("token_budget", [16, 8192])
    def test_states_before_and_after_blocks_are_transformers_own_of_each_prompt_alone(
        self, name: str, token_budget: int
    ) -> None:
        replica = tiny_replica(name)
        replica.token_budget = token_budget
        wanted = Wanted(layers=ALL_LAYERS, sites=("before", "after"), positions=every_token(PROMPTS))
        found = captured(replica, wanted)
        # transformers gives the last block's output only after the final norm, hence a model one block deeper
        deeper = tiny_model(name, layers=LAYERS + 1)
        for prompt, each in zip(PROMPTS, found, strict=True):
            with torch.inference_mode():
                states = deeper(torch.tensor([prompt]), output_hidden_states=True).hidden_states
            assert each.points == [Point("all", at, None) for at in range(len(prompt))]
            for layer in ALL_LAYERS:
                assert_close(each.states[Place(layer, "before")], states[layer][0])
                assert_close(each.states[Place(layer, "after")], states[layer + 1][0])

    @pytest.mark.parametrize("token_budget", [1, 40])
    def test_every_site_is_what_a_plain_hook_sees_on_the_prompt_alone(
        self, replica: Replica, token_budget: int
    ) -> None:
        replica.token_budget = token_budget
        found = captured(replica, Wanted(layers=ALL_LAYERS, sites=SITES, positions=from_end(PROMPTS, [1])))
        for prompt, each in zip(PROMPTS, found, strict=True):
            expected, _ = alone(replica, prompt)
            assert each.points == [Point("-1", len(prompt) - 1, None)]
            assert each.states.keys() == expected.keys()
            for place, states in expected.items():
                assert_close(each.states[place], states[-1:])

    def test_a_steered_capture_is_a_plain_hook_on_top_of_a_plain_addition(self, replica: Replica) -> None:
        replica.token_budget = 30
        rows = [
            [],
            [Add(layer=1, vector=vector(1))],
            [Add(layer=0, vector=vector(2)), Add(layer=2, vector=vector(3))],
        ]
        found = captured(
            replica, Wanted(layers=ALL_LAYERS, sites=SITES, positions=every_token(PROMPTS)), rows
        )
        for number, (prompt, each) in enumerate(zip(PROMPTS, found, strict=True)):
            expected, _ = alone(replica, prompt, rows[number % 3])
            for place, states in expected.items():
                assert_close(each.states[place], states)

    def test_named_spans_come_in_their_own_order_for_the_layers_and_sites_asked_for(self) -> None:
        replica = tiny_replica("llama")
        positions = [{"ends": [-1, 0], "first": [0]} for _ in PROMPTS]
        found = captured(replica, Wanted(layers=[2, 0], sites=["mlp"], positions=positions))
        for prompt, each in zip(PROMPTS, found, strict=True):
            last = len(prompt) - 1
            assert each.points == [Point("ends", last, None), Point("ends", 0, None), Point("first", 0, None)]
            assert list(each.states) == [(2, "mlp"), (0, "mlp")]
            expected, _ = alone(replica, prompt)
            for place, states in each.states.items():
                assert_close(states, expected[place][[last, 0, 0]])

    @pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
    def test_a_mean_is_that_of_the_states_of_each_name(self, name: str) -> None:
        replica = tiny_replica(name)
        positions = [
            {"all": range(len(prompt)), "last two": range(-min(2, len(prompt)), 0)} for prompt in PROMPTS
        ]
        found = captured(replica, Wanted(layers=[1], sites=SITES, positions=positions, mean=True))
        for prompt, each in zip(PROMPTS, found, strict=True):
            assert each.points == [Point("all", None, None), Point("last two", None, None)]
            expected, _ = alone(replica, prompt)
            for place, states in each.states.items():
                means = [expected[place].mean(dim=0), expected[place][-2:].mean(dim=0)]
                assert_close(states, torch.stack(means))

    def test_a_row_of_nan_spoils_no_other_rows_mean(self) -> None:
        replica = tiny_replica("llama")
        rows = [[Add(layer=0, vector=np.full(HIDDEN, 1e300))], []]
        wanted = Wanted(layers=[2], positions=every_token(PROMPTS), mean=True)
        found = captured(replica, wanted, rows)
        finite = [bool(each.states[Place(2, "after")].isfinite().all()) for each in found]
        assert finite == [False, True, False, True, False]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_floats_are_widened_to_float32_without_a_change(self, dtype: torch.dtype) -> None:
        replica = Replica(tiny_model("llama").to(dtype), tiny_tokenizer())
        [each] = captured(
            replica, Wanted(layers=[1], positions=every_token([[5, 6, 7]])), prompts=[[5, 6, 7]]
        )
        expected = alone(replica, [5, 6, 7])[0][Place(1, "after")]
        assert expected.dtype == dtype
        assert each.states[Place(1, "after")].dtype == torch.float32
        # on the way out nothing is rounded; in the pass a mask may choose another kernel
        torch.testing.assert_close(
            each.states[Place(1, "after")], expected.float(), atol=torch.finfo(dtype).eps * 16, rtol=0
        )
        assert torch.equal(each.states[Place(1, "after")].to(dtype).float(), each.states[Place(1, "after")])


class TestGenerated:
    def test_states_and_tokens_are_those_of_a_plain_loop_that_reads_the_text_anew(
        self, replica: Replica
    ) -> None:
        steps = 4
        rows: list[list[Add]] = [
            [],
            [Add(layer=1, vector=3 * vector(1))],
            [Add(layer=0, vector=3 * vector(2), tokens="generated")],
        ]
        replica.token_budget = 40
        wanted = Wanted(
            layers=ALL_LAYERS,
            sites=SITES,
            positions=from_end(PROMPTS, [1]),
            decoding=Decoding(max_new_tokens=steps, stops=False),
        )
        for number, each in enumerate(captured(replica, wanted, rows)):
            text = list(PROMPTS[number])
            last = len(text) - 1
            generated = [Point(GENERATED, last + step, step) for step in range(steps)]
            assert each.points == [Point("-1", last, None), *generated]
            for step in range(steps):
                expected, token = alone(replica, text, rows[number % 3], prompt=last + 1)
                assert each.completion[step] == token
                for place, states in expected.items():
                    assert_close(each.states[place][1 + step], states[-1])
                text.append(token)

    def test_sampled_completions_are_the_engines_own_and_a_mean_is_over_their_steps(self) -> None:
        replica = tiny_replica("qwen3")
        decoding = Decoding(max_new_tokens=6, sampling=Sampling(temperature=1.0))
        rows = [[Add(layer=1, vector=vector(1))]]
        tables = row_tables(replica, rows)
        work = [Work(prompt, 0, 7) for prompt in range(len(PROMPTS))]
        tokens = dict(generate(replica, PROMPTS, tables, work, decoding))
        found = captured(replica, Wanted(layers=[3], decoding=decoding, mean=True), rows, seed=7)
        for index, each in enumerate(found):
            prompt, new = PROMPTS[index], tokens[index].tokens
            assert each.completion == new
            expected, _ = alone(replica, [*prompt, *new[:-1]], rows[0])
            after = expected[Place(3, "after")][len(prompt) - 1 :]
            assert_close(each.states[Place(3, "after")][0], after.mean(dim=0))

    @pytest.mark.parametrize("mean", [False, True])
    def test_an_empty_completion_has_no_states(self, mean: bool) -> None:
        replica = tiny_replica("llama")
        first = [alone(replica, prompt)[1] for prompt in PROMPTS]
        replica.model.generation_config.eos_token_id = first
        decoding = Decoding(max_new_tokens=3)
        for each in captured(replica, Wanted(layers=[0], decoding=decoding, mean=mean)):
            assert each.completion == each.points == []
            assert each.states[Place(0, "after")].shape == (0, HIDDEN)


class TestMemory:
    def test_states_come_batch_by_batch_and_a_batch_hands_over_no_more_than_the_replica_may_keep(
        self,
    ) -> None:
        replica = tiny_replica("llama")
        prompts = [list(range(10, 18))] * 40
        replica.memory = 6 * 8 * LAYERS * HIDDEN * 8
        passes = 0

        def count(*_: Any) -> None:
            nonlocal passes
            passes += 1

        handle = replica.blocks[0].register_forward_pre_hook(count)
        wanted = Wanted(layers=ALL_LAYERS, positions=every_token(prompts))
        work = [Work(prompt, 0) for prompt in range(len(prompts))]
        held: dict[int, int] = {}
        for seen, (_, each) in enumerate(capture(replica, prompts, row_tables(replica, [[]]), work, wanted)):
            held[passes] = held.get(passes, 0) + sum(states.nbytes for states in each.states.values())
            assert seen < 6 * passes, "a pass has run whose states nobody has taken yet"
        handle.remove()
        assert max(held.values()) <= replica.memory
        assert 7 <= len(held) <= 10

    def test_where_memory_runs_out_batches_are_halved_and_every_state_comes_once(self) -> None:
        replica = tiny_replica("llama")
        wanted = Wanted(layers=[1], positions=every_token(PROMPTS))
        expected = captured(replica, wanted)

        def refuse(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            if len(inputs[0]) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")

        handle = replica.blocks[0].register_forward_pre_hook(refuse)
        replica.token_budget = 64
        found = captured(replica, wanted)
        handle.remove()
        assert replica.token_budget < 64
        for each, before in zip(found, expected, strict=True):
            assert_close(each.states[Place(1, "after")], before.states[Place(1, "after")])

    def test_a_text_that_does_not_fit_alone_says_so(self) -> None:
        replica = tiny_replica("llama")

        def refuse(*_: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        handle = replica.blocks[0].register_forward_pre_hook(refuse)
        with pytest.raises(OutOfMemory, match="single row"):
            captured(replica, Wanted(layers=[1], positions=every_token(PROMPTS)))
        handle.remove()


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"layers": [0, LAYERS]}, rf"layers \[{LAYERS}\] do not exist; the model has 0 to {LAYERS - 1}"),
            ({"layers": [-1]}, r"layers \[-1\] do not exist"),
            ({"layers": [1, 1]}, "each once"),
            ({"layers": []}, "at least one"),
            ({"sites": ["after", "norm"]}, r"sites \['norm'\] do not exist; there are \['before', 'after'"),
            ({"positions": from_end(PROMPTS, [1, 2])}, r"prompt 2: '-2' names the positions \[-2\].*-1 to 0"),
            ({"positions": [{"span": [3]}] * 5}, r"prompt 0: 'span' names the positions \[3\].*-3 to 2"),
            ({"positions": [{"span": [0]}, {"span": []}] * 2 + [{}]}, "prompt 1: 'span' names no token"),
            ({"positions": every_token(PROMPTS[:4])}, "positions of 4 prompts; 5 were given"),
            (
                {"positions": [{"generated": [0]}] * 5, "decoding": Decoding(max_new_tokens=1)},
                "prompt 0: 'generated' names what is generated",
            ),
        ],
    )
    def test_what_does_not_exist_is_refused_before_any_pass(self, change: Any, message: str) -> None:
        replica = tiny_replica("llama")
        replica.blocks[0].register_forward_pre_hook(lambda *_: pytest.fail("a pass has run"))
        wanted: Any = {"layers": [0], "positions": every_token(PROMPTS), **change}
        work = [Work(prompt, 0) for prompt in range(len(PROMPTS))]
        with pytest.raises(SpecError, match=message):
            capture(replica, PROMPTS, row_tables(replica, [[]]), work, Wanted(**wanted))

    def test_a_position_of_the_steering_that_a_prompt_has_not_is_refused_before_any_pass(self) -> None:
        replica = tiny_replica("llama")
        tables = row_tables(replica, [[Add(layer=0, vector=vector(0), tokens=(-2,))]])
        with pytest.raises(SpecError, match=r"row 0: positions \[-2\]"):
            capture(
                replica, PROMPTS, tables, [Work(2, 0)], Wanted(layers=[0], positions=every_token(PROMPTS))
            )

    def test_no_hook_outlives_a_capture_that_is_given_up(self) -> None:
        replica = tiny_replica("llama")
        before = replica.logits(PROMPTS, keep=1)
        replica.token_budget = 1
        tables = row_tables(replica, [[Add(layer=0, vector=vector(0))]])
        wanted = Wanted(layers=[0], sites=SITES, positions=every_token(PROMPTS))
        found = capture(replica, PROMPTS, tables, [Work(1, 0), Work(2, 0)], wanted)
        next(found)
        found.close()
        assert torch.equal(replica.logits(PROMPTS, keep=1), before)
        assert not any(block._forward_pre_hooks for block in replica.blocks)


class TestFindTokens:
    REPLICA = tiny_replica("llama")

    @given(before=st.text(max_size=6), part=st.text(min_size=1, max_size=4), after=st.text(max_size=6))
    def test_the_tokens_found_hold_the_part_and_no_fewer_do(self, before: str, part: str, after: str) -> None:
        text = f"{before}{part}{after}"
        if text.find(part) != text.rfind(part):
            return
        try:
            text.encode()
        except UnicodeEncodeError:
            return
        ids = self.REPLICA.encode(text)
        found = find_tokens(self.REPLICA, text, part)
        assert found == list(range(found[0], found[-1] + 1))
        decode = self.REPLICA.tokenizer.decode
        assert part in decode(ids[found[0] : found[-1] + 1])
        for fewer in (found[1:], found[:-1]):
            assert part not in decode([ids[at] for at in fewer])

    def test_a_word_of_several_characters_in_one_token_is_that_token(self) -> None:
        text = "It is wonderful today."
        words = [self.REPLICA.tokenizer.decode([token]) for token in self.REPLICA.encode(text)]
        [only] = find_tokens(self.REPLICA, text, "wonderful")
        assert words[only] == " wonderful"

    @pytest.mark.parametrize("part", ["zebra", "o", ""])
    def test_a_part_that_does_not_stand_there_once_is_refused(self, part: str) -> None:
        with pytest.raises(SpecError, match=f"'{part}' has to stand once in 'too good'"):
            find_tokens(self.REPLICA, "too good", part)

    def test_a_tokenizer_without_offsets_is_refused(self) -> None:
        class Slow:
            is_fast = False

        with pytest.raises(ModelError, match="Slow does not tell where"):
            find_tokens(Replica(tiny_model("llama"), Slow()), "a", "a")


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """Three open prompts and three contrast pairs, as parameters of the job."""
    prompts = [("select", "Hello."), ("report", "Why is it so?"), ("select", "Tell me.")]
    pairs = [("Good day.", "Bad."), ("Warm sun.", "Cold rain."), ("I won.", "I lost.")]
    files = {
        "data": [{"split": split, "prompt": prompt} for split, prompt in prompts],
        "pairs": [{"positive": positive, "negative": negative} for positive, negative in pairs],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(tmp_path / f"{name}.jsonl") for name in files}


def params_of(values: Mapping[str, Any]) -> Any:
    return load_job("jobs.capture").canonical(make_params("jobs.capture", values))


def rows_written(context: Artifacts, table: str) -> list[dict[str, Any]]:
    """Rows of a table that a job has written, whatever the chunks, with the row of the pack as `row`."""
    found = []
    for row, name, chunk in context.written:
        if name == table:
            length = next(len(each) for each in chunk.values() if isinstance(each, (list, np.ndarray)))
            for at in range(length):
                cells = {
                    column: values[at] if isinstance(values, (list, np.ndarray)) else values
                    for column, values in chunk.items()
                }
                found.append({"row": row, **cells})
    return found


def assert_kept(vectors: np.ndarray, expected: torch.Tensor) -> None:
    """States as they are kept, to the precision of a half."""
    assert vectors.dtype == np.float16
    np.testing.assert_allclose(vectors.astype(np.float64), expected.numpy(), rtol=2e-3, atol=1e-4)


class TestJob:
    def run(self, values: Mapping[str, Any], *others: Mapping[str, Any]) -> tuple[Artifacts, list[Outcome]]:
        context = Artifacts(tiny_replica("llama"))
        return context, context.run("jobs.capture", [params_of(values), *map(params_of, others)])

    def test_the_last_token_of_each_prompt_in_chat_form_at_every_layer_is_what_it_writes_by_default(
        self, data: dict[str, str]
    ) -> None:
        context, [outcome] = self.run(data)
        texts = ["Hello.", "Why is it so?", "Tell me."]
        rows = rows_written(context, "activations")
        assert {(row["item"], row["layer"]) for row in rows} == {(i, j) for i in range(3) for j in ALL_LAYERS}
        assert len(rows) == 3 * LAYERS
        norms: dict[str, list[float]] = {"select": [], "report": []}
        for row in rows:
            ids = context.replica.encode_chat(texts[row["item"]])
            expected = alone(context.replica, ids)[0][Place(row["layer"], "after")][-1]
            assert_kept(row["vector"], expected)
            assert (row["name"], row["position"], row["step"]) == ("-1", len(ids) - 1, None)
            assert (row["site"], row["label"]) == ("after", None)
            assert row["split"] == ("report" if row["item"] == 1 else "select")
            norms[row["split"]].append(float(expected.norm()))
        for split, expected_norms in norms.items():
            assert outcome.metrics[split] == pytest.approx(
                {"vectors": len(expected_norms), "norm": np.mean(expected_norms)}
            )
        [item] = [
            row
            for row in rows_written(context, "items")
            if row["item"] == 1 and row["name"] == "norm_after_2"
        ]
        assert item["prompt"] == texts[1]
        ids = context.replica.encode_chat(texts[1])
        assert item["value"] == pytest.approx(
            float(alone(context.replica, ids)[0][Place(2, "after")][-1].norm())
        )

    def test_both_texts_of_a_pair_are_read_raw_and_labelled(self, data: dict[str, str]) -> None:
        context, [outcome] = self.run(
            {"source": "pairs", "data": data["pairs"], "count": 2, "capture_layers": [1], "offsets": "all"}
        )
        rows = rows_written(context, "activations")
        texts = {
            (0, "positive"): "Good day.",
            (0, "negative"): "Bad.",
            (1, "positive"): "Warm sun.",
            (1, "negative"): "Cold rain.",
        }
        for (item, label), text in texts.items():
            own = [row for row in rows if (row["item"], row["label"]) == (item, label)]
            expected = alone(context.replica, context.replica.encode(text))[0][Place(1, "after")]
            assert [row["position"] for row in own] == list(range(len(expected)))
            assert_kept(np.stack([row["vector"] for row in own]), expected)
        assert outcome.metrics.keys() == {"select"}
        lengths = [len(context.replica.encode(text)) for text in texts.values()]
        assert outcome.metrics["select"]["vectors"] == len(rows) == sum(lengths)

    def test_steered_rows_of_a_pack_each_have_their_own_states_and_completions(
        self, data: dict[str, str]
    ) -> None:
        common = {
            **data,
            "capture_layers": [0, 2],
            "capture_sites": ["after", "mlp"],
            "offsets": [],
            "max_new_tokens": 3,
        }
        steered = {**common, "layer": 1, "dose": 4.0}
        context, outcomes = self.run(common, steered)
        extraction = Requirement(
            job="jobs.extract", params=make_params("jobs.extract", {"pairs": data["pairs"]})
        )
        found = context.artifact(extraction)
        added = Add(layer=1, vector=found["directions"][1] * 4.0 * float(found["residual_norms"][1]))
        rows = rows_written(context, "activations")
        texts = {(row["row"], row["item"]): row["text"] for row in rows_written(context, "completions")}
        assert len(texts) == 6
        assert texts[0, 0] != texts[1, 0]
        for number, additions in enumerate([[], [added]]):
            text = context.replica.encode_chat("Tell me.")
            prompt, completion = len(text), []
            for step in range(3):
                expected, token = alone(context.replica, text, additions, prompt=prompt)
                for layer, site in ((0, "after"), (2, "mlp")):
                    [row] = [
                        row
                        for row in rows
                        if (row["row"], row["item"], row["step"], row["layer"], row["site"])
                        == (number, 2, step, layer, site)
                    ]
                    assert (row["name"], row["position"]) == (GENERATED, prompt - 1 + step)
                    assert_kept(row["vector"], expected[Place(layer, site)][-1])
                text.append(token)
                completion.append(token)
            assert texts[number, 2] == context.replica.decode(completion)
        assert [outcome.metrics["select"]["vectors"] for outcome in outcomes] == [2 * 3 * 4] * 2

    def test_a_mean_is_one_vector_a_prompt(self, data: dict[str, str]) -> None:
        context, _ = self.run({**data, "capture_layers": [3], "offsets": "all", "mean": True, "chat": False})
        rows = rows_written(context, "activations")
        assert [(row["name"], row["position"]) for row in rows] == [("all", None)] * 3
        for row in rows:
            ids = context.replica.encode(["Hello.", "Why is it so?", "Tell me."][row["item"]])
            expected = alone(context.replica, ids)[0][Place(3, "after")].mean(dim=0)
            assert_kept(row["vector"], expected)

    @pytest.mark.parametrize("chat", [True, False])
    def test_a_span_is_captured_under_the_name_of_its_column(self, tmp_path: Path, chat: bool) -> None:
        path = tmp_path / "named.jsonl"
        rows = [("Is the sky blue?", "sky"), ("Why do cats purr?", "cats purr")]
        path.write_text(
            "".join(
                json.dumps({"split": "select", "prompt": prompt, "subject": subject}) + "\n"
                for prompt, subject in rows
            )
        )
        values = {"data": str(path), "capture_layers": [2], "offsets": [], "spans": ["subject"], "chat": chat}
        load_job("jobs.capture").check(params_of(values))
        context, _ = self.run(values)
        found = rows_written(context, "activations")
        for item, (prompt, subject) in enumerate(rows):
            own = [row for row in found if row["item"] == item]
            ids = context.replica.encode_chat(prompt) if chat else context.replica.encode(prompt)
            positions = [row["position"] for row in own]
            assert positions == list(range(positions[0], positions[-1] + 1))
            said = context.replica.tokenizer.decode([ids[at] for at in positions])
            assert subject in said
            assert len(said.strip()) == len(subject)
            assert {row["name"] for row in own} == {"subject"}
            expected = alone(context.replica, ids)[0][Place(2, "after")][positions]
            assert_kept(np.stack([row["vector"] for row in own]), expected)

    def test_a_span_that_does_not_stand_once_in_its_prompt_is_refused_before_anything_runs(
        self, data: dict[str, str], tmp_path: Path
    ) -> None:
        path = tmp_path / "twice.jsonl"
        path.write_text('{"split": "select", "prompt": "Row, row your boat.", "subject": "ow"}\n')
        check = load_job("jobs.capture").check
        with pytest.raises(SpecError, match=r"row 0 from 0: 'subject' is 'ow', which has to stand once"):
            check(params_of({"data": str(path), "spans": ["subject"]}))
        with pytest.raises(SpecError, match="'subject' is absent"):
            check(params_of({**data, "spans": ["subject"]}))
        with pytest.raises(SpecError, match="name no parts"):
            check(params_of({"source": "pairs", "data": data["pairs"], "spans": ["subject"]}))

    def test_states_under_any_steering_are_those_of_the_engine(self, data: dict[str, str]) -> None:
        steering = {"layer": 1, "layers": [2], "multiplier": 3.0, "operation": "replace", "tokens": "last"}
        context, _ = self.run({**data, "capture_layers": [3], **steering})
        extraction = make_params("jobs.extract", {"pairs": data["pairs"]})
        directions = context.artifact(Requirement(job="jobs.extract", params=extraction))["directions"]
        rows = [[Replace(layer=layer, tokens=(-1,), vector=3.0 * directions[layer]) for layer in (1, 2)]]
        prompts = [context.replica.encode_chat(text) for text in ("Hello.", "Why is it so?", "Tell me.")]
        wanted = Wanted(layers=[3], positions=from_end(prompts, [1]))
        for item, found in enumerate(captured(context.replica, wanted, rows, prompts=prompts)):
            [row] = [row for row in rows_written(context, "activations") if row["item"] == item]
            assert_kept(row["vector"][None], found.states[Place(3, "after")])

    def test_states_too_large_for_a_half_are_kept_in_float32(
        self, data: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        large = np.full(HIDDEN, 1e5)
        monkeypatch.setattr(
            "jobs.capture.interventions",
            lambda context, params, extraction: [] if params.is_unsteered else [Add(layer=1, vector=large)],
        )
        common = {**data, "capture_layers": [1]}
        context, _ = self.run(common, {**common, "layer": 1, "dose": 1.0})
        dtypes = {(row["row"], row["vector"].dtype) for row in rows_written(context, "activations")}
        assert dtypes == {(0, np.dtype("float16")), (1, np.dtype("float32"))}
        exact, _ = self.run({**common, "stored_as": "float32"})
        assert {row["vector"].dtype for row in rows_written(exact, "activations")} == {np.dtype("float32")}

    @pytest.mark.parametrize("offsets", [[1], []])
    def test_a_row_whose_states_are_not_finite_fails_alone(
        self, data: dict[str, str], offsets: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        common = {**data, "capture_layers": [3], "offsets": offsets, "max_new_tokens": 2}
        largest = np.full(HIDDEN, np.finfo(np.float64).max)

        def overflowing(context: Any, params: Any, extraction: Any) -> list[Add]:
            return [] if params.is_unsteered else [Add(layer=1, vector=largest)] * 2

        monkeypatch.setattr("jobs.capture.interventions", overflowing)
        _, outcomes = self.run(common, {**common, "layer": 1, "dose": 1.0})
        assert [outcome.status for outcome in outcomes] == [Status.COMPLETED, Status.FAILED]
        assert "not finite" in str(outcomes[1].reason)

    def test_a_row_whose_steering_did_not_act_fails(
        self, data: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Silent(Steering):
            def counts(self) -> list[dict[Place, int]]:
                return [{} for _ in super().counts()]

        monkeypatch.setattr("jobs.engine.capture.Steering", Silent)
        _, [outcome] = self.run({**data, "layer": 1, "dose": 1.0})
        assert outcome.status is Status.FAILED
        assert "did not act as it was to: at layer 1" in str(outcome.reason)

    def test_what_was_written_waits_nowhere(self, data: dict[str, str]) -> None:
        context = Artifacts(tiny_replica("llama"))
        context.replica.token_budget = 1
        reads: list[int] = []
        context.replica.blocks[0].register_forward_pre_hook(lambda *_: reads.append(len(context.written)))
        context.run("jobs.capture", [params_of({**data, "capture_layers": [0]})])
        assert reads == [0, 2, 4]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"capture_layers": []}, "capture nothing"),
            ({"capture_sites": []}, "capture nothing"),
            ({"offsets": []}, "capture nothing"),
            ({"capture_layers": [1, 1]}, r"capture_layers=\(1, 1\); each once"),
            ({"capture_layers": [-1]}, "layers are counted from 0"),
            ({"capture_layers": "some"}, "capture_layers='some'; it takes a list"),
            ({"capture_layers": [1.5]}, r"capture_layers=\[1.5\]; it takes a list"),
            ({"capture_sites": ["norm"]}, r"capture_sites=\['norm'\]; it takes .*'attention'"),
            ({"offsets": [0]}, "counted from the end"),
            ({"max_new_tokens": -1}, "max_new_tokens=-1; it takes 0 or more"),
            ({"dose": math.nan}, "finite"),
            ({"dose": 1.0, "multiplier": 1.0}, "give one of them"),
            ({"operation": "clamp"}, "give one of them"),
            ({"spans": ["prompt"]}, "have another meaning"),
        ],
    )
    def test_parameters_that_cannot_be_are_refused(self, change: Mapping[str, Any], message: str) -> None:
        with pytest.raises(SpecError, match=message):
            make_params("jobs.capture", change)

    def test_data_that_cannot_be_used_is_refused_before_anything_runs(
        self, data: dict[str, str], tmp_path: Path
    ) -> None:
        check = load_job("jobs.capture").check
        check(params_of({**data, "count": 3}))
        with pytest.raises(SpecError, match=r"3 prompts; count=4 are asked for"):
            check(params_of({**data, "count": 4}))
        with pytest.raises(SpecError, match=r"3 pairs; count=4 are asked for"):
            check(params_of({"source": "pairs", "data": data["pairs"], "count": 4}))
        wrong = tmp_path / "wrong.jsonl"
        wrong.write_text('{"split": "test", "prompt": "Hello."}\n')
        with pytest.raises(SpecError, match=r"row 0 \(from 0\): split='test'; it takes one of \['extract',"):
            check(params_of({"data": str(wrong)}))

    def test_equal_work_has_equal_parameters_and_a_layer_that_is_not_there_is_refused(
        self, data: dict[str, str]
    ) -> None:
        assert params_of({"layer": 3, "pairs": "formality_pairs"}) == params_of({})
        assert params_of({"source": "pairs", "chat": True}) == params_of({"source": "pairs", "chat": False})
        assert params_of({"layer": 3, "dose": 1.0}) != params_of({"layer": 2, "dose": 1.0})
        with pytest.raises(SpecError, match=rf"layers \[9\] do not exist; the model has 0 to {LAYERS - 1}"):
            self.run({**data, "capture_layers": [9]})


def order(values: Sequence[Mapping[str, Any]]) -> Order:
    rows = tuple(OrderRow(f"spec{index}", dict(each), 0) for index, each in enumerate(values))
    return Order(attempt="a", job="jobs.capture", model=MODEL, rows=rows, artifacts={})


def worker_in(folder: Path, replica: Replica) -> Worker:
    return Worker(folder, MODEL, device="cpu", token_budget=64, load=lambda *_, **__: replica)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


class TestStored:
    def commit(self, folder: Path, deliveries: Sequence[Delivery]) -> Store:
        store = Store(folder)
        store.commit([delivery.part for delivery in deliveries])
        return store

    def test_what_a_job_wrote_is_visible_once_its_outcome_is_committed(
        self, data: dict[str, str], tmp_path: Path
    ) -> None:
        folder = tmp_path / "sweep"
        folder.mkdir()
        deliveries = list(worker_in(folder, tiny_replica("llama")).run(order([data])))
        assert {delivery.error for delivery in deliveries} == {None}
        assert Store(folder).rows("activations") == []
        rows = self.commit(folder, deliveries).rows("activations")
        assert {row["spec"] for row in rows} == {"spec0"}
        context = Artifacts(tiny_replica("llama"))
        context.run("jobs.capture", [params_of(data)])
        expected = {(row["item"], row["layer"]): row for row in rows_written(context, "activations")}
        assert len(rows) == len(expected)
        for row in rows:
            vector = expected[row["item"], row["layer"]]["vector"]
            np.testing.assert_array_equal(np.array(row["vector"], np.float32), vector.astype(np.float32))

    def test_an_attempt_that_fails_halfway_leaves_nothing_of_the_rows_without_an_outcome(
        self, data: dict[str, str], tmp_path: Path
    ) -> None:
        folder = tmp_path / "sweep"
        folder.mkdir()
        replica = tiny_replica("llama")
        written = []

        def fail_late(*_: Any) -> None:
            written.append(leftovers(folder))
            if len(written) == 3:
                raise RuntimeError("told to fail")

        replica.token_budget = 1
        replica.blocks[0].register_forward_pre_hook(fail_late)
        [delivery] = worker_in(folder, replica).run(order([data]))
        assert "told to fail" in str(delivery.error)
        assert len(written[1]) == 2, "activations and items are staged while the job runs"
        assert leftovers(folder) == []
        assert delivery.part == ((), ())

    def test_a_worker_that_is_told_to_go_leaves_nothing(self, data: dict[str, str], tmp_path: Path) -> None:
        folder = tmp_path / "sweep"
        folder.mkdir()

        def leave(*_: Any) -> None:
            raise KeyboardInterrupt

        replica = tiny_replica("llama")
        replica.token_budget = 1
        replica.blocks[-1].register_forward_pre_hook(leave)
        with pytest.raises(KeyboardInterrupt):
            list(worker_in(folder, replica).run(order([data])))
        assert leftovers(folder) == []

    def test_only_rows_whose_outcome_stands_keep_what_they_wrote(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def run(replica: Any, rows: Any, context: Context) -> Iterator[tuple[int, Outcome]]:
            for row in (0, 1, 2, 3, 0):
                chunk = {"spec": "of its own", "item": [row], "vector": np.ones((1, 3))}
                context.write(row, "activations", chunk)
            yield 0, Outcome()
            yield 1, Outcome(status=Status.FAILED, reason="told to fail")
            yield 2, Outcome(status=Status.INFEASIBLE, reason="told to be infeasible")
            context.write(2, "activations", {"item": [2], "vector": np.ones((1, 3))})

        monkeypatch.setattr(fake_job, "run", run)
        asked = tuple(OrderRow(f"spec{row}", {"x": row}, 0) for row in range(4))
        pack = Order(attempt="a", job="tests.fake_job", model=MODEL, rows=asked, artifacts={})
        deliveries = list(worker_in(tmp_path, tiny_replica("llama")).run(pack))
        assert "a chunk of activations for row 2; the rows without an outcome are [3]" in str(
            deliveries[-1].error
        )
        found = self.commit(tmp_path, deliveries).rows("activations")
        assert sorted((row["spec"], row["item"]) for row in found) == [
            ("spec0", 0),
            ("spec0", 0),
            ("spec2", 2),
        ]
        assert len(list((tmp_path / "tables" / "activations").iterdir())) == 2

    def test_a_disk_that_refuses_ends_the_sweep_and_leaves_nothing(
        self, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "sweep"
        folder.mkdir()

        def refuse(file: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(StoreError, match="No space left"):
            list(worker_in(folder, tiny_replica("llama")).run(order([data])))
        assert leftovers(folder) == []

    def test_a_sweep_over_doses_keeps_the_states_of_every_trial(
        self, data: dict[str, str], tmp_path: Path
    ) -> None:
        folder = tmp_path / "sweep"
        space = make_space(
            {"dose": Grid([0.0, 2.0]), "layer": Grid([1, 2])},
            job="jobs.capture",
            objectives=[Objective(metric="norm", direction="maximize")],
            fixed={**data, "capture_layers": [0, 3], "offsets": [1, 2]},
        )
        pool = InlinePool(folder, workers=2, load=lambda *_, **__: tiny_replica("llama"))
        drive(folder, space, trials=4, pool=pool)
        sweep = open_sweep(folder)
        assert sweep.counts()["completed"] == 4
        found = sweep.rows(
            "SELECT trial, count(*) AS vectors, count(DISTINCT (item, layer, name)) AS places, "
            "min(len(vector)) AS width FROM activations GROUP BY trial ORDER BY trial"
        )
        assert found == [{"trial": trial, "vectors": 12, "places": 12, "width": HIDDEN} for trial in range(4)]
        lower = sweep.rows(
            "SELECT count(DISTINCT vector) AS vectors FROM activations WHERE item = 0 AND name = '-1' "
            "GROUP BY layer ORDER BY layer"
        )
        assert [row["vectors"] for row in lower] == [1, 3], "only the upper layer is steered, at two layers"
