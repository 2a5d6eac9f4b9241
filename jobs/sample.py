"""Job: what the unsteered model says, sampled several times, or its likeliest reply, to compare with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.asking import check_asking, encode_prompt
from jobs.checks import at_least
from jobs.data.prompts import OpenPrompt, load_open_prompts
from jobs.reading.behaviours import METRICS as BEHAVIOURS
from jobs.reading.behaviours import Reading
from jobs.spec import UNSTEERED, Context, Outcome, Requirement, Row, Size, Status

if TYPE_CHECKING:
    from jobs.engine.replica import Replica


@dataclass(frozen=True, slots=True, kw_only=True)
class Params(Reading):
    """What is sampled, and how often.

    Attributes:
        samples: Completions of each prompt.
        temperature: Divides the logits before a token is drawn; 0 takes the likeliest, in the one sample that
            there is then.
        prompts: Dataset of open prompts.
        learn_from: How many prompts of the split extract are completed.
        learn_after: How many of them are passed over first.
        chat: Whether prompts are asked in the model's chat template; otherwise they stand raw.
        system: System message; None leaves what the model's template does by itself.
    """

    samples: int = 16
    temperature: float = 1.0
    prompts: str = "elicitation_prompts"
    learn_from: int = 1
    learn_after: int = 0
    chat: bool = True
    system: str | None = None

    def __post_init__(self) -> None:
        check_asking(self)
        self.check_reading()
        at_least(self, 1, "samples")
        at_least(self, 0, "learn_from", "learn_after", "temperature")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"samples={self.samples}, temperature=0; all of them would be the same: give 1")


METRICS = BEHAVIOURS
SHARED = (
    *("prompts", "learn_from", "learn_after", "read_on", "chat", "system", "max_new_tokens"),
    *("most_nll", "most_repetition", "encoder"),
)
"""Parameters that a job of vectors has too, under the same names."""
PACK_BY = ("samples", "temperature", *SHARED)
DATA = ("prompts",)
LAYERS: tuple[str, ...] = ()


def size(params: Params) -> Size:
    """About 45 tokens a prompt; completions are read twice."""
    sequences = params.samples * (params.learn_from + 2 * params.read_on)
    return Size(sequences, 2 * sequences * (45 + params.max_new_tokens))


def requires(params: Params) -> Sequence[Requirement]:
    """Nothing."""
    return ()


def unsteered_reply(params: Any) -> Requirement:
    """The likeliest reply to every prompt that a job of vectors completes, with the parameters SHARED."""
    shared = {name: getattr(params, name) for name in SHARED}
    return Requirement(job=__name__, params=Params(samples=1, temperature=0.0, **shared))


def check(params: Params) -> None:
    """The prompts can be read. Raises SpecError if not."""
    _read_prompts(params)


def canonical(params: Params) -> Params:
    """Every parameter matters."""
    return params


def _read_prompts(params: Params) -> list[OpenPrompt]:
    numbers = {"extract": params.learn_from, "after": params.learn_after}
    return load_open_prompts(params.prompts, params.read_on, params.read_on, **numbers)


def run(replica: "Replica", rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """Sample for every row of the pack in shared batches; a text depends on the row's seed, not on the pack.

    Tensors of the outcome: what `behaviours.Behaviours` has. Table: `completions`, whose
    `item` is prompt x samples + sample, each from 0.

    Raises:
        ModelError: If there is no chat template, or the encoder is absent.
    """
    from jobs.engine.tables import row_tables
    from jobs.reading.sayings import completion_rows, sayings

    params = rows[0].params
    prompts = _read_prompts(params)
    encoded = [encode_prompt(replica, prompt.prompt, params) for prompt in prompts]
    tables = row_tables(replica, [[] for _ in range(len(rows) * params.samples)])
    for index, found in sayings(
        replica,
        [encoded] * len(rows),
        tables,
        vectors=params.samples,
        max_new_tokens=params.max_new_tokens,
        temperature=params.temperature,
        seeds=[row.seed for row in rows],
    ):
        if found.flaw is not None:
            yield index, Outcome(status=Status.FAILED, reason=found.flaw)
            continue
        read = rows[index].params.behaviours(prompts, found.said_PV)
        variant = "sample" if params.temperature else UNSTEERED
        completions = completion_rows(prompts, found.said_PV, variant)
        yield index, Outcome(metrics=read.metrics, tables={"completions": completions}, tensors=read.tensors)
