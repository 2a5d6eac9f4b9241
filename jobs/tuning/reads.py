"""What is read of a tuned model beside the examples: choices, replies, questions and neutral text.

Torch is imported where it is needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from jobs.checks import at_least
from jobs.data.multiple_choice import load_multiple_choice
from jobs.data.prompts import load_choices, load_open_prompts
from jobs.data.texts import load_texts
from jobs.resolve import data_hash
from jobs.spec import Metric

if TYPE_CHECKING:
    from jobs.engine.replica import Replica
    from jobs.reading.exam import Results
    from jobs.reading.readout import Reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """The prompts, questions and text: those of `jobs.steer` and `jobs.capability`.

    Attributes:
        reads: Whether any of it is read.
        choices: Dataset of two-way choices.
        choices_select: Choices of the split select.
        choices_report: Choices of the split report.
        prompts: Dataset of open prompts.
        prompts_select: Open prompts of the split select.
        prompts_report: Open prompts of the split report.
        max_new_tokens: Most tokens of a completion.
        questions: Dataset of multiple choice.
        count: Number of questions; 0 takes all.
        form: `words`: the first tokens of the answers compete; `letters`: the answers are listed and their
            letters compete.
        text: Dataset of neutral text.
        text_tokens: Most tokens of each split's text; 0 takes all.
        text_window: Most tokens of the text that are read at once.
        stride: Tokens that each further window scores.
    """

    reads: bool = True
    choices: str = "tone_choices"
    choices_select: int = 40
    choices_report: int = 16
    prompts: str = "open_prompts"
    prompts_select: int = 6
    prompts_report: int = 2
    max_new_tokens: int = 20
    questions: str = "simple_questions"
    count: int = 0
    form: Literal["words", "letters"] = "words"
    text: str = "neutral"
    text_tokens: int = 2048
    text_window: int = 256
    stride: int = 128

    def check_reads(self) -> None:
        """Raises ValueError if a value cannot be meant."""
        at_least(self, 0, "count")
        at_least(
            self, 1, "choices_select", "choices_report", "prompts_select", "prompts_report", "max_new_tokens"
        )
        if self.text_tokens < 0 or self.text_tokens == 1:
            raise ValueError(f"text_tokens={self.text_tokens}; it takes 2 or more, or 0 for all")
        if not 1 <= self.stride < self.text_window:
            raise ValueError(
                f"stride={self.stride}, text_window={self.text_window}; it takes 1 <= stride < text_window"
            )

    @property
    def passes(self) -> tuple[int, int]:
        """About how many sequences and tokens are read."""
        choices = self.choices_select + self.choices_report
        prompts = self.prompts_select + self.prompts_report
        questions, text = self.count or 100, 2 * (self.text_tokens or 10_000)
        tokens = 20 * choices + 2 * prompts * (45 + self.max_new_tokens) + 15 * questions
        return choices + prompts + questions, tokens + text * self.text_window // self.stride


NAMES = tuple(Reads.__dataclass_fields__)
DATA = ("choices", "prompts", "questions", "text")
METRICS = {
    "log_odds": Metric("nats", "mean log-odds of the positive over the negative continuation of the choices"),
    "effect": Metric("nats", "shift of log_odds from the untuned model"),
    "effect_low": Metric("nats", "lower end of its 95 % bootstrap interval over choices, paired"),
    "effect_high": Metric("nats", "upper end of its 95 % bootstrap interval over choices, paired"),
    "kl": Metric("nats", "mean KL(untuned || tuned) of the next token after each choice"),
    "nll": Metric("nats/token", "mean negative log-likelihood of the completions under the untuned model"),
    "repetition": Metric("share", "mean share of repeated trigrams in the completions"),
    "empty": Metric("share", "completions without a token"),
    "damage": Metric("nats/token", "rises of nll, repetition and empty over untuned, each at least 0, added"),
    "damage_low": Metric("nats/token", "lower end of its 95 % bootstrap interval over prompts, paired"),
    "damage_high": Metric("nats/token", "upper end of its 95 % bootstrap interval over prompts, paired"),
    "accuracy": Metric("share of questions", "right answer more likely than every other of its question"),
    "accuracy_low": Metric("share of questions", "lower end of accuracy's 95 % Wilson interval"),
    "accuracy_high": Metric("share of questions", "upper end of accuracy's 95 % Wilson interval"),
    "accuracy_change": Metric("share of questions", "accuracy less that of the untuned model"),
    "accuracy_change_low": Metric("share of questions", "lower end of its 95 % bootstrap interval, paired"),
    "accuracy_change_high": Metric("share of questions", "upper end of its 95 % bootstrap interval, paired"),
    "perplexity": Metric("1", "of the neutral text, in sliding windows"),
    "perplexity_rise": Metric("share", "perplexity over that of the untuned model, less 1"),
    "perplexity_rise_low": Metric("share", "lower end of its 95 % bootstrap interval over windows, paired"),
    "perplexity_rise_high": Metric("share", "upper end of its 95 % bootstrap interval over windows, paired"),
}


def check(params: Reads) -> None:
    """The datasets can be read. Raises SpecError if not."""
    if params.reads:
        load_choices(params.choices, params.choices_select, params.choices_report)
        load_open_prompts(params.prompts, params.prompts_select, params.prompts_report)
        load_multiple_choice(params.questions, params.count)
        load_texts(params.text)


class Found(NamedTuple):
    """What was read.

    Attributes:
        reading: Choices and replies.
        results: Answers to the questions, and how the text surprised.
    """

    reading: "Reading"
    results: "Results"

    @property
    def flaw(self) -> str | None:
        """Why it says nothing about the weights; None if nothing is wrong."""
        return self.reading.flaw or self.results.flaw


class Reader:
    """The prompts, questions and text, tokenised for one model."""

    def __init__(self, replica: "Replica", params: Reads) -> None:
        from jobs.reading.exam import Exam
        from jobs.reading.readout import Panel

        self.panel: Panel = Panel(
            replica,
            load_choices(params.choices, params.choices_select, params.choices_report),
            load_open_prompts(params.prompts, params.prompts_select, params.prompts_report),
            max_new_tokens=params.max_new_tokens,
        )
        self.exam: Exam = Exam(
            replica,
            load_multiple_choice(params.questions, params.count),
            params.form,
            load_texts(params.text),
            window=params.text_window,
            stride=params.stride,
            tokens=params.text_tokens,
        )

    @staticmethod
    def kept(replica: "Replica", params: Reads) -> "Reader":
        """The one of the last trial, where it reads the same."""
        values = tuple(getattr(params, name) for name in NAMES)
        data = tuple(data_hash(getattr(params, name)) for name in DATA)
        return replica.keep((__name__, values, data), lambda: Reader(replica, params))

    def read(self, reference: "np.ndarray | None") -> Found:
        """Read the model with the weights as they are.

        Args:
            reference: `unsteered` of the untuned model; None if this is it.
        """
        import torch

        from jobs.engine.tables import row_tables

        nothing = row_tables(self.panel.replica, [[]])
        before = self.panel.unsteered() if reference is None else torch.tensor(reference)
        [(_, reading)] = self.panel.read(nothing, before)
        [(_, results)] = self.exam.sit(nothing)
        return Found(reading, results)

    def untuned_nll(self, found: Found) -> Found:
        """The same with the replies' nll under the weights as they are now, once they are untuned again."""
        return found._replace(reading=self.panel.rescored(found.reading))

    def said(self, found: Found, split: str) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of a split's open prompts, and of the replies to them."""
        return self.panel.said(found.reading, split)

    def kept_tensors(self, found: Found) -> dict[str, np.ndarray]:
        """Of the untuned model: what tunings are compared with."""
        from jobs.reading.effects import COMPARED
        from jobs.reading.readout import split_scores

        scores = split_scores(self.panel, found.reading)
        return {
            "log_probabilities": self.panel.unsteered().numpy(),
            "correct": found.results.correct_N,
            "nats": found.results.nats_W,
            **{f"{split}.{name}": scores[split][name] for split in scores for name in COMPARED},
        }

    def metrics(
        self, found: Found, before: Mapping[str, np.ndarray], seed: int
    ) -> dict[str, dict[str, float]]:
        """Split -> metrics, compared with what `kept_tensors` gave."""
        from jobs.reading.effects import COMPARED, damage, effect
        from jobs.reading.exam import split_metrics
        from jobs.reading.readout import split_means, split_scores

        scores = split_scores(self.panel, found.reading)
        exam = split_metrics(self.exam, found.results, before, seed=seed)
        metrics = split_means(scores)
        for split, values in metrics.items():
            was = {name: before[f"{split}.{name}"] for name in COMPARED}
            values |= effect(scores[split]["log_odds"], was["log_odds"], seed)
            values |= damage(scores[split], was, seed)
            values |= _of_exam(exam.get(split, {}))
        return metrics

    def tables(self, found: Found, *, after: int) -> dict[str, list[dict[str, Any]]]:
        """Rows of `items`, counted on from `after`, and `completions`."""
        from jobs.reading.exam import item_rows
        from jobs.reading.readout import read_tables

        tables = read_tables(self.panel, found.reading)
        choices = [{**row, "item": row["item"] + after} for row in tables["items"]]
        behind = after + len(self.panel.choices)
        exam = [{**row, "item": row["item"] + behind} for row in item_rows(self.exam, found.results)]
        return {**tables, "items": choices + exam}


def _of_exam(found: Mapping[str, float]) -> dict[str, float]:
    same = ("accuracy", "accuracy_low", "accuracy_high", "perplexity")
    changes = ("accuracy_change", "accuracy_change_low", "accuracy_change_high")
    rises = {
        f"perplexity_rise{end}": float(np.expm1(found.get(f"text_nll_change{end}", np.nan)))
        for end in ("", "_low", "_high")
    }
    return {**{name: found.get(name, np.nan) for name in (*same, *changes)}, **rises}
