"""Cut work into groups that are read together, in bounded memory."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from jobs.engine.lanes import side_by_side
from jobs.engine.memory import Found, pass_tokens, share
from jobs.engine.prefixes import Family, families
from jobs.engine.replica import MOST_KEPT, Replica
from jobs.engine.sharing import Prompts, Unsteered
from jobs.engine.tables import RowTables
from jobs.errors import SpecError


class Group(NamedTuple):
    """Work that is read together, the rows that share fewest blocks first.

    Attributes:
        prompts: Knows the prompts.
        members: Indices of the work.
        work: What `prompts` is to read for them.
    """

    prompts: Prompts
    members: list[int]
    work: list[tuple[int, int]]


def next_token(
    replica: Replica, prompts: Sequence[Sequence[int]], tables: RowTables, work: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, Tensor]]:
    """Logits of the token after each prompt, without any decoding, each with the index of its work.

    Args:
        replica: The model.
        prompts: Token ids; they may differ in length.
        tables: The configurations.
        work: Pairs of prompt and row of the tables.

    Raises:
        SpecError: If a prompt is longer than the model's context, or a configuration names a position that
            its prompt has not; nothing has run then.
        OutOfMemory: If a single row does not fit.
    """
    check_work(replica, prompts, tables, work)

    def run(lane: Replica, left: list[int]) -> Iterator[tuple[int, Tensor]]:
        for group in groups(lane, prompts, tables, [work[index] for index in left], most=len(left)):
            logits_SV = group.prompts.logits(group.work)
            for member, logits_V in zip(group.members, logits_SV, strict=True):
                yield left[member], logits_V

    keys = [(prompt, tables.same[row]) for prompt, row in work]
    of_work = [prompt for prompt, _ in work]
    return once(keys, lambda firsts: side_by_side(replica, of_work, firsts, run))


def once(
    keys: Sequence[Hashable], run: Callable[[list[int]], Iterator[tuple[int, Found]]]
) -> Iterator[tuple[int, Found]]:
    """What is found for each piece of work, where pieces of equal key are done once.

    Args:
        keys: Key of each piece.
        run: Takes the indices of the pieces to do and yields each with what it finds.
    """
    equal: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        equal.setdefault(key, []).append(index)
    for first, found in run([indices[0] for indices in equal.values()]):
        yield from ((index, found) for index in equal[keys[first]])


def in_parts(found: Iterable[tuple[int, Found]], size: int) -> Iterator[tuple[int, list[Found]]]:
    """What was found for work that comes in parts of equal size, each part in order once it is whole.

    Args:
        found: Index of each piece of work, in any order, with what was found.
        size: Pieces of work in a part: part 0 is the first `size` indices, and so on.
    """
    parts: dict[int, dict[int, Found]] = {}
    for index, each in found:
        part, place = divmod(index, size)
        parts.setdefault(part, {})[place] = each
        if len(parts[part]) == size:
            whole = parts.pop(part)
            yield part, [whole[place] for place in range(size)]


def check_work(
    replica: Replica,
    prompts: Sequence[Sequence[int]],
    tables: RowTables,
    work: Sequence[tuple[int, int]],
    *,
    new_tokens: int = 0,
) -> None:
    """Raises SpecError if the work cannot be meant.

    That is if a prompt or a row does not exist, the model cannot read the prompt, or the row names a position
    that the prompt has not.
    """
    for prompt, row in dict.fromkeys(work):
        if not (0 <= prompt < len(prompts) and 0 <= row < tables.rows):
            raise SpecError(
                f"prompt {prompt} under row {row}; there are {len(prompts)} prompts and {tables.rows} rows, "
                "both counted from 0"
            )
    for prompt in dict.fromkeys(prompt for prompt, _ in work):
        try:
            replica.check_text(prompts[prompt], new_tokens=new_tokens)
        except SpecError as error:
            raise SpecError(f"prompt {prompt}: {error}") from error
    for prompt, row in dict.fromkeys(work):
        tables.check_prompt(row, len(prompts[prompt]))


def groups(
    replica: Replica,
    prompts: Sequence[Sequence[int]],
    tables: RowTables,
    work: Sequence[tuple[int, int]],
    *,
    most: int,
) -> Iterator[Group]:
    """Groups of at most `most`, prompt by prompt: what is done to one prompt stays together if it can.

    Prompts are read without steering before the first group that needs them; as many at a time as the
    replica's memory allows.
    """
    members: dict[int, list[int]] = {}
    for index, (prompt, _) in enumerate(work):
        members.setdefault(prompt, []).append(index)
    rows = sorted({row for _, row in work}, key=lambda row: (tables.shared[row], row))
    needs = _Needs.of(replica, tables, rows)
    for family in families(replica, prompts, sorted(members), tables):
        for part in _parts(replica, prompts, family, needs):
            reader = Prompts(replica, _unsteered(replica, prompts, part, needs), tables)
            order = sorted(range(len(part.prompts)), key=lambda place: -len(prompts[part.prompts[place]]))
            for begun in _begun_together(replica, rows, part.prefix):
                reader.begin(begun)
                chosen = set(begun)
                pieces = [
                    _Piece(index, place, len(prompts[part.prompts[place]]) - part.prefix)
                    for place in order
                    for index in members[part.prompts[place]]
                    if work[index][1] in chosen
                ]
                for cut in _cut(pieces, most, pass_tokens(replica)):
                    cut.sort(key=lambda piece: (tables.shared[work[piece.number][1]], piece.number))
                    pairs = [(piece.place, work[piece.number][1]) for piece in cut]
                    yield Group(reader, [piece.number for piece in cut], pairs)


def _begun_together(replica: Replica, rows: Sequence[int], prefix: int) -> Iterator[Sequence[int]]:
    """Configurations whose common beginnings fit into memory, and into a pass, together."""
    prefix = max(1, prefix)
    fitting = share(replica, "beginnings") // (prefix * replica.cache_bytes)
    most = max(1, min(fitting, pass_tokens(replica) // prefix))
    for start in range(0, len(rows), most):
        yield rows[start : start + most]


class _Needs(NamedTuple):
    """What of the unsteered prompts the configurations need.

    Attributes:
        blocks: Keys and values of so many blocks, from the bottom.
        layers: Outputs of these blocks.
    """

    blocks: int
    layers: tuple[int, ...]

    @staticmethod
    def of(replica: Replica, tables: RowTables, rows: Sequence[int]) -> "_Needs":
        shared = {tables.shared[row] for row in rows}
        layers = sorted(depth - 1 for depth in shared if 0 < depth <= replica.layers)
        return _Needs(min(max(shared), replica.layers), tuple(layers))

    def bytes_a_token(self, replica: Replica) -> int:
        return replica.cache_bytes * self.blocks // replica.layers + replica.state_bytes * len(self.layers)


def _unsteered(
    replica: Replica, prompts: Sequence[Sequence[int]], family: Family, needs: _Needs
) -> Unsteered:
    """A family as it is read without steering; kept for the next pack where it is not too large."""
    texts = [prompts[prompt] for prompt in family.prompts]
    everything = _Needs(replica.layers, tuple(range(replica.layers)))

    def read(needs: _Needs) -> Unsteered:
        return Unsteered(replica, texts, prefix=family.prefix, blocks=needs.blocks, layers=needs.layers)

    tokens = family.prefix + sum(len(text) - family.prefix for text in texts)
    if tokens * everything.bytes_a_token(replica) > share(replica, "kept") // MOST_KEPT:
        return read(needs)
    return replica.keep((Unsteered, tuple(map(tuple, texts)), family.prefix), lambda: read(everything))


def _parts(
    replica: Replica, prompts: Sequence[Sequence[int]], family: Family, needs: _Needs
) -> Iterator[Family]:
    """A family in parts that fit into memory."""
    budget = share(replica, "unsteered") // max(1, needs.bytes_a_token(replica))
    part: list[int] = []
    tokens = family.prefix
    for prompt in family.prompts:
        own = len(prompts[prompt]) - family.prefix
        if part and tokens + own > budget:
            yield Family(part, family.prefix)
            part, tokens = [], family.prefix
        part.append(prompt)
        tokens += own
    yield Family(part, family.prefix)


class _Piece(NamedTuple):
    """A piece of work, to be put into a group."""

    number: int
    place: int
    tokens: int


def _cut(pieces: Sequence[_Piece], most: int, token_budget: int) -> Iterator[list[_Piece]]:
    """Pieces in groups; the pieces of a prompt, which follow each other, in one if they fit into one.

    The first prompt of a group is its longest.
    """
    cut: list[_Piece] = []
    for _, found in groupby(pieces, key=lambda piece: piece.place):
        left = list(found)
        fitting = max(1, min(most, token_budget // (cut or left)[0].tokens))
        if cut and len(cut) + len(left) > fitting:
            yield cut
            cut = []
            fitting = max(1, min(most, token_budget // left[0].tokens))
        while len(left) > fitting:
            yield left[:fitting]
            left = left[fitting:]
        cut += left
    if cut:
        yield cut
