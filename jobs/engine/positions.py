"""Say which tokens of prompts are meant: `capture.Wanted.positions`."""

from collections.abc import Sequence

from jobs.engine.replica import Replica
from jobs.errors import ModelError, SpecError


def from_end(prompts: Sequence[Sequence[int]], offsets: Sequence[int]) -> list[dict[str, list[int]]]:
    """`Wanted.positions` of tokens counted from each prompt's end (1 = the last one), named -1, -2, ..."""
    return [{str(-offset): [-offset] for offset in offsets} for _ in prompts]


def every_token(prompts: Sequence[Sequence[int]]) -> list[dict[str, list[int]]]:
    """`Wanted.positions` of all tokens of each prompt, named `all`."""
    return [{"all": list(range(len(prompt)))} for prompt in prompts]


def find_tokens(replica: Replica, text: str, part: str, *, add_special_tokens: bool = True) -> list[int]:
    """Positions of the tokens that hold a part of a text, for `Wanted.positions`.

    A token that holds only some of the part's characters counts.

    Args:
        replica: The model, for its tokenizer.
        text: The whole text.
        part: What to look for; it stands in the text once.
        add_special_tokens: Whether the text is encoded with the tokenizer's own start token, as
            `Replica.encode` does; False for a text from a chat template.

    Raises:
        SpecError: If the part is not there exactly once, or no token holds any of it.
        ModelError: If the tokenizer does not know where in the text its tokens stand.
    """
    if not replica.tokenizer.is_fast:
        raise ModelError(
            f"{type(replica.tokenizer).__name__} does not tell where in a text its tokens stand; "
            "give the positions themselves"
        )
    start = text.find(part)
    if not part or start < 0 or text.find(part, start + 1) >= 0:
        raise SpecError(f"{part!r} has to stand once in {text!r}; give a longer or another part")
    encoded = replica.tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    spans = enumerate(encoded["offset_mapping"])
    found = [at for at, (first, end) in spans if max(first, start) < min(end, start + len(part))]
    if not found:
        raise SpecError(f"no token of {text!r} holds {part!r}; give a part with visible characters")
    return found
