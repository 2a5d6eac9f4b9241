"""Job: hidden states of prompts and of what follows them, unsteered or steered -> the table `activations`."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jobs import extract
from jobs.data.files import read_rows
from jobs.data.pairs import Pair, load_pairs
from jobs.data.prompts import OpenPrompt
from jobs.errors import SpecError
from jobs.spec import SPLITS, Context, Metric, Outcome, Requirement, Row, Size

if TYPE_CHECKING:
    import numpy as np

    from jobs.engine.capture import Captured, Wanted
    from jobs.engine.interventions import Add
    from jobs.engine.replica import Replica


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Which states of which prompts, and the steering under which they are read.

    Attributes:
        source: `prompts`: `data` is a dataset of open prompts. `pairs`: `data` is a dataset of contrast
            pairs, whose two texts are read raw and count as the split select.
        data: Name or path of the dataset.
        count: Number of prompts or pairs, taken from the start; 0 takes all.
        chat: Whether open prompts are asked in the model's chat template; otherwise they are read raw.
        layers: Blocks, counted from 0, or `all`.
        sites: The residual stream `before` and `after` a block, and what its `attention` and `mlp` add.
        offsets: Tokens of the prompt, counted from its end (1 = the last one); `all` takes every token.
        mean: Whether the states of `all` tokens, or of the generated ones, are averaged.
        max_new_tokens: Most tokens of a greedy completion, whose states are captured too; 0 = none.
        layer: Block whose output is steered, counted from 0.
        dose: Strength relative to the mean residual norm at that layer; 0 = unsteered.
        pairs: Contrast pairs that the direction comes from, as a mean difference.
    """

    source: Literal["prompts", "pairs"] = "prompts"
    data: str = "open_prompts"
    count: int = 0
    chat: bool = True
    layers: tuple[int, ...] | Literal["all"] = "all"
    sites: tuple[Literal["before", "after", "attention", "mlp"], ...] = ("after",)
    offsets: tuple[int, ...] | Literal["all"] = (1,)
    mean: bool = False
    max_new_tokens: int = 0
    layer: int = 0
    dose: float = 0.0
    pairs: str = "tone_pairs"

    def __post_init__(self) -> None:
        for name in ("count", "max_new_tokens", "layer"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}; it takes 0 or more")
        for name in ("layers", "sites", "offsets"):
            values = getattr(self, name)
            if values != "all" and len(set(values)) < len(values):
                raise ValueError(f"{name}={values}; each once")
        if not self.layers or not self.sites or not (self.offsets or self.max_new_tokens):
            raise ValueError(
                f"layers={self.layers}, sites={self.sites}, offsets={self.offsets} and max_new_tokens="
                f"{self.max_new_tokens} capture nothing; name layers, sites, and offsets or new tokens"
            )
        if isinstance(self.layers, tuple) and any(layer < 0 for layer in self.layers):
            raise ValueError(f"layers={self.layers}; layers are counted from 0")
        if isinstance(self.offsets, tuple) and any(offset < 1 for offset in self.offsets):
            raise ValueError(f"offsets={self.offsets}; tokens are counted from the end, 1 = the last one")
        if not math.isfinite(self.dose):
            raise ValueError(f"dose={self.dose}; it takes a finite number of residual norms")


METRICS = {
    "vectors": Metric("vectors", "states that were captured"),
    "norm": Metric("residual-stream units", "mean Euclidean norm of the states"),
}
PACK_BY = ("source", "data", "count", "chat", "layers", "sites", "offsets", "mean", "max_new_tokens")
DATA = ("data", "pairs")
LAYERS = ("layer", "layers")


class _Item(NamedTuple):
    """A prompt: its number, its split, the class of a contrast pair's text, and what it says."""

    item: int
    split: str
    label: str | None
    text: str


def size(params: Params) -> Size:
    """About 45 tokens a prompt, and what is generated twice: written and read again."""
    sequences = params.count or 100
    return Size(sequences, sequences * (45 + 2 * params.max_new_tokens))


def requires(params: Params) -> Sequence[Requirement]:
    """The direction, if it is steered."""
    if params.dose == 0:
        return ()
    return (Requirement(job="jobs.extract", params=_extraction(params)),)


def check(params: Params) -> None:
    """The prompts and the pairs can be read. Raises SpecError if not."""
    extract.check(_extraction(params))
    _read_items(params)


def canonical(params: Params) -> Params:
    """A dose of 0 is the same work at every layer and with all pairs; contrast pairs are always raw."""
    if params.source == "pairs":
        params = replace(params, chat=False)
    return params if params.dose else replace(params, layer=0, dose=0.0, pairs=Params().pairs)


def _extraction(params: Params) -> extract.Params:
    return extract.Params(pairs=params.pairs)


def _read_items(params: Params) -> list[_Item]:
    if params.source == "pairs":
        found = [
            _Item(number, "select", label, text)
            for number, pair in enumerate(load_pairs(params.data))
            for label, text in zip(Pair._fields, pair, strict=True)
        ]
    else:
        rows = read_rows(params.data, OpenPrompt._fields)
        if wrong := sorted({row["split"] for row in rows} - set(SPLITS)):
            raise SpecError(f"{params.data} has the splits {wrong}; it takes {list(SPLITS)}")
        found = [_Item(number, row["split"], None, row["prompt"]) for number, row in enumerate(rows)]
    available = found[-1].item + 1
    if available < params.count:
        raise SpecError(f"{params.data} has {available} {params.source}; count={params.count} are asked for")
    return [item for item in found if params.count == 0 or item.item < params.count]


def run(replica: "Replica", rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """Capture every row of the pack in shared batches.

    The states go into the table `activations` as they come, with their norms by prompt, layer and site in
    `items` (named such as `norm_after_3`) and what was generated in `completions`.
    """
    from jobs.engine.capture import capture
    from jobs.engine.decoding import Work
    from jobs.engine.tables import row_tables

    params = rows[0].params
    items = _read_items(params)
    prompts = [_encode(replica, params, item.text) for item in items]
    tables = row_tables(replica, [_additions(context, row.params) for row in rows])
    work = [Work(prompt, row) for row in range(len(rows)) for prompt in range(len(prompts))]
    sums = [_Sums(left=len(items)) for _ in rows]
    for index, found in capture(replica, prompts, tables, work, _wanted(replica, params, prompts)):
        prompt, row, _ = work[index]
        norms = _write(context, row, items[prompt], found)
        if params.max_new_tokens:
            context.write(row, "completions", _completion(replica, items[prompt], found))
        if sums[row].add(items[prompt].split, norms):
            yield row, Outcome(metrics=sums[row].metrics())


def _encode(replica: "Replica", params: Params, text: str) -> list[int]:
    return replica.encode_chat(text) if params.source == "prompts" and params.chat else replica.encode(text)


def _additions(context: Context, params: Params) -> "list[Add]":
    from jobs.engine.interventions import Add

    if params.dose == 0:
        return []
    direction, multiplier = extract.load_direction(context, _extraction(params), params.layer, params.dose)
    return [Add(layer=params.layer, vector=direction * multiplier)]


def _wanted(replica: "Replica", params: Params, prompts: Sequence[Sequence[int]]) -> "Wanted":
    from jobs.engine.capture import Wanted
    from jobs.engine.decoding import Decoding
    from jobs.engine.positions import every_token, from_end

    offsets = params.offsets
    return Wanted(
        layers=range(replica.layers) if params.layers == "all" else params.layers,
        sites=params.sites,
        positions=every_token(prompts) if offsets == "all" else from_end(prompts, offsets),
        decoding=Decoding(max_new_tokens=params.max_new_tokens) if params.max_new_tokens else None,
        mean=params.mean,
    )


def _write(context: Context, row: int, item: _Item, found: "Captured") -> "np.ndarray":
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
    context.write(row, "activations", {**common, **columns, "vector": vectors})
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


class _Sums:
    """Number and norms of a row's states by split, until none of its prompts is left."""

    def __init__(self, *, left: int) -> None:
        self._left = left
        self._norms: dict[str, tuple[int, float]] = {}

    def add(self, split: str, norms: "np.ndarray") -> bool:
        """Count a prompt's states; says whether it was the last one."""
        number, total = self._norms.get(split, (0, 0.0))
        self._norms[split] = (number + norms.size, total + float(norms.sum()))
        self._left -= 1
        return self._left == 0

    def metrics(self) -> dict[str, dict[str, float]]:
        return {
            split: {"vectors": float(number), "norm": total / number if number else math.nan}
            for split, (number, total) in self._norms.items()
        }
