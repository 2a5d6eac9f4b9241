"""Datasets: what is read, what is refused and how, how claims are balanced, and the project's own texts."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.data.claims import Claim, ClaimQuestion, honesty_pairs, load_claims, load_questions
from jobs.data.files import read_rows
from jobs.data.pairs import Pair, load_pairs
from jobs.data.prompts import Choice, OpenPrompt, load_choices, load_open_prompts
from jobs.engine.replica import Replica
from jobs.errors import SpecError
from jobs.resolve import locate_data

Write = Callable[[str, str | bytes], str]
PAIR_FILES = ("tone_pairs", "formality_pairs")


@pytest.fixture
def written(tmp_path: Path) -> Write:
    """Writes a dataset and gives its path."""

    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


class TestFiles:
    def test_jsonl_and_csv_of_the_same_rows_read_alike(self, written: Write) -> None:
        jsonl = written(
            "a.jsonl",
            '{"positive": "Yes, \\"so\\".", "negative": "No"}\n\n{"positive": "1", "negative": "2"}',
        )
        csv = written("a.csv", 'negative,positive\nNo,"Yes, ""so""."\n2,1\n')
        assert load_pairs(jsonl) == load_pairs(csv) == [Pair('Yes, "so".', "No"), Pair("1", "2")]

    @given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1))
    def test_any_text_survives_a_jsonl_file(
        self, tmp_path_factory: pytest.TempPathFactory, texts: list[str]
    ) -> None:
        path = tmp_path_factory.mktemp("data") / "texts.jsonl"
        path.write_bytes("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode())
        assert [row["text"] for row in read_rows(str(path), ["text"])] == texts

    @pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
    def test_a_byte_order_mark_is_no_part_of_the_first_column(self, written: Write, name: str) -> None:
        content = '{"text": "Ü"}\n' if name.endswith("jsonl") else "text\nÜ\n"
        assert read_rows(written(name, b"\xef\xbb\xbf" + content.encode()), ["text"]) == [{"text": "Ü"}]

    @pytest.mark.parametrize("name", ["empty.jsonl", "empty.csv"])
    def test_an_empty_file_is_refused_with_what_it_needs(self, written: Write, name: str) -> None:
        with pytest.raises(
            SpecError, match=re.escape(f"{name} holds no rows; it needs at least one row with ['a', 'b']")
        ):
            read_rows(written(name, ""), ["a", "b"])

    def test_a_csv_with_a_header_only_is_refused(self, written: Write) -> None:
        with pytest.raises(SpecError, match="holds no rows"):
            read_rows(written("a.csv", "statement,label\n"), ["statement"])

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            (
                "a.jsonl",
                '{"a": "1", "b": "2"}\n\n{"a": "1"}',
                r"a.jsonl, line 3: 'b' is absent or empty; each row needs ['a', 'b']",
            ),
            ("a.jsonl", '{"a": "", "b": null}', "a.jsonl, line 1: 'a' is absent or empty"),
            ("a.csv", "a,b\n1,2\n3\n", "a.csv, line 3: 'b' is absent or empty"),
            ("a.csv", "a,c\n1,2\n", "a.csv, line 2: 'b' is absent or empty"),
            (
                "a.jsonl",
                '{"a": "1", "b": "2"}\n{"a": "1", "b": \n',
                "a.jsonl, line 2: not JSON (Expecting value)",
            ),
            (
                "a.jsonl",
                '{"a": "1", "b": "2"}\n["a", "b"]',
                """a.jsonl, line 2: '["a", "b"]' is not an object""",
            ),
            ("a.txt", "a b", "a.txt is a .txt file; datasets are .jsonl or .csv"),
            ("a", "a b", "a is a nameless file"),
        ],
    )
    def test_a_bad_file_is_refused_by_name_and_line(
        self, written: Write, name: str, content: str, message: str
    ) -> None:
        with pytest.raises(SpecError, match=re.escape(message)):
            read_rows(written(name, content), ["a", "b"])

    @pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
    def test_bytes_that_are_no_utf8_are_refused_by_name(self, written: Write, name: str) -> None:
        with pytest.raises(SpecError, match=f"{name} cannot be read as UTF-8"):
            read_rows(written(name, b'{"a": "\xff\xfe"}\na,\xff'), ["a"])

    def test_a_name_that_is_no_file_is_refused_with_the_projects_own(self) -> None:
        with pytest.raises(SpecError, match=r"no dataset 'tone_pears'.*'tone_pairs'"):
            read_rows("tone_pears", ["a"])


class TestPrompts:
    def test_the_first_rows_of_each_split_are_taken_in_the_order_of_the_file(self, written: Write) -> None:
        rows = [
            {"split": "report" if number % 3 == 0 else "select", "prompt": str(number)} for number in range(9)
        ]
        path = written("prompts.jsonl", "\n".join(json.dumps(row) for row in rows))
        assert load_open_prompts(path, 2, 3) == [
            OpenPrompt("select", "1"),
            OpenPrompt("select", "2"),
            OpenPrompt("report", "0"),
            OpenPrompt("report", "3"),
            OpenPrompt("report", "6"),
        ]

    def test_too_few_rows_of_a_split_are_refused_with_their_number(self, written: Write) -> None:
        choice = Choice("select", "How?", "It was", " good", " bad")
        path = written("choices.jsonl", "\n".join([json.dumps(choice._asdict())] * 3))
        assert load_choices(path, 3, 0) == [choice] * 3
        with pytest.raises(SpecError, match="has 3 rows of the split 'select' and 4 are asked for"):
            load_choices(path, 4, 0)
        with pytest.raises(SpecError, match="has 0 rows of the split 'report' and 1 are asked for"):
            load_choices(path, 3, 1)

    @pytest.mark.parametrize("split", [{}, {"split": None}, {"split": ""}], ids=str)
    def test_where_no_row_names_a_split_every_fourth_is_report(
        self, written: Write, split: dict[str, str | None]
    ) -> None:
        rows = [{"prompt": str(number), **split} for number in range(8)]
        path = written("prompts.jsonl", "\n".join(map(json.dumps, rows)))
        taken = [OpenPrompt("select", number) for number in "012456"]
        assert load_open_prompts(path, 6, 2) == [*taken, OpenPrompt("report", "3"), OpenPrompt("report", "7")]
        longer = written("longer.jsonl", "\n".join(map(json.dumps, [*rows, {"prompt": "8"}])))
        assert load_open_prompts(longer, 7, 2)[:6] == taken
        assert load_open_prompts(longer, 6, 2) == load_open_prompts(path, 6, 2)
        with pytest.raises(SpecError, match=r"2 rows of the split 'report' and 3 .* every 4th is 'report'"):
            load_open_prompts(path, 6, 3)

    def test_choices_without_a_split_are_split_alike_and_also_from_a_csv(self, written: Write) -> None:
        lines = [f"How {number}?,It was, good, bad" for number in range(4)]
        found = load_choices(
            written("choices.csv", "\n".join(["user,answer,positive,negative", *lines])), 3, 1
        )
        assert [(choice.split, choice.user) for choice in found] == [
            *(("select", f"How {number}?") for number in range(3)),
            ("report", "How 3?"),
        ]
        assert found[0] == Choice("select", "How 0?", "It was", " good", " bad")

    def test_where_some_rows_name_a_split_the_others_belong_to_select(self, written: Write) -> None:
        rows = [{"prompt": str(number)} for number in range(4)] + [{"prompt": "4", "split": "report"}]
        path = written("prompts.jsonl", "\n".join(map(json.dumps, rows)))
        assert [prompt.split for prompt in load_open_prompts(path, 4, 1)] == ["select"] * 4 + ["report"]
        with pytest.raises(SpecError, match="has 4 rows of the split 'select' and 5 are asked for"):
            load_open_prompts(path, 5, 1)

    def test_a_split_that_does_not_exist_is_refused_with_its_row(self, written: Write) -> None:
        path = written("prompts.csv", "prompt,split\nWhy?,select\nHow?,test\n")
        with pytest.raises(
            SpecError,
            match=r"row 1 \(from 0\): split='test'; it takes one of \['extract', 'select', 'report'\]",
        ):
            load_open_prompts(path, 1, 0)


class TestClaims:
    def test_labels_may_be_words_digits_or_json_booleans(self, written: Write) -> None:
        labels = ["1", "0", "True", "FALSE", " true ", True, False, 1, 0]
        rows = [json.dumps({"statement": "Ice is cold.", "label": label}) for label in labels]
        found = load_claims(written("claims.jsonl", "\n".join(rows)))
        assert [claim.is_true for claim in found] == [
            True,
            False,
            True,
            False,
            True,
            True,
            False,
            True,
            False,
        ]

    def test_quotation_marks_go_only_where_they_enclose_the_whole_statement(self, written: Write) -> None:
        statements = ['"Ice is cold."', '"Hot" means warm.', 'It is called "ice."', '"A" precedes "B"', '"']
        rows = [json.dumps({"statement": text, "label": index % 2}) for index, text in enumerate(statements)]
        found = load_claims(written("claims.jsonl", "\n".join(rows)))
        assert [claim.statement for claim in found] == ["Ice is cold.", *statements[1:]]

    def test_a_csv_without_labels_is_refused(self, written: Write) -> None:
        with pytest.raises(SpecError, match=re.escape("claims.csv, line 2: 'label' is absent or empty")):
            load_claims(written("claims.csv", "statement\nIce is cold.\n"))

    def test_a_wrong_label_is_refused_with_those_that_exist(self, written: Write) -> None:
        path = written("claims.csv", "statement,label\nIce is cold.,1\nFire is wet.,maybe\n")
        with pytest.raises(SpecError, match="claim 2: label 'maybe'; it takes 1, true, 0 or false"):
            load_claims(path)

    def test_claims_of_one_class_are_refused(self, written: Write) -> None:
        with pytest.raises(SpecError, match="one class only"):
            load_claims(written("claims.csv", "statement,label\nIce is cold.,1\nFire is hot.,1\n"))

    def test_too_few_claims_of_a_class_are_refused_with_their_number(self, written: Write) -> None:
        rows = ["statement,label", *(f"Claim {number}.,{int(number > 1)}" for number in range(8))]
        path = written("claims.csv", "\n".join(rows))
        assert len(load_questions(path, extract=2, select=1, report=1)) == 4
        with pytest.raises(SpecError, match="4 claims in balance; 2 \\+ 2 \\+ 1 are asked for"):
            load_questions(path, extract=2, select=2, report=1)

    def test_a_statement_that_comes_again_is_asked_once_with_its_first_label(self, written: Write) -> None:
        rows = ["statement,label", "One.,1", "Two.,0", "One.,1", "One.,0", "Three.,0", "Four.,1", "Two.,1"]
        path = written("claims.csv", "\n".join(rows))
        found = [question.claim for question in load_questions(path, extract=2, select=1, report=1)]
        assert found == [
            Claim("One.", True),
            Claim("Two.", False),
            Claim("Four.", True),
            Claim("Three.", False),
        ]
        with pytest.raises(SpecError, match="has 4 claims in balance"):
            load_questions(path, extract=2, select=2, report=1)


class TestCounterbalancing:
    """Over the project's own claims; every property holds for any size of the splits."""

    sizes = st.tuples(*[st.integers(0, 60)] * 3).filter(any)

    @staticmethod
    def splits(sizes: tuple[int, int, int]) -> dict[str, list[ClaimQuestion]]:
        questions = load_questions("claims", extract=sizes[0], select=sizes[1], report=sizes[2])
        by_split = {
            split: [q for q in questions if q.split == split] for split in ("extract", "select", "report")
        }
        assert tuple(len(found) for found in by_split.values()) == sizes
        return by_split

    @given(sizes)
    def test_half_of_each_split_is_true(self, sizes: tuple[int, int, int]) -> None:
        for questions in self.splits(sizes).values():
            true = sum(question.claim.is_true for question in questions)
            assert abs(2 * true - len(questions)) <= len(questions) % 2

    @given(sizes)
    def test_each_letter_means_true_equally_often_within_each_class(
        self, sizes: tuple[int, int, int]
    ) -> None:
        for questions in self.splits(sizes).values():
            for is_true in (True, False):
                letters = Counter(
                    question.true_letter for question in questions if question.claim.is_true == is_true
                )
                assert abs(letters["A"] - letters["B"]) <= 1

    @given(st.tuples(*[st.integers(0, 20).map(lambda quarter: 4 * quarter)] * 3).filter(any))
    def test_splits_of_four_are_balanced_exactly(self, sizes: tuple[int, int, int]) -> None:
        for questions in self.splits(sizes).values():
            quarters = Counter((question.claim.is_true, question.true_letter) for question in questions)
            assert len(set(quarters.values())) <= 1
            honest = Counter(question.honest_letter for question in questions)
            assert honest["A"] == honest["B"] == len(questions) / 2

    @given(sizes)
    def test_no_claim_is_in_two_splits(self, sizes: tuple[int, int, int]) -> None:
        statements = [
            question.claim.statement for questions in self.splits(sizes).values() for question in questions
        ]
        assert len(set(statements)) == len(statements)

    def test_the_text_of_a_question_says_what_its_letters_mean(self) -> None:
        for question in load_questions("claims", extract=8, select=8, report=8):
            meanings = dict(re.findall(r"^\(([AB])\) (True|False)$", question.user, flags=re.MULTILINE))
            assert meanings == {question.true_letter: "True", question.false_letter: "False"}
            assert f'"{question.claim.statement}"' in question.user
            assert meanings[question.honest_letter] == str(question.claim.is_true)

    def test_honesty_pairs_hold_the_honest_letter_against_the_other(self) -> None:
        questions = load_questions("claims", extract=12, select=0, report=0)
        for question, (user, pair) in zip(questions, honesty_pairs(questions), strict=True):
            assert user == question.user
            assert pair.positive == question.honest_letter
            assert pair.negative == question.dishonest_letter
            assert {pair.positive, pair.negative} == {"A", "B"}


class TestAssets:
    def test_there_are_300_claims_with_as_many_true_as_false_and_none_twice(self) -> None:
        claims = load_claims("claims")
        assert len(claims) >= 300
        assert 2 * sum(claim.is_true for claim in claims) == len(claims)
        assert len({claim.statement.casefold() for claim in claims}) == len(claims)

    def test_a_statement_keeps_its_quotation_marks_in_pairs(self) -> None:
        assert [claim for claim in load_claims("claims") if claim.statement.count('"') % 2] == []
        assert Claim('"Hot" and "cold" have the same meaning.', False) in load_claims("claims")

    @pytest.mark.parametrize("name", PAIR_FILES)
    def test_there_are_150_pairs_that_differ_and_none_twice(self, name: str) -> None:
        pairs = load_pairs(name)
        assert len(pairs) >= 150
        texts = [text for pair in pairs for text in pair]
        assert len(set(texts)) == len(texts)

    def test_there_are_40_choices_in_each_split_and_none_twice(self) -> None:
        choices = load_choices("tone_choices", 40, 40)
        assert len({(choice.user, choice.answer) for choice in choices}) == len(choices)

    def test_every_word_of_a_choice_is_one_token_of_the_small_model_after_its_answer(
        self, smollm2: Replica
    ) -> None:
        for choice in load_choices("tone_choices", 40, 40):
            stem = smollm2.encode(choice.answer)
            for word in (choice.positive, choice.negative):
                assert len(smollm2.encode_continuation(word)) == 1, word
                # the token also is what the tokenizer makes of the whole text
                assert smollm2.encode(choice.answer + word) == stem + smollm2.encode_continuation(word)

    def test_choices_and_open_prompts_are_not_what_directions_come_from(self) -> None:
        pairs = {text for name in PAIR_FILES for pair in load_pairs(name) for text in pair}
        read = {choice.user for choice in load_choices("tone_choices", 40, 40)}
        read |= {prompt.prompt for prompt in load_open_prompts("open_prompts", 10, 10)}
        assert not pairs & read

    def test_the_neutral_text_has_20000_tokens_of_the_small_model(self, smollm2: Replica) -> None:
        assert len(smollm2.encode_continuation(locate_data("neutral").read_text(encoding="utf-8"))) >= 20_000

    def test_files_are_utf8_with_plain_line_ends(self) -> None:
        for name in ("claims", *PAIR_FILES, "tone_choices", "open_prompts", "neutral"):
            content = locate_data(name).read_bytes()
            assert b"\r" not in content
            assert content.decode().endswith("\n")
