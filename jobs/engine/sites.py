"""Take what is wanted of the hidden state at any place of the model. S sequences, T tokens, D hidden."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from jobs.engine.replica import Replica
from jobs.engine.tables import Place


@contextmanager
def picked(
    replica: Replica, places: Sequence[Place], pick: Callable[[Tensor], Tensor]
) -> Iterator[dict[Place, Tensor]]:
    """Inside the block, a dictionary that each pass fills: place -> what `pick` takes of the state there.

    Args:
        replica: The model.
        places: Where; what `tables.steered` changes there is seen changed if it was entered before.
        pick: Takes a hidden state of shape (S, T, D), or (S x T, D) as some models' feed-forward parts give
            it, and copies what is wanted.
    """
    found: dict[Place, Tensor] = {}
    handles: list[Any] = []
    try:
        for place in places:
            handles.append(_hook(replica, place, found, pick))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    replica: Replica, place: Place, found: dict[Place, Tensor], pick: Callable[[Tensor], Tensor]
) -> Any:
    def on_input(module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        found[place] = pick(inputs[0] if inputs else options["hidden_states"])

    def on_output(module: Any, inputs: Any, output: Any) -> None:
        found[place] = pick(output[0] if isinstance(output, tuple) else output)

    match place.site:
        case "before":
            return replica.blocks[place.layer].register_forward_pre_hook(on_input, with_kwargs=True)
        case "after":
            return replica.blocks[place.layer].register_forward_hook(on_output)
        case "attention":
            return replica.parts[place.layer].attention.register_forward_hook(on_output)
        case "mlp":
            return replica.parts[place.layer].mlp.register_forward_hook(on_output)
