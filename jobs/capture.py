"""Job: hidden states of prompts and of what follows them, unsteered or steered -> the table `activations`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jobs import extract, steering
from jobs.data.files import read_rows, read_split
from jobs.data.pairs import Pair, load_pairs
from jobs.errors import SpecError
from jobs.spec import Context, Metric, Outcome, Requirement, Row, Size, Status
from jobs.steering import Steering, canonical_steering, directions_of, extraction_of, interventions

if TYPE_CHECKING:
    import numpy as np

    from jobs.engine.capture import Captured, Wanted
    from jobs.engine.replica import Replica


@dataclass(frozen=True, slots=True, kw_only=True)
class Params(Steering):
    """Which states of which prompts, and the steering under which they are read; without a strength, none.

    Attributes:
        pairs: Contrast pairs that the direction comes from.
        source: `prompts`: `data` is a dataset of open prompts, where one without a split counts as select.
            `pairs`: `data` is a dataset of contrast pairs, whose two texts are read raw and count as select.
        data: Name or path of the dataset.
        count: Number of prompts or pairs, taken from the start; 0 takes all.
        chat: Whether open prompts are asked in the model's chat template; otherwise they are read raw.
        capture_layers: Blocks, counted from 0, or `all`.
        capture_sites: The residual stream `before` and `after` a block, and what its `attention` and `mlp`
            add.
        offsets: Tokens of the prompt, counted from its end (1 = the last one); `all` takes every token.
        spans: Columns of the dataset that each name a part of its prompt, which stands there once; the tokens
            of that part are captured under the column's name.
        mean: Whether the states of each name are averaged.
        max_new_tokens: Most tokens of a greedy completion, whose states are captured too; 0 = none.
        stored_as: How states are kept; those of a prompt of which one is too large for float16 are kept in
            float32 all the same.
    """

    layer: int = 0
    pairs: str = "tone_pairs"
    source: Literal["prompts", "pairs"] = "prompts"
    data: str = "open_prompts"
    count: int = 0
    chat: bool = True
    capture_layers: tuple[int, ...] | Literal["all"] = "all"
    capture_sites: tuple[Literal["before", "after", "attention", "mlp"], ...] = ("after",)
    offsets: tuple[int, ...] | Literal["all"] = (1,)
    spans: tuple[str, ...] = ()
    mean: bool = False
    max_new_tokens: int = 0
    stored_as: Literal["float16", "float32"] = "float16"

    def __post_init__(self) -> None:
        self.check_steering(needs_strength=False)
        for name in ("count", "max_new_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}; it takes 0 or more")
        for name in ("capture_layers", "capture_sites", "offsets", "spans"):
            values = getattr(self, name)
            if values != "all" and len(set(values)) < len(values):
                raise ValueError(f"{name}={values}; each once")
        tokens = self.offsets or self.spans or self.max_new_tokens
        if not self.capture_layers or not self.capture_sites or not tokens:
            raise ValueError(
                f"capture_layers={self.capture_layers}, capture_sites={self.capture_sites}, offsets="
                f"{self.offsets}, spans={self.spans} and max_new_tokens={self.max_new_tokens} capture "
                "nothing; name layers, sites, and offsets, spans or new tokens"
            )
        if isinstance(self.capture_layers, tuple) and any(layer < 0 for layer in self.capture_layers):
            raise ValueError(f"capture_layers={self.capture_layers}; layers are counted from 0")
        if isinstance(self.offsets, tuple) and any(offset < 1 for offset in self.offsets):
            raise ValueError(f"offsets={self.offsets}; tokens are counted from the end, 1 = the last one")
        if taken := {"all", "generated", "prompt", "split"} & {*self.spans}:
            raise ValueError(f"spans={self.spans}; {sorted(taken)} have another meaning here")


METRICS = {
    "vectors": Metric("vectors", "states that were captured"),
    "norm": Metric("residual-stream units", "mean Euclidean norm of the states"),
}
PACK_BY = (
    *("source", "data", "count", "chat", "capture_layers", "capture_sites"),
    *("offsets", "spans", "mean", "max_new_tokens", "stored_as"),
)
DATA = ("data", "pairs", *steering.DATA)
LAYERS = ("layer", "layers", "capture_layers")


class _Item(NamedTuple):
    """A prompt: its number, its split, the class of a contrast pair's text, what it says, and its parts."""

    item: int
    split: str
    label: str | None
    text: str
    parts: Mapping[str, str]


def size(params: Params) -> Size:
    """About 45 tokens a prompt, and what is generated twice: written and read again."""
    sequences = params.count or 100
    return Size(sequences, sequences * (45 + 2 * params.max_new_tokens))


def requires(params: Params) -> Sequence[Requirement]:
    """The directions, if it is steered."""
    if params.is_unsteered:
        return ()
    return (directions_of(params, _extraction(params)),)


def check(params: Params) -> None:
    """The prompts and the pairs can be read, and every span stands once in its prompt.

    Raises:
        SpecError: If not.
    """
    extract.check(_extraction(params))
    for item in _read_items(params):
        for name, part in item.parts.items():
            if item.text.count(part) != 1:
                raise SpecError(
                    f"{params.data}, row {item.item} from 0: {name!r} is {part!r}, which has to stand once "
                    f"in {item.text!r}"
                )


def canonical(params: Params) -> Params:
    """The unsteered model is the same work whatever the direction; contrast pairs are always raw."""
    if params.source == "pairs":
        params = replace(params, chat=False)
    return canonical_steering(params, shared=PACK_BY)


def _extraction(params: Params) -> extract.Params:
    return extraction_of(params, pairs=params.pairs)


def _read_items(params: Params) -> list[_Item]:
    if params.source == "pairs":
        if params.spans:
            raise SpecError(f"spans={list(params.spans)} with source='pairs', whose rows name no parts")
        found = [
            _Item(number, "select", label, text, {})
            for number, pair in enumerate(load_pairs(params.data))
            for label, text in zip(Pair._fields, pair, strict=True)
        ]
    else:
        found = []
        for number, row in enumerate(read_rows(params.data, ("prompt", *params.spans))):
            split = read_split(f"{params.data}, row {number} (from 0)", row)
            parts = {name: row[name] for name in params.spans}
            found.append(_Item(number, split, None, row["prompt"], parts))
    available = found[-1].item + 1
    if available < params.count:
        raise SpecError(f"{params.data} has {available} {params.source}; count={params.count} are asked for")
    return [item for item in found if params.count == 0 or item.item < params.count]


def run(replica: "Replica", rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """Capture every row of the pack in shared batches.

    The states go into the table `activations` as they come, with their norms by prompt, layer and site in
    `items` (named such as `norm_after_3`) and what was generated in `completions`. A row fails if a state is
    not finite, or if other tokens were changed than were to be.

    Raises:
        SpecError: If a layer or a token does not exist.
        ModelError: If there is no chat template, or the tokenizer cannot place a span.
    """
    from jobs.engine.capture import capture
    from jobs.engine.decoding import Work
    from jobs.engine.tables import row_tables

    params = rows[0].params
    items = _read_items(params)
    prompts = [_encode(replica, params, item.text) for item in items]
    tables = row_tables(
        replica, [interventions(context, row.params, _extraction(row.params)) for row in rows]
    )
    work = [Work(prompt, row) for row in range(len(rows)) for prompt in range(len(prompts))]
    sums = [_Sums(left=len(items)) for _ in rows]
    for index, found in capture(replica, prompts, tables, work, _wanted(replica, params, items, prompts)):
        prompt, row, _ = work[index]
        norms = _write(context, row, items[prompt], found, params.stored_as)
        if params.max_new_tokens:
            context.write(row, "completions", _completion(replica, items[prompt], found))
        if sums[row].add(items[prompt].split, norms, _flaw(found, norms)):
            yield row, sums[row].outcome()


def _encode(replica: "Replica", params: Params, text: str) -> list[int]:
    return replica.encode_chat(text) if params.chat else replica.encode(text)


def _wanted(
    replica: "Replica", params: Params, items: Sequence[_Item], prompts: Sequence[Sequence[int]]
) -> "Wanted":
    from jobs.engine.capture import Wanted
    from jobs.engine.decoding import Decoding
    from jobs.engine.positions import every_token, from_end

    positions = every_token(prompts) if params.offsets == "all" else from_end(prompts, params.offsets)
    for named, item in zip(positions, items, strict=True):
        named |= _spans(replica, params, item)
    return Wanted(
        layers=range(replica.layers) if params.capture_layers == "all" else params.capture_layers,
        sites=params.capture_sites,
        positions=positions,
        decoding=Decoding(max_new_tokens=params.max_new_tokens) if params.max_new_tokens else None,
        mean=params.mean,
    )


def _spans(replica: "Replica", params: Params, item: _Item) -> dict[str, list[int]]:
    from jobs.engine.positions import find_tokens

    if not item.parts:
        return {}
    text = replica.chat_text([{"role": "user", "content": item.text}]) if params.chat else item.text
    return {
        name: find_tokens(replica, text, part, add_special_tokens=not params.chat)
        for name, part in item.parts.items()
    }


def _flaw(found: "Captured", norms: "np.ndarray") -> str | None:
    import numpy as np

    from jobs.reading.completions import missed

    if not (found.finite and np.isfinite(norms).all()):
        return "states or logits are not finite; use a smaller dose, or a wider dtype"
    return missed(found.fired, found.intended)


def _stored(vectors: "np.ndarray", dtype: str) -> "np.ndarray":
    """States as they are kept; those that are too large for a half are kept in float32."""
    import numpy as np

    with np.errstate(over="ignore"):
        kept = vectors.astype(dtype)
    return kept if np.isfinite(kept).all() else vectors.astype(np.float32)


def _write(context: Context, row: int, item: _Item, found: "Captured", stored_as: str) -> "np.ndarray":
    """Write all states of a prompt, with their norms as items; gives the norms, shape (places, states)."""
    import numpy as np

    common = {"split": item.split, "item": item.item, "label": item.label}
    places = list(found.states)
    each = [(place, point) for place in places for point in found.points]
    vectors = np.concatenate([found.states[place].numpy() for place in places])
    columns = {
        "layer": [place.layer for place, _ in each],
        "site": [place.site for place, _ in each],
        "name": [point.name for _, point in each],
        "position": [point.position for _, point in each],
        "step": [point.step for _, point in each],
    }
    context.write(row, "activations", {**common, **columns, "vector": _stored(vectors, stored_as)})
    norms: np.ndarray = np.linalg.norm(vectors.astype(np.float64), axis=1).reshape(len(places), -1)
    names = [f"norm_{place.site}_{place.layer}" for place in places]
    means = norms.mean(axis=1) if norms.size else [math.nan] * len(places)
    context.write(row, "items", {**common, "prompt": item.text, "name": names, "value": means})
    return norms


def _completion(replica: "Replica", item: _Item, found: "Captured") -> dict[str, Any]:
    return {
        "split": item.split,
        "item": item.item,
        "prompt": item.text,
        "text": [replica.decode(found.completion)],
        "tokens": len(found.completion),
    }


@dataclass(slots=True)
class _Sums:
    """Number and norms of a row's states by split, until none of its prompts is left."""

    left: int
    norms: dict[str, tuple[int, float]] = field(default_factory=dict)
    flaw: str | None = None

    def add(self, split: str, norms: "np.ndarray", flaw: str | None) -> bool:
        """Count a prompt's states and what is wrong with them; says whether it was the last one."""
        number, total = self.norms.get(split, (0, 0.0))
        self.norms[split] = (number + norms.size, total + float(norms.sum()))
        self.flaw = self.flaw or flaw
        self.left -= 1
        return self.left == 0

    def outcome(self) -> Outcome:
        if self.flaw is not None:
            return Outcome(status=Status.FAILED, reason=self.flaw)
        return Outcome(
            metrics={
                split: {"vectors": float(number), "norm": total / number if number else math.nan}
                for split, (number, total) in self.norms.items()
            }
        )
