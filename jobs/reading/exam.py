"""What a model knows, and how much neutral text surprises it, under each configuration of a pack.

N questions, W windows, T tokens, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jobs.data.multiple_choice import LETTERS, Question
from jobs.data.texts import Text
from jobs.engine.groups import in_parts, next_token, once
from jobs.engine.memory import in_batches, pass_tokens
from jobs.engine.replica import Replica
from jobs.engine.tables import RowTables, Steering, steered
from jobs.errors import SpecError
from jobs.reading.completions import NOT_FINITE, missed
from jobs.reading.rereading import cost
from jobs.scoring.logits import Surprise, Window, perplexity, sliding_windows, window_surprise
from jobs.scoring.statistics import paired_bootstrap, wilson_interval

Form = Literal["words", "letters"]


class Passage(NamedTuple):
    """A stretch of neutral text that is read at once.

    Attributes:
        split: `extract`, `select` or `report`.
        tokens: Token ids.
        new: How many of its last tokens are scored here; those before are read as their context.
    """

    split: str
    tokens: list[int]
    new: int

    @property
    def context(self) -> int:
        """Number of tokens that are read and not scored here."""
        return len(self.tokens) - self.new


class Results(NamedTuple):
    """One configuration's answers and surprise.

    Attributes:
        p_answer_N: Probability of each right answer among the answers of its question, float64.
        correct_N: 1 where the right answer is likelier than every other, else 0, float64.
        nats_W: Sum of -ln p over the scored tokens of each passage, float64.
        flaw: Why the configuration cannot be judged; None if nothing is wrong.
    """

    p_answer_N: np.ndarray
    correct_N: np.ndarray
    nats_W: np.ndarray
    flaw: str | None


class Exam:
    """Questions and neutral text, tokenised for one model.

    Args:
        replica: The model.
        questions: Multiple choice.
        form: `words`: after the bare question the first tokens of the answers are compared.
            `letters`: the answers are listed, and their letters are compared.
        texts: Neutral text; the texts of a split are joined by blank lines.
        window: Most tokens that are read at once.
        stride: Tokens that each further window scores.
        tokens: Most tokens of each split's text, from the start; 0 takes all.

    Attributes:
        questions: As given.
        passages: The windows of all splits.

    Raises:
        SpecError: If answers begin with the same token, or a window is longer than the model's context.
    """

    def __init__(
        self,
        replica: Replica,
        questions: Sequence[Question],
        form: Form,
        texts: Sequence[Text],
        *,
        window: int,
        stride: int,
        tokens: int,
    ) -> None:
        self.replica = replica
        self.questions = list(questions)
        self._prompts = [replica.encode(_asked(question, form)) for question in questions]
        self._choices = [_first_tokens(replica, question, form) for question in questions]
        self.passages = [
            Passage(split, ids[part.start : part.stop], part.new)
            for split, ids in _joined(replica, texts, tokens).items()
            for part in _windows(replica, ids, window=window, stride=stride)
        ]

    def sit(self, tables: RowTables) -> Iterator[tuple[int, Results]]:
        """Results of every row, each as soon as it is finished.

        Of a passage the context counts as the prompt, and what is scored as generated.
        """
        answers = dict(self._answers(tables))
        for row, (nats_W, flaw) in self._surprises(tables):
            logits = answers[row]
            finite = np.isfinite(nats_W).all() and all(bool(each.isfinite().all()) for each in logits)
            p_answer_N, correct_N = self._judged(logits)
            yield row, Results(p_answer_N, correct_N, nats_W, flaw if finite else NOT_FINITE)

    def _answers(self, tables: RowTables) -> Iterator[tuple[int, list[Tensor]]]:
        """For each row and question, the logits of its answers, float64."""
        number = len(self.questions)
        work = [(question, row) for row in range(tables.rows) for question in range(number)]
        found = next_token(self.replica, self._prompts, tables, work)
        logits = ((index, at[self._choices[index % number]].double().cpu()) for index, at in found)
        return in_parts(logits, number)

    def _judged(self, logits: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
        p_answer, correct = [], []
        for question, found in zip(self.questions, logits, strict=True):
            others = torch.cat([found[: question.answer], found[question.answer + 1 :]])
            p_answer.append(float(found.softmax(dim=0)[question.answer]))
            correct.append(float(found[question.answer] > others.max()))
        return np.array(p_answer), np.array(correct)

    def _surprises(self, tables: RowTables) -> Iterator[tuple[int, tuple[np.ndarray, str | None]]]:
        """For each row, the nats of each passage, and where steering did not act as it was to."""
        tokens = sum(len(passage.tokens) for passage in self.passages)
        together = max(1, pass_tokens(self.replica) // max(1, tokens))

        def read(rows: list[int]) -> Iterator[tuple[int, tuple[np.ndarray, str | None]]]:
            for start in range(0, len(rows), together):
                yield from self._read(tables, rows[start : start + together])

        return once(tables.same, read)

    def _read(
        self, tables: RowTables, rows: Sequence[int]
    ) -> Iterator[tuple[int, tuple[np.ndarray, str | None]]]:
        work = [(row, passage) for row in rows for passage in self.passages]
        costs = [
            cost(self.replica, len(passage.tokens), kept=passage.new + 1) for passage in self.passages
        ] * len(rows)

        def score(batch: list[int]) -> list[tuple[float, str | None]]:
            return self._scored(tables, [work[index] for index in batch])

        found = in_batches(self.replica, costs, score)
        for place, row in enumerate(rows):
            mine = found[place * len(self.passages) : (place + 1) * len(self.passages)]
            flaws = [flaw for _, flaw in mine if flaw is not None]
            yield row, (np.array([nats for nats, _ in mine]), flaws[0] if flaws else None)

    @torch.inference_mode()
    def _scored(
        self, tables: RowTables, work: Sequence[tuple[int, Passage]]
    ) -> list[tuple[float, str | None]]:
        """Nats of passages under rows, each with where it was not changed as it was to be."""
        steering = Steering(tables.take([row for row, _ in work]), [each.context for _, each in work])
        with steered(self.replica, steering):
            logits_STV = self.replica.logits(
                [each.tokens for _, each in work], keep=max(each.new for _, each in work) + 1
            )
        found = []
        for (row, each), logits_TV, fired in zip(work, logits_STV, steering.counts(), strict=True):
            tokens_T = torch.tensor(each.tokens, device=logits_TV.device)
            nats = window_surprise(logits_TV, tokens_T, each.new).nats
            found.append((nats, missed(fired, tables.intended(row, each.context, len(each.tokens)))))
        return found


def _asked(question: Question, form: Form) -> str:
    lines = [f"Question: {question.text}"]
    if form == "letters":
        lines += [f"{letter}. {text}" for letter, text in zip(LETTERS, question.choices, strict=False)]
    return "\n".join([*lines, "Answer:"])


def _first_tokens(replica: Replica, question: Question, form: Form) -> list[int]:
    """Of each answer; they differ."""
    words = question.choices if form == "words" else LETTERS[: len(question.choices)]
    first = [replica.encode_continuation(f" {word}")[0] for word in words]
    if len(set(first)) < len(first):
        raise SpecError(
            f"question {question.text!r}: of {list(words)} some begin with the same token of this model and "
            "cannot be told apart by it; " + ("use form='letters'" if form == "words" else "ask no letters")
        )
    return first


def _joined(replica: Replica, texts: Sequence[Text], tokens: int) -> dict[str, list[int]]:
    """Split -> token ids of its texts."""
    splits: dict[str, list[str]] = {}
    for text in texts:
        splits.setdefault(text.split, []).append(text.text)
    return {split: replica.encode("\n\n".join(found))[: tokens or None] for split, found in splits.items()}


def _windows(replica: Replica, ids: Sequence[int], *, window: int, stride: int) -> list[Window]:
    replica.check_length(min(window, len(ids)))
    return sliding_windows(len(ids), window=window, stride=stride)


def split_metrics(
    exam: Exam, results: Results, before: Mapping[str, np.ndarray], *, seed: int
) -> dict[str, dict[str, float]]:
    """Metrics of each split, NaN where it has no questions or no text.

    Args:
        exam: What was asked and read.
        results: What came.
        before: `correct` and `nats` of the unsteered model.
        seed: Of the bootstrap's draws.
    """
    splits = dict.fromkeys(
        [*(each.split for each in exam.questions), *(each.split for each in exam.passages)]
    )
    return {
        split: {
            **_answer_metrics(exam, results, before["correct"], split, seed),
            **_text_metrics(exam, results, before["nats"], split, seed),
        }
        for split in splits
    }


def _answer_metrics(
    exam: Exam, results: Results, before_N: np.ndarray, split: str, seed: int
) -> dict[str, float]:
    chosen = [index for index, question in enumerate(exam.questions) if question.split == split]
    correct = results.correct_N[chosen]
    interval = wilson_interval(int(correct.sum()), len(chosen))
    change = paired_bootstrap(correct.tolist(), before_N[chosen].tolist(), seed=seed)
    nothing = float("nan")
    guessed = [1 / len(exam.questions[index].choices) for index in chosen]
    return {
        "accuracy": float(correct.mean()) if chosen else nothing,
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        "chance": sum(guessed) / len(guessed) if chosen else nothing,
        "accuracy_change": change.mean,
        "accuracy_change_low": change.interval.low,
        "accuracy_change_high": change.interval.high,
        "p_answer": float(results.p_answer_N[chosen].mean()) if chosen else nothing,
    }


def _text_metrics(
    exam: Exam, results: Results, before_W: np.ndarray, split: str, seed: int
) -> dict[str, float]:
    chosen = [index for index, passage in enumerate(exam.passages) if passage.split == split]
    parts = [Surprise(float(results.nats_W[index]), exam.passages[index].new) for index in chosen]
    tokens = sum(part.tokens for part in parts)
    # Scaled so that their mean over windows is the mean over tokens, whatever the lengths of the windows.
    scale = len(chosen) / tokens if tokens else float("nan")
    change = paired_bootstrap(
        (results.nats_W[chosen] * scale).tolist(), (before_W[chosen] * scale).tolist(), seed=seed
    )
    return {
        "perplexity": perplexity(parts),
        "text_nll": sum(part.nats for part in parts) / tokens if tokens else float("nan"),
        "text_nll_change": change.mean,
        "text_nll_change_low": change.interval.low,
        "text_nll_change_high": change.interval.high,
    }


def item_rows(exam: Exam, results: Results) -> list[dict[str, Any]]:
    """Rows of the table `items`: questions, then passages, numbered through."""
    number = len(exam.questions)
    answered = [
        {"split": question.split, "item": index, "prompt": question.text, "label": question.topic}
        | {"name": name, "value": float(values[index])}
        for name, values in (("correct", results.correct_N), ("p_answer", results.p_answer_N))
        for index, question in enumerate(exam.questions)
    ]
    read = [
        {
            "split": passage.split,
            "item": number + index,
            "prompt": exam.replica.decode(passage.tokens[-passage.new :]),
            "name": "text_nll",
            "value": float(results.nats_W[index]) / passage.new,
        }
        for index, passage in enumerate(exam.passages)
    ]
    return answered + read
