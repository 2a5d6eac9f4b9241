"""Cut work into groups that are read together, in bounded memory."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from jobs.engine.memory import Found, within_memory
from jobs.engine.replica import Replica
from jobs.engine.sharing import Prompts, Unsteered, common_prefix
from jobs.engine.tables import RowTables


class Group(NamedTuple):
    """Work that is read together: its rows share equally many blocks.

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
        SpecError: If a configuration names a position that its prompt has not; nothing has run then.
        OutOfMemory: If a single row does not fit.
    """
    check_work(prompts, tables, work)

    def run(left: list[int]) -> Iterator[tuple[int, Tensor]]:
        for group in groups(replica, prompts, tables, [work[index] for index in left], most=len(left)):
            logits_SV = group.prompts.logits(group.work)
            for member, logits_V in zip(group.members, logits_SV, strict=True):
                yield left[member], logits_V

    keys = [(prompt, tables.same[row]) for prompt, row in work]
    return once(keys, lambda firsts: within_memory(replica, firsts, run))


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


def check_work(prompts: Sequence[Sequence[int]], tables: RowTables, work: Sequence[tuple[int, int]]) -> None:
    """Raises SpecError if a configuration names a position that its prompt has not."""
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
    """Groups of at most `most`, configuration by configuration, those that share fewest blocks first.

    Prompts are read without steering before the first group that needs them; as many at a time as the
    replica's memory allows.
    """
    used = sorted({prompt for prompt, _ in work})
    prefix = common_prefix(replica, [prompts[prompt] for prompt in used], tables)
    needs = _Needs.of(replica, tables, sorted({row for _, row in work}))
    for chunk in _chunks(replica, prompts, used, needs):
        texts = [prompts[prompt] for prompt in chunk]
        reader = Prompts(replica, _unsteered(replica, texts, prefix, needs), tables)
        place = {prompt: number for number, prompt in enumerate(chunk)}
        members = [index for index, (prompt, _) in enumerate(work) if prompt in place]
        for cut in _cut(replica, prompts, tables, work, members, prefix, most):
            yield Group(reader, cut, [(place[work[index][0]], work[index][1]) for index in cut])


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


def _unsteered(replica: Replica, prompts: Sequence[Sequence[int]], prefix: int, needs: _Needs) -> Unsteered:
    """The prompts as they are read without steering; kept for the next pack where they are not too large."""
    everything = _Needs(replica.layers, tuple(range(replica.layers)))
    if sum(map(len, prompts)) * everything.bytes_a_token(replica) > replica.memory // 4:
        return Unsteered(replica, prompts, prefix=prefix, blocks=needs.blocks, layers=needs.layers)
    return replica.keep(
        (Unsteered, tuple(map(tuple, prompts)), prefix),
        lambda: Unsteered(
            replica, prompts, prefix=prefix, blocks=everything.blocks, layers=everything.layers
        ),
    )


def _chunks(
    replica: Replica, prompts: Sequence[Sequence[int]], used: Sequence[int], needs: _Needs
) -> Iterator[list[int]]:
    budget = max(1, replica.memory // 2 // max(1, needs.bytes_a_token(replica)))
    chunk: list[int] = []
    tokens = 0
    for prompt in used:
        if chunk and tokens + len(prompts[prompt]) > budget:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(prompt)
        tokens += len(prompts[prompt])
    if chunk:
        yield chunk


def _cut(
    replica: Replica,
    prompts: Sequence[Sequence[int]],
    tables: RowTables,
    work: Sequence[tuple[int, int]],
    members: Sequence[int],
    prefix: int,
    most: int,
) -> Iterator[list[int]]:
    def length(index: int) -> int:
        return len(prompts[work[index][0]]) - prefix

    def depth(index: int) -> int:
        return tables.shared[work[index][1]]

    cut: list[int] = []
    longest = 0
    for index in sorted(members, key=lambda index: (depth(index), work[index][1], -length(index))):
        longest = max(longest, length(index))
        full = len(cut) == most or (len(cut) + 1) * longest > replica.token_budget
        if cut and (full or depth(index) != depth(cut[0])):
            yield cut
            cut, longest = [], length(index)
        cut.append(index)
    if cut:
        yield cut
