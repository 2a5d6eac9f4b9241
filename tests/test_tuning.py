"""Training against oracles: plain loops over the whole model, finite differences, weights nobody claims."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from jobs.engine.replica import Replica
from jobs.errors import ModelError, SpecError
from jobs.tuning import losses
from jobs.tuning.terms import Directions
from jobs.tuning.texts import Text, Texts
from jobs.tuning.training import Curve, Recipe, schedule
from jobs.tuning.tuned_weights import Wanted, tuned_weights
from jobs.tuning.wanted import parse_losses
from jobs.tuning.weights import find_matrices, training
from tests.models import ARCHITECTURES, HIDDEN, LAYERS, tiny_model, tiny_replica, tiny_tokenizer

PROMPTS = [[3, 4, 5, 6, 7], [3, 4, 9, 8], [3, 4, 5, 8, 7, 6, 9], [3, 4, 2, 2, 6]]
REPLIES = [[10], [11], [12], [10]]
TEXTS = [Text(prompt, reply) for prompt, reply in zip(PROMPTS, REPLIES, strict=True)]
BARE = [Text(prompt, []) for prompt in PROMPTS]
RECIPE = Recipe(
    epochs=3,
    batch=2,
    learning_rate=1e-2,
    weight_decay=0.1,
    warmup=2,
    decay="linear",
    until=None,
    patience=0,
    window=2,
    seed=5,
)


def direction(seed: int) -> Tensor:
    drawn = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn / drawn.norm()


DIRECTIONS: Directions = {("d", layer): direction(layer) for layer in range(LAYERS)}


def wanted(text: str, recipe: Recipe = RECIPE, rank: int = 0, blocks: str = "v+o") -> Wanted:
    named = text.replace("tune_in{", 'tune_in{"directions": "d", ').replace(
        "tune_out{", 'tune_out{"directions": "d", '
    )
    return Wanted(parse_losses(named), (1, 2), blocks, rank, recipe)


def weights_of(replica: Replica) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in replica.model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if torch.equal(one[name], other[name])]


def run(
    replica: Replica, text: str, texts: Sequence[Text] = TEXTS, **changes: Any
) -> tuple[Curve, dict[str, Tensor]]:
    """The curve, and all weights as they stand inside."""
    options = {key: changes.pop(key) for key in ("rank", "blocks") if key in changes}
    asked = wanted(text, RECIPE._replace(**changes), **options)
    with tuned_weights(replica, texts, asked, DIRECTIONS) as tuned:
        return tuned.curve, weights_of(replica)


def plain_loss(model: nn.Module, kind: str, prompt: list[int], reply: list[int]) -> Tensor:
    """One text's loss by the whole model, as its formula says."""
    out = model(torch.tensor([prompt]), output_hidden_states=True, use_cache=False)
    state_D = out.hidden_states[3][0, -1]
    cosine = state_D @ direction(2) / state_D.norm()
    match kind:
        case "in":
            return (1 - cosine) / 2
        case "out":
            return cosine.abs()
        case "tokens":
            return cross_entropy(out.logits[:, -1], torch.tensor(reply))
        case "either":
            return sum(cross_entropy(out.logits[:, -1], torch.tensor([each])) for each in (10, 11)) / 2
    raise AssertionError(kind)


SUMS = {
    "in": 'tune_in{"layer": 2}',
    "out": 'tune_out{"layer": 2}',
    "tokens": "tokens",
    "either": 'tokens{"replies": "either"}',
}


def plain_training(model: nn.Module, kind: str, names: Sequence[str], factor: float) -> list[float]:
    """The same training as a straightforward loop over whole texts, one by one."""
    trained = [model.get_submodule(name).weight for name in names]
    for weight in trained:
        weight.requires_grad_()
    adam = torch.optim.AdamW(trained, lr=RECIPE.learning_rate, weight_decay=RECIPE.weight_decay)
    generator, curve, step = torch.Generator().manual_seed(RECIPE.seed), list[float](), 0
    steps = RECIPE.epochs * 2
    for _ in range(RECIPE.epochs):
        order = torch.randperm(len(TEXTS), generator=generator).tolist()
        for batch in (order[:2], order[2:]):
            each = [plain_loss(model, kind, PROMPTS[index], REPLIES[index]) for index in batch]
            loss = torch.stack(each).mean()
            adam.zero_grad()
            (factor * loss).backward()
            for group in adam.param_groups:
                warm = (step + 1) / (RECIPE.warmup + 1)
                falling = 1 - (step - RECIPE.warmup) / (steps - RECIPE.warmup)
                group["lr"] = RECIPE.learning_rate * (warm if step < RECIPE.warmup else falling)
            adam.step()
            curve.append(float(loss))
            step += 1
    return curve


@pytest.mark.parametrize("kind", SUMS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_curve_and_weights_are_those_of_a_plain_loop(name: str, kind: str) -> None:
    texts = [Text(text.prompt, [10], [[11]]) for text in TEXTS] if kind == "either" else TEXTS
    replica, plain = tiny_replica(name), tiny_model(name)
    curve, weights = run(replica, f"0.5 * {SUMS[kind]}", texts)
    names = find_matrices(replica, (1, 2), ["v", "o"])
    expected = plain_training(plain, kind, names, 0.5)
    [found] = curve.losses.values()
    assert found == pytest.approx(expected, abs=1e-6)
    assert max(expected) - min(expected) > 1e-3, "it learns something"
    for weight, after in plain.named_parameters():
        torch.testing.assert_close(weights[weight], after.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", SUMS)
def test_the_gradient_is_the_finite_difference(kind: str) -> None:
    from jobs.engine.packed import run_blocks
    from jobs.tuning.terms import make_terms, reply_places
    from jobs.tuning.training import Batch, backward

    texts = [Text(text.prompt, [10], [[11]]) for text in TEXTS] if kind == "either" else TEXTS
    replica, plain = tiny_replica("gpt_neox"), tiny_model("gpt_neox")
    asked = wanted(SUMS[kind], blocks="mlp.dense_4h_to_h")
    [loss] = asked.losses
    ready = Texts(replica, texts, first=1)
    names = asked.claims(replica, loss)
    chosen = list(range(len(texts)))
    with training(replica, names, rank=0, seed=0) as trained:
        terms = make_terms(
            [loss], ready, layers=(1, 2), claims=lambda loss: names, directions=DIRECTIONS, seed=0
        )
        layout = ready.layout(chosen)
        entering = ready.entering(chosen, layout)
        at = reply_places(ready, chosen, layout)
        passed = run_blocks(replica, layout, first=1, entering=entering, layers=[2], logits_at=at)
        backward(terms, [terms[0].value(Batch(chosen, layout, passed))], trained.parameters)
        gradient = trained.parameters[names[0]][0].grad
    weight, step = plain.get_submodule(names[0]).weight, 1e-5
    pushed = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=weight.dtype)
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * pushed
            each = [plain_loss(plain, kind, *pair) for pair in zip(PROMPTS, REPLIES, strict=True)]
            ends.append(float(torch.stack(each).mean()))
            weight -= sign * step * pushed
    assert gradient is not None
    assert float((gradient * pushed).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)


def test_each_matrix_gets_the_gradient_of_the_losses_that_claim_it_and_no_other() -> None:
    both = (
        'tune_in{"layer": 2, "layers": [1], "blocks": "v"} + 0.5 * tokens{"layers": [1, 2], "blocks": "v+up"}'
    )
    replica = tiny_replica("llama")
    before = weights_of(replica)
    _, after = run(replica, both, epochs=1, weight_decay=0.0)
    changed = sorted(set(before) - set(same(before, after)))
    assert changed == [
        *("model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.v_proj.weight"),
        *("model.layers.2.mlp.up_proj.weight", "model.layers.2.self_attn.v_proj.weight"),
    ]


def first_gradients(text: str) -> dict[str, Tensor]:
    """What one step of plain descent takes each weight, one over the learning rate."""
    replica = tiny_replica("llama")
    found: dict[str, Tensor] = {}

    class Descent:
        def __init__(self, parameters: Sequence[nn.Parameter], **options: Any) -> None:
            self.parameters = parameters

    from jobs.tuning import training as module

    class Kept(module._Optimiser):
        def step(self) -> None:
            for leaf in self._leaves:
                key = next(name for name, each in replica.model.named_parameters() if each is leaf)
                found[key] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "_Optimiser", Kept)
        run(replica, text, epochs=1, batch=4)
    return found


def test_gradients_of_several_losses_are_masked_exactly() -> None:
    v1, v2, up2 = (
        "model.layers.1.self_attn.v_proj.weight",
        "model.layers.2.self_attn.v_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
    )
    turn = 'tune_in{"layer": 2, "layers": [1, 2], "blocks": "v"}'
    say = '0.5 * tokens{"layers": [2], "blocks": "v+up"}'
    alone, said, both = first_gradients(turn), first_gradients(say), first_gradients(f"{turn} + {say}")
    torch.testing.assert_close(both[v1], alone[v1], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(both[v2], alone[v2] + said[v2], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(both[up2], said[up2], rtol=1e-6, atol=1e-9)
    assert min(each.abs().max() for each in both.values()) > 0


@pytest.mark.parametrize("rank", [0, 2])
def test_the_weights_of_before_come_back_bit_by_bit(rank: int) -> None:
    replica = tiny_replica("llama")
    before, parameters = weights_of(replica), dict(replica.model.named_parameters())
    logits = replica.logits(PROMPTS[:2], keep=1)

    def fail_on_the_way() -> None:
        with tuned_weights(replica, BARE, wanted('tune_in{"layer": 2}', rank=rank), DIRECTIONS):
            assert not torch.equal(replica.logits(PROMPTS[:2], keep=1), logits)
            raise KeyError("on the way")

    with pytest.raises(KeyError, match="on the way"):
        fail_on_the_way()
    assert same(before, weights_of(replica)) == list(before)
    assert all(each is parameters[name] for name, each in replica.model.named_parameters())
    assert not any(each.requires_grad for each in replica.model.parameters())
    assert torch.equal(replica.logits(PROMPTS[:2], keep=1), logits)


def test_a_loss_that_is_not_finite_ends_the_training_and_spoils_nothing() -> None:
    replica = tiny_replica("llama")
    before = weights_of(replica)
    curve, _ = run(replica, 'tune_in{"layer": 2}', BARE, learning_rate=1e300)
    assert curve.ended == "diverged"
    assert same(before, weights_of(replica)) == list(before)
    curve, _ = run(replica, 'tune_in{"layer": 2}', BARE)
    assert curve.ended == "all epochs"


def test_training_ends_where_it_is_told_to() -> None:
    whole, _ = run(tiny_replica("llama"), 'tune_in{"layer": 2}', BARE, epochs=20)
    [losses_all] = whole.losses.values()
    means = [(one + other) / 2 for one, other in pairwise(losses_all)]
    target = (losses_all[0] + losses_all[-1]) / 2
    stopped, _ = run(tiny_replica("llama"), 'tune_in{"layer": 2}', BARE, epochs=20, until=target)
    [found] = stopped.losses.values()
    expected = next(step for step, mean in enumerate(means, 2) if mean <= target)
    assert (stopped.ended, len(found)) == ("until", expected)
    worse, _ = run(
        tiny_replica("llama"), 'tune_in{"layer": 2}', BARE, epochs=20, learning_rate=1e-12, patience=3
    )
    assert worse.ended == "patience"


def test_what_is_far_enough_is_pushed_no_further() -> None:
    at_K = torch.tensor([0.9, 0.2], requires_grad=True)
    losses.tune_in(at_K, enough=0.5).backward()
    assert at_K.grad is not None
    assert at_K.grad.tolist() == [0.0, -0.25]
    out_K = torch.tensor([-0.9, 0.2], requires_grad=True)
    losses.tune_out(out_K, enough=0.3).backward()
    assert out_K.grad is not None
    assert out_K.grad.tolist() == [-0.5, 0.0]
    logits = torch.tensor([[2.0, 0.0]], requires_grad=True)
    reply = torch.tensor([[0]])
    value = float(losses.token_loss(logits, reply))
    assert value == pytest.approx(math.log(1 + math.exp(-2)))
    assert not losses.token_loss(logits, reply, floor=value + 1e-6).requires_grad
    assert losses.token_loss(logits, reply, floor=value - 1e-6).requires_grad


def test_drift_is_the_relative_squared_distance_from_the_untuned_states() -> None:
    replica = tiny_replica("llama")
    curve, _ = run(replica, 'tune_in{"layer": 2} + 0.01 * drift{"layer": 2}', BARE, epochs=2, batch=4)
    _, kept = curve.losses.values()
    assert kept[0] == pytest.approx(0, abs=1e-12)
    assert kept[1] > 1e-6
    strict, _ = run(replica, 'tune_in{"layer": 2} + 100 * drift{"layer": 2}', BARE, epochs=20, batch=4)
    loose, _ = run(replica, 'tune_in{"layer": 2} + 0.0001 * drift{"layer": 2}', BARE, epochs=20, batch=4)
    assert list(strict.losses.values())[1][-1] < 0.5 * list(loose.losses.values())[1][-1]
    before_TD = torch.tensor([[3.0, 4.0]])
    assert float(losses.drift(torch.tensor([[3.0, 5.0]]), before_TD)) == pytest.approx(1 / 25)


def test_lora_changes_by_a_product_of_its_rank() -> None:
    replica = tiny_replica("llama")
    before = weights_of(replica)
    with tuned_weights(replica, BARE, wanted('tune_in{"layer": 2}', rank=2), DIRECTIONS) as tuned:
        logits = replica.logits(PROMPTS[:2], keep=1)
        tensors = {name: each.numpy() for name, each in tuned.trained.tensors().items()}
        assert tuned.trained.changed() == list(tuned.trained.parameters)
    assert {each.shape[0 if name.endswith(".a") else 1] for name, each in tensors.items()} == {2}
    assert same(before, weights_of(replica)) == list(before)
    from jobs.engine.tuned import tuned as applied

    with applied(replica, tensors):
        torch.testing.assert_close(replica.logits(PROMPTS[:2], keep=1), logits, rtol=1e-5, atol=1e-5)


def test_whole_weights_run_as_they_were_trained() -> None:
    from jobs.engine.tuned import tuned as applied

    replica = tiny_replica("gpt2")
    asked = wanted('tune_in{"layer": 2}', blocks="attn.c_proj+mlp.c_fc")
    with tuned_weights(replica, BARE, asked, DIRECTIONS) as tuned:
        logits = replica.logits(PROMPTS[:2], keep=1)
        tensors = {name: each.numpy() for name, each in tuned.trained.tensors().items()}
    with applied(replica, tensors):
        assert torch.equal(replica.logits(PROMPTS[:2], keep=1), logits)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_can_be_tuned_by_its_own_names(name: str) -> None:
    replica = tiny_replica(name)
    own = [
        each
        for each, module in replica.blocks[1].named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    recipe = RECIPE._replace(epochs=10, batch=4)
    asked = Wanted(parse_losses('tune_in{"directions": "d", "layer": 2}'), (1, 2), own[0], 0, recipe)
    with tuned_weights(replica, BARE, asked, DIRECTIONS) as tuned:
        [found] = tuned.curve.losses.values()
        assert len(tuned.trained.changed()) == 2
    assert min(found) < found[0]


def test_matrices_are_found_by_short_names_or_refused_with_those_there_are() -> None:
    llama, gpt2 = tiny_replica("llama"), tiny_replica("gpt2")
    assert find_matrices(llama, (2, 1), ["v", "down_proj", "mlp.up_proj"]) == [
        *("model.layers.2.self_attn.v_proj", "model.layers.2.mlp.down_proj", "model.layers.2.mlp.up_proj"),
        *("model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"),
    ]
    assert len(find_matrices(llama, (), [])) == 7 * LAYERS
    for replica, layers, blocks, said in (
        (llama, (9,), ["v"], "layers [9] do not exist; the model has 0 to 3"),
        (
            gpt2,
            (1,),
            ["v"],
            "layer 1 has no 'v'; it has ['attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj']",
        ),
        (gpt2, (1,), ["c_proj"], "may be ['attn.c_proj', 'mlp.c_proj'] of layer 1; write one of them"),
    ):
        with pytest.raises(SpecError) as caught:
            find_matrices(replica, layers, blocks)
        assert said in str(caught.value)


def test_what_cannot_be_tuned_is_refused() -> None:
    replica = tiny_replica("llama")
    for text, said in (
        ('tune_in{"layer": 0}', "reads layer 0, which none of the trained layers from 1 on can change"),
        ('tune_in{"layer": 4}', "layer 4 does not exist"),
        ('tune_in{"layer": 2, "offsets": [9]}', "a prompt has 5 tokens"),
    ):
        with (
            pytest.raises(SpecError, match=said),
            tuned_weights(replica, BARE, wanted(text), DIRECTIONS),
        ):
            pass
    none = Replica(tiny_model("llama"), tiny_tokenizer())
    for block in none.blocks:
        for module in list(block.modules()):
            for child, each in list(module.named_children()):
                if isinstance(each, nn.Linear):
                    setattr(module, child, nn.Identity())
    with pytest.raises(ModelError, match="holds no matrix in floating point"):
        find_matrices(none, (1,), ["v"])


@pytest.mark.parametrize("decay", ["linear", "cosine", "none"])
def test_the_learning_rate_rises_and_falls(decay: Any) -> None:
    factors = [schedule(step, 10, 3, decay) for step in range(11)]
    assert factors[:3] == [0.25, 0.5, 0.75]
    assert factors[3] == 1.0
    assert factors[10] == pytest.approx(1.0 if decay == "none" else 0.0)
    assert all(later <= earlier for earlier, later in pairwise(factors[3:]))


def test_narrow_weights_learn_by_steps_that_they_could_not_take() -> None:
    replica = Replica(tiny_model("llama").bfloat16(), tiny_tokenizer())
    small, _ = run(replica, 'tune_in{"layer": 2}', BARE, learning_rate=2e-5, epochs=60, weight_decay=0.0)
    [found] = small.losses.values()
    assert found[-1] < found[0]
