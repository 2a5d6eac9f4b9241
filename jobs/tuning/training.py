"""The loop of a tuning: every matrix gets the gradient of exactly the losses that claim it.

K texts or tokens, D hidden.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from jobs.engine.packed import Layout, Pass, run_blocks
from jobs.tuning.texts import Texts
from jobs.tuning.weights import Trained

Decay = Literal["linear", "cosine", "none"]


class Recipe(NamedTuple):
    """How long and how fast.

    Attributes:
        epochs: Times that every text is read, at most.
        batch: Texts of a step.
        learning_rate: Of AdamW, an element and step.
        weight_decay: Of AdamW, towards the untuned weights' zero, as usual.
        warmup: Steps in which the learning rate rises to its value.
        decay: How it falls afterwards: to 0 by the last step, or not.
        until: Mean of the watched losses at which training ends; None trains on.
        patience: Means without a new lowest one after which training ends; 0 trains on.
        window: Steps whose mean counts, and is looked at after every step; with texts to validate on, steps
            after which their mean is.
        seed: Of the order.
    """

    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float
    warmup: int
    decay: Decay
    until: float | None
    patience: int
    window: int
    seed: int


class Batch(NamedTuple):
    """What a loss may look at.

    Attributes:
        chosen: Indices of the texts.
        layout: Where their tokens stand.
        passed: States and logits there.
    """

    chosen: Sequence[int]
    layout: Layout
    passed: Pass


class Term(NamedTuple):
    """A loss of the sum.

    Attributes:
        name: For the curves.
        weight: Factor.
        claims: Names of the matrices that get its gradient.
        value: Takes a batch, gives the loss without its factor.
        is_watched: Whether `until` and `patience` look at it.
    """

    name: str
    weight: float
    claims: Sequence[str]
    value: Callable[[Batch], Tensor]
    is_watched: bool


class Curve(NamedTuple):
    """What training leaves besides the weights.

    Attributes:
        losses: Name of a term -> its value at every step, without its factor.
        total: Their weighted sum at every step.
        validation: Mean of the watched losses on the texts to validate on, each time that it was taken.
        ended: Why it ended: `all epochs`, `until`, `patience`, or `diverged`.
    """

    losses: dict[str, list[float]]
    total: list[float]
    validation: list[float]
    ended: str


class Material(NamedTuple):
    """Texts, and what their passes are for.

    Attributes:
        texts: What is read.
        terms: What is made of it.
        layers: Blocks whose output the terms look at; nothing above the highest runs without logits.
        logits_at: Places whose logits the terms look at, for chosen texts in their layout; None for none.
    """

    texts: Texts
    terms: Sequence[Term]
    layers: Sequence[int]
    logits_at: Callable[[Sequence[int], Layout], Tensor] | None

    def values(self, chosen: Sequence[int]) -> list[Tensor]:
        """Of each term, without its factor, after one pass over some texts."""
        layout = self.texts.layout(chosen)
        passed = run_blocks(
            self.texts.replica,
            layout,
            first=self.texts.first,
            last=None if self.logits_at else max(self.layers),
            entering=self.texts.entering(chosen, layout),
            layers=self.layers,
            logits_at=self.logits_at(chosen, layout) if self.logits_at else None,
        )
        return [term.value(Batch(chosen, layout, passed)) for term in self.terms]

    @torch.no_grad()
    def watched(self, batch: int) -> float:
        """Mean of the watched terms over all texts, a batch at a time."""
        total, number = 0.0, len(self.texts.texts)
        for start in range(0, number, batch):
            chosen = range(start, min(start + batch, number))
            values = zip(self.terms, self.values(chosen), strict=True)
            found = [float(value) for term, value in values if term.is_watched]
            total += sum(found) / len(found) * len(chosen)
        return total / number


def train(trained: Trained, material: Material, recipe: Recipe, validated: Material | None = None) -> Curve:
    """Train until the recipe says enough, or a loss is not finite any more.

    Args:
        trained: What is trained.
        material: What on.
        recipe: How.
        validated: What the recipe's end is judged by; None judges by what is trained on.
    """
    texts, terms = material.texts, material.terms
    steps = recipe.epochs * -(-len(texts.texts) // recipe.batch)
    optimiser = _Optimiser(trained, recipe, steps)
    curve = Curve({term.name: [] for term in terms}, [], [], "all epochs")
    watch = _Watch(recipe, 1 if validated else recipe.window)
    is_watched = any(term.is_watched for term in terms)
    for step, chosen in enumerate(_batches(len(texts.texts), recipe), 1):
        values = material.values(chosen)
        found = [float(value.detach()) for value in values]
        for term, value in zip(terms, found, strict=True):
            curve.losses[term.name].append(value)
        curve.total.append(sum(term.weight * value for term, value in zip(terms, found, strict=True)))
        if not math.isfinite(curve.total[-1]):
            return curve._replace(ended="diverged")
        backward(terms, values, trained.parameters)
        optimiser.step()
        if validated and is_watched and step % recipe.window == 0:
            curve.validation.append(validated.watched(recipe.batch))
            seen = curve.validation[-1:]
        else:
            seen = [] if validated else [curve.losses[term.name][-1] for term in terms if term.is_watched]
        if ended := watch.after(seen):
            return curve._replace(ended=ended)
    return curve


def backward(
    terms: Sequence[Term], values: Sequence[Tensor], parameters: Mapping[str, Sequence[nn.Parameter]]
) -> None:
    """Set the gradient of every parameter to that of the weighted sum of the terms that claim it.

    One pass backwards for each set of terms with the same claims.
    """
    for each in parameters.values():
        for parameter in each:
            parameter.grad = None
    sums: dict[frozenset[str], Tensor] = {}
    for term, value in zip(terms, values, strict=True):
        claims = frozenset(term.claims)
        weighted = term.weight * value
        sums[claims] = sums[claims] + weighted if claims in sums else weighted
    for number, (claims, total) in enumerate(sums.items(), 1):
        claimed = [parameter for name in sorted(claims) for parameter in parameters[name]]
        if total.requires_grad and claimed:
            total.backward(inputs=claimed, retain_graph=number < len(sums))


def _batches(texts: int, recipe: Recipe) -> "list[list[int]]":
    generator = torch.Generator().manual_seed(recipe.seed)
    found = []
    for _ in range(recipe.epochs):
        order = torch.randperm(texts, generator=generator).tolist()
        found += [order[start : start + recipe.batch] for start in range(0, texts, recipe.batch)]
    return found


class _Optimiser:
    """AdamW over float32 copies of narrower weights, which small steps would leave as they are."""

    def __init__(self, trained: Trained, recipe: Recipe, steps: int) -> None:
        self._leaves = [parameter for each in trained.parameters.values() for parameter in each]
        self._wide = [_master(leaf) for leaf in self._leaves]
        self._adam = torch.optim.AdamW(self._wide, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._adam, lambda step: schedule(step, steps, recipe.warmup, recipe.decay)
        )

    @torch.no_grad()
    def step(self) -> None:
        for leaf, wide in zip(self._leaves, self._wide, strict=True):
            if wide is not leaf:
                wide.grad = None if leaf.grad is None else leaf.grad.to(wide.dtype)
        self._adam.step()
        self._schedule.step()
        for leaf, wide in zip(self._leaves, self._wide, strict=True):
            if wide is not leaf:
                leaf.copy_(wide)


def _master(leaf: nn.Parameter) -> nn.Parameter:
    wide = torch.promote_types(leaf.dtype, torch.float32)
    return leaf if leaf.dtype == wide else nn.Parameter(leaf.detach().to(wide))


def schedule(step: int, steps: int, warmup: int, decay: Decay) -> float:
    """Factor of the learning rate before step `step`, counted from 0, of `steps`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    match decay:
        case "linear":
            return 1 - done
        case "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        case "none":
            return 1.0


class _Watch:
    """When training has done enough."""

    def __init__(self, recipe: Recipe, window: int) -> None:
        self._recipe = recipe
        self._last: deque[float] = deque(maxlen=window)
        self._lowest, self._since = math.inf, 0

    def after(self, watched: Sequence[float]) -> str | None:
        """Why training ends after a step with these losses; None if it goes on."""
        if not watched:
            return None
        self._last.append(sum(watched) / len(watched))
        if len(self._last) < (self._last.maxlen or 1):
            return None
        mean = sum(self._last) / len(self._last)
        self._since = 0 if mean < self._lowest else self._since + 1
        self._lowest = min(self._lowest, mean)
        if self._recipe.until is not None and mean <= self._recipe.until:
            return "until"
        return "patience" if 0 < self._recipe.patience <= self._since else None
