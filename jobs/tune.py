"""Job: tune directions into or out of the weights, and read what that does.

The weights are an artifact: other jobs run on them with `--set tuned='jobs.tune{"losses": "tune_out"}'`.
Without losses it is the untuned model, which every tuning requires and is compared with.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from jobs import extract
from jobs.asking import check_asking, encode_prompt
from jobs.checks import above_zero, at_least
from jobs.errors import SpecError
from jobs.resolve import parse_use
from jobs.spec import Context, Metric, Outcome, Requirement, Row, Size, Status
from jobs.tuning import reads
from jobs.tuning.examples import Asked, Example, load
from jobs.tuning.reads import Found, Reader, Reads
from jobs.tuning.wanted import Loss, Projection, Tokens, parse_losses

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.engine.replica import Replica
    from jobs.tuning.outcomes import Training
    from jobs.tuning.reading import Aim, Answers
    from jobs.tuning.terms import Directions
    from jobs.tuning.texts import Text
    from jobs.tuning.tuned_weights import Wanted

RANDOM = "random"


@dataclass(frozen=True, slots=True, kw_only=True)
class Params(Reads):
    """What is made small, in which weights, and what is read afterwards.

    Attributes:
        losses: Weighted sum such as `tune_in + 0.01 * tokens` or `tune_in{"layer": 14} + tune_out{"layer":
            20}`; the losses and their options stand in `jobs.tuning.wanted`. Or a train type of the code of
            arXiv:2409.06927, such as `TuneInPosPlusTruth`. Empty for the untuned model.
        directions: `jobs.extract` with its parameters as JSON behind its name, or `random`.
        token_weight: Further factor of the losses of tokens.
        first: Lowest block whose weights are trained, counted from 0.
        depth: How many blocks from there on.
        layers: The blocks one by one, in place of `first` and `depth`.
        blocks: Matrices of each block, `+` between them: `q`, `k`, `v`, `o`, `gate`, `up`, `down`, or the
            architecture's own names; empty for all.
        rank: Of a low-rank change of each matrix (LoRA); 0 trains the weights themselves.
        asked: What `examples` holds: labelled `claims`, open `prompts`, or prompts with `replies`.
        examples: The dataset; its splits do not overlap.
        examples_extract: Examples that are trained on.
        examples_select: Examples of the split select.
        examples_report: Examples of the split report.
        chat: Whether prompts are asked in the model's chat template; otherwise they stand raw.
        system: System message; None leaves what the model's template does by itself.
        epochs: Times that every example is read, at most.
        batch: Examples of a step.
        learning_rate: Of AdamW, an element and step.
        weight_decay: Of AdamW.
        warmup: Steps in which the learning rate rises.
        decay: How it falls afterwards.
        until: Mean of the projection losses, (1 - cos) / 2 or |cos|, at which training ends; None trains on.
        patience: Means without a new lowest one after which training ends; 0 trains on.
        window: Steps that such a mean is of, taken anew after each; or, with `held_out`, after which it is
            taken on those examples.
        held_out: The last so many of `examples_extract` that are not trained on, but decide when it ends.
        keeps: Whether the weights are kept; otherwise nothing can be run on them or exported.
    """

    losses: str = "tune_in"
    directions: str = "jobs.extract{}"
    token_weight: float = 1.0
    first: int = 12
    depth: int = 6
    layers: tuple[int, ...] = ()
    blocks: str = "v+o"
    rank: int = 0
    asked: Asked = "claims"
    examples: str = "claims"
    examples_extract: int = 128
    examples_select: int = 48
    examples_report: int = 48
    chat: bool = True
    system: str | None = None
    epochs: int = 3
    batch: int = 8
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    warmup: int = 0
    decay: Literal["linear", "cosine", "none"] = "linear"
    until: float | None = None
    patience: int = 0
    window: int = 10
    held_out: int = 0
    keeps: bool = True

    def __post_init__(self) -> None:
        self.check_reads()
        at_least(self, 0, "rank", "warmup", "patience", "weight_decay", "first", "held_out")
        at_least(
            self, 1, "examples_extract", "examples_select", "examples_report", "epochs", "batch", "window"
        )
        at_least(self, 1, "depth")
        above_zero(self, "learning_rate", "token_weight")
        check_asking(self)
        if self.layers and (min(self.layers) < 0 or len(set(self.layers)) < len(self.layers)):
            raise ValueError(f"layers={self.layers}; give each layer once, counted from 0")
        if self.held_out >= self.examples_extract:
            raise ValueError(
                f"held_out={self.held_out}, examples_extract={self.examples_extract}; nothing is left to "
                "train on"
            )
        if self.until is not None and not 0 <= self.until <= 1:
            raise ValueError(f"until={self.until}; it takes a loss from 0 to 1, or null")
        try:
            _check_losses(self)
        except SpecError as error:
            raise ValueError(str(error)) from error

    @property
    def trained_layers(self) -> tuple[int, ...]:
        """Blocks whose weights are trained, ascending."""
        return tuple(sorted(self.layers)) or tuple(range(self.first, self.first + self.depth))


def _check_losses(params: Params) -> None:
    for name in _direction_names(params):
        if name != RANDOM and parse_use(name).job != extract.__name__:
            raise SpecError(f"directions={name!r}; it takes {RANDOM!r}, or jobs.extract with its parameters")
    replies = _replies(params)
    has = {"claims": {"positive", "negative", "either"}, "prompts": set(), "replies": {"positive"}}[
        params.asked
    ]
    if len(replies) > 1 or not replies <= has:
        raise SpecError(
            f"losses: tokens of {sorted(replies)} replies with asked={params.asked!r}, which has "
            f"{sorted(has)}; a tuning takes one kind"
        )


def _replies(params: Params) -> set[str]:
    """Kinds of replies that its losses are of."""
    return {loss.replies for loss in parse_losses(params.losses) if isinstance(loss, Tokens)}


def _direction_names(params: Params) -> list[str]:
    """The job's direction first, then those of the losses."""
    own = [loss.directions for loss in parse_losses(params.losses) if isinstance(loss, Projection)]
    return list(dict.fromkeys([params.directions, *filter(None, own)]))


_EXAMPLES = "share of examples"
METRICS = {
    "cosine": Metric("1", "mean cosine of the states that are turned, or would be, to their direction"),
    "cosine_size": Metric("1", "mean of its absolute value"),
    "cosine_before": Metric("1", "cosine of the untuned model"),
    "positive": Metric(_EXAMPLES, "positive reply likelier than the negative one, by its first token"),
    "positive_low": Metric(_EXAMPLES, "lower end of its 95 % Wilson interval"),
    "positive_high": Metric(_EXAMPLES, "upper end of its 95 % Wilson interval"),
    "positive_before": Metric(_EXAMPLES, "positive of the untuned model"),
    "positive_true": Metric("share of true claims", "positive on true claims"),
    "positive_false": Metric("share of false claims", "positive on false claims"),
    "loss": Metric("1", "weighted sum of the losses, mean over the last window of steps"),
    "steps": Metric("1", "steps that were taken"),
    "matrices": Metric("1", "matrices whose weights differ from the untuned ones"),
    "matrices_asked": Metric("1", "matrices that were to be trained"),
    **reads.METRICS,
}
PACK_BY = None
DATA = ("examples", *reads.DATA)
LAYERS = ("first", "layers")


def size(params: Params) -> Size:
    """Examples of about 80 tokens, a step of three passes; and what is read."""
    sequences, tokens = params.passes if params.reads else (0, 0)
    read = params.examples_select + params.examples_report
    steps = 3 * params.epochs * params.examples_extract if params.losses else 0
    return Size(sequences + read, tokens + 80 * (read + steps))


def requires(params: Params) -> Sequence[Requirement]:
    """The directions, and what the untuned model does."""
    directions = [parse_use(name) for name in _direction_names(params) if name != RANDOM]
    compares = params.losses and params.reads
    return (*directions, _untuned(params)) if compares else tuple(directions)


def _untuned(params: Params) -> Requirement:
    """The untuned reading, whose examples and layers nobody looks at."""
    read = {name: getattr(params, name) for name in reads.NAMES}
    one = Params(
        losses="", directions=RANDOM, layers=(0,), examples_extract=1, examples_select=1, examples_report=1
    )
    return Requirement(job=__name__, params=canonical(replace(one, **read)))


def weight_changes(
    params: Params, tensors: Mapping[str, np.ndarray]
) -> "list[dict[str | int, np.ndarray | tuple[np.ndarray, np.ndarray]]]":
    """The one change that an artifact holds. Raises SpecError if the weights were not kept."""
    from jobs.engine.tuned import tuned_matrices

    names = tuned_matrices(tensors)
    if not names:
        raise SpecError("the weights of this tuning were not kept; run it with keeps=true, and with losses")
    if params.rank:
        return [{name: (tensors[f"{name}.b"], tensors[f"{name}.a"]) for name in names}]
    return [{name: tensors[f"{name}.weight"] for name in names}]


def check(params: Params) -> None:
    """The datasets and directions can be read. Raises SpecError if not."""
    _examples(params)
    reads.check(params)
    for name in _direction_names(params):
        if name != RANDOM:
            extract.check(parse_use(name).params)


def _examples(params: Params) -> list[Example]:
    return load(
        params.asked,
        params.examples,
        extract=params.examples_extract,
        select=params.examples_select,
        report=params.examples_report,
    )


def canonical(params: Params) -> Params:
    """Without losses nothing is trained; a list of layers says it all."""
    params = replace(params, first=0, depth=1, layers=params.trained_layers)
    if params.losses:
        return params
    trains = (
        "token_weight",
        "blocks",
        "rank",
        "epochs",
        "batch",
        "learning_rate",
        "weight_decay",
        "warmup",
        "decay",
    )
    ends = ("until", "patience", "window", "held_out", "keeps", "examples_extract")
    return replace(params, **{name: getattr(_DEFAULT, name) for name in (*trains, *ends)})


_DEFAULT = Params()


def run(replica: "Replica", rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """Tune for each row, from the untuned weights each time.

    Tensors of the outcome, float32: for each matrix `NAME.weight`, or `NAME.a` (rank, inputs) and `NAME.b`
    (outputs, rank) whose product is added to it; `losses` (steps,), the weighted sum; `loss.NAME` (steps,),
    each without its factor; `validation`, what was found on held-out examples; `cosine_map`, what
    `jobs.tuning.reading.cosine_map` has of the split report. Tables: `items`, `completions`. A row
    whose losses are not finite any more is infeasible.

    Raises:
        SpecError: If a layer or matrix does not exist, a loss reads below what it trains, or a prompt is too
            long or too short.
        ModelError: If there is no chat template, or nothing that could be tuned.
    """
    for index, row in enumerate(rows):
        yield index, _run(replica, row, context)


def _run(replica: "Replica", row: Row, context: Context) -> Outcome:
    from jobs.tuning.outcomes import Training
    from jobs.tuning.reading import answers
    from jobs.tuning.texts import Texts, contents
    from jobs.tuning.tuned_weights import tuned_weights

    params: Params = row.params
    if params.trained_layers[-1] >= replica.layers:
        raise SpecError(
            f"layer {params.trained_layers[-1]} does not exist; the model has 0 to {replica.layers - 1}"
        )
    examples = _examples(params)
    held = [each for each in examples if each.split != "extract"]
    aims, directions = _aims(params), _directions(replica, row, context)
    lowest = min(params.trained_layers)
    prompts = Texts.kept(replica, [_text(replica, each, params) for each in held], first=lowest)
    firsts = [_first_tokens(replica, each) for each in held]
    told = contents(prompts.texts), *firsts, *aims, *(each.numpy().tobytes() for each in directions.values())
    before = replica.keep((__name__, lowest, told), lambda: answers(prompts, firsts, aims, directions))
    reader = Reader.kept(replica, params) if params.reads else None
    if not params.losses:
        found = reader.read(None) if reader else None
        kept = reader.kept_tensors(found) if reader and found else {}
        shown = {**kept, **_map(replica, row, context, reader, found)}
        return _outcome(row, held, (before, before), _Read(reader, found, kept), None, shown)
    learned = [_text(replica, each, params) for each in examples if each.split == "extract"]
    learned, validated = learned[: len(learned) - params.held_out], learned[len(learned) - params.held_out :]
    reference = context.artifact(_untuned(params)) if reader else {}
    with tuned_weights(replica, learned, _wanted(row), directions, validated=validated) as tuned:
        if tuned.curve.ended == "diverged":
            return Outcome(status=Status.INFEASIBLE, reason=_DIVERGED)
        after = answers(prompts, firsts, aims, directions)
        found = reader.read(reference["log_probabilities"]) if reader else None
        weights = (
            {name: each.numpy() for name, each in tuned.trained.tensors().items()} if params.keeps else {}
        )
        weights |= _map(replica, row, context, reader, found)
        training = Training(tuned.curve, len(tuned.trained.changed()), len(tuned.trained.parameters))
    if reader and found:
        found = reader.untuned_nll(found)
    return _outcome(row, held, (before, after), _Read(reader, found, reference), training, weights)


class _Read(NamedTuple):
    """What was read beside the examples, if anything, and what it is compared with."""

    reader: Reader | None
    found: Found | None
    before: Mapping[str, np.ndarray]


_REACH = 20
"""Tokens of the map on either side of where the reply begins, as in the figure of arXiv:2409.06927."""


def _map(
    replica: "Replica", row: Row, context: Context, reader: Reader | None, found: Found | None
) -> dict[str, np.ndarray]:
    """Cosines at every layer before and during the replies, as an artifact has them."""
    import torch

    from jobs.tuning.reading import cosine_map

    if reader is None or found is None:
        return {}
    layers = range(replica.layers)
    try:
        directions = [_direction(replica, row, context, row.params.directions, layer) for layer in layers]
    except SpecError:  # a file may have directions of some layers alone
        return {}
    prompts, replies = reader.said(found, "report")
    return {"cosine_map": cosine_map(replica, prompts, replies, torch.stack(directions), reach=_REACH)}


_DIVERGED = "the losses are not finite any more; use a smaller learning_rate, or a wider dtype"


def _text(replica: "Replica", example: Example, params: Params) -> "Text":
    """As it is trained on, with the replies that the losses are of."""
    from jobs.tuning.texts import Text

    prompt = encode_prompt(replica, example.prompt, params)
    kind = next(iter(_replies(params)), None) if example.split == "extract" else None
    positive, negative = (replica.encode_continuation(each) for each in (example.positive, example.negative))
    if params.asked == "replies" and replica.tokenizer.eos_token_id is not None:
        positive = [*positive, int(replica.tokenizer.eos_token_id)]
    reply, others = {
        None: ([], []),
        "positive": (positive, []),
        "negative": (negative, []),
        "either": (positive, [negative]),
    }[kind]
    if others and len(positive) != len(negative):
        raise SpecError(
            f"losses: {example.positive!r} and {example.negative!r} are not of one length in tokens, which "
            'tokens{"replies": "either"} needs'
        )
    replica.check_text([*prompt, *reply])
    return Text(prompt, reply, others)


def _first_tokens(replica: "Replica", example: Example) -> tuple[int, int] | None:
    if not example.positive or not example.negative:
        return None
    first, other = (replica.encode_continuation(each)[0] for each in (example.positive, example.negative))
    return first, other


def _aims(params: Params) -> list["Aim"]:
    """Where the losses turn states; where nothing is turned, the last tokens in the trained layers."""
    from jobs.tuning.reading import Aim
    from jobs.tuning.terms import read_layers

    turned = [
        Aim(layer, loss.offsets, loss.directions)
        for loss in _losses(params)
        if isinstance(loss, Projection)
        for layer in read_layers(loss, params.trained_layers)
    ]
    return turned or [Aim(layer, (1,), params.directions) for layer in params.trained_layers]


def _losses(params: Params) -> list[Loss]:
    """With the names of their directions and the further factor filled in."""
    return [_filled_in(loss, params) for loss in parse_losses(params.losses)]


def _filled_in(loss: Loss, params: Params) -> Loss:
    match loss:
        case Projection():
            return replace(loss, directions=loss.directions or params.directions)
        case Tokens():
            return replace(loss, weight=loss.weight * params.token_weight)
    return loss


def _directions(replica: "Replica", row: Row, context: Context) -> "Directions":
    """Of unit norm, by name and layer."""
    return {
        (aim.directions, aim.layer): _direction(replica, row, context, aim.directions, aim.layer)
        for aim in _aims(row.params)
    }


def _direction(replica: "Replica", row: Row, context: Context, name: str, layer: int) -> "Tensor":
    """Shape (hidden,); a random one is the same at every layer."""
    import torch

    if name != RANDOM:
        return torch.tensor(extract.load_direction(context, parse_use(name).params, layer)[0])
    drawn_D = torch.randn(replica.hidden_size, generator=torch.Generator().manual_seed(row.seed))
    unit_D: Tensor = drawn_D / drawn_D.norm()
    return unit_D


def _wanted(row: Row) -> "Wanted":
    from jobs.tuning.training import Recipe
    from jobs.tuning.tuned_weights import Wanted

    params: Params = row.params
    recipe = Recipe(
        epochs=params.epochs,
        batch=params.batch,
        learning_rate=params.learning_rate,
        weight_decay=params.weight_decay,
        warmup=params.warmup,
        decay=params.decay,
        until=params.until,
        patience=params.patience,
        window=params.window,
        seed=row.seed,
    )
    return Wanted(_losses(params), params.trained_layers, params.blocks, params.rank, recipe)


def _outcome(
    row: Row,
    held: Sequence[Example],
    answers: "tuple[Answers, Answers]",
    read: _Read,
    training: "Training | None",
    tensors: Mapping[str, np.ndarray],
) -> Outcome:
    """Of the answers before and after."""
    from jobs.tuning.outcomes import curves, example_metrics, item_rows, training_metrics

    if read.found and read.found.flaw is not None:
        return Outcome(status=Status.FAILED, reason=read.found.flaw)
    of_training = training_metrics(training, row.params.window)
    metrics = {
        split: {**dict.fromkeys(METRICS, math.nan), **example_metrics(split, held, *answers), **of_training}
        for split in ("select", "report")
    }
    items = item_rows(held, answers[1])
    tables = {"items": items}
    if read.reader and read.found:
        for split, values in read.reader.metrics(read.found, read.before, row.seed).items():
            metrics[split] |= values
        tables = read.reader.tables(read.found, after=len(items))
        tables["items"] = items + tables["items"]
    return Outcome(metrics=metrics, tables=tables, tensors={**tensors, **curves(training)})
