"""Reach the hidden state at any place of the model. S sequences, T tokens, D hidden."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from jobs.engine.interventions import Site
from jobs.engine.replica import Replica


class Place(NamedTuple):
    """A site of a block."""

    layer: int
    site: Site


def attach(replica: Replica, place: Place, visit: Callable[[Tensor], Tensor | None]) -> Any:
    """Let `visit` see the state of every pass, and put what it gives, unless that is None, in its place.

    Args:
        replica: The model.
        place: Where.
        visit: Takes a hidden state of shape (S, T, D), or (S x T, D) as some models' feed-forward parts give
            it.

    Returns:
        A handle whose `remove` ends it.
    """

    def on_input(module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        changed = visit(inputs[0] if inputs else options["hidden_states"])
        if changed is None:
            return None
        if inputs:
            return (changed, *inputs[1:]), options
        return inputs, {**options, "hidden_states": changed}

    def on_output(module: Any, inputs: Any, output: Any) -> Any:
        changed = visit(output[0] if isinstance(output, tuple) else output)
        return (changed, *output[1:]) if changed is not None and isinstance(output, tuple) else changed

    match place.site:
        case "before":
            return replica.blocks[place.layer].register_forward_pre_hook(on_input, with_kwargs=True)
        case "after":
            return replica.blocks[place.layer].register_forward_hook(on_output)
        case "attention":
            return replica.parts[place.layer].attention.register_forward_hook(on_output)
        case "mlp":
            return replica.parts[place.layer].mlp.register_forward_hook(on_output)


@contextmanager
def picked(
    replica: Replica, places: Sequence[Place], pick: Callable[[Tensor], Tensor]
) -> Iterator[dict[Place, Tensor]]:
    """Inside the block, a dictionary that each pass fills: place -> what `pick` takes of the state there.

    Args:
        replica: The model.
        places: Where; what `tables.steered` changes there is seen changed if it was entered before.
        pick: Takes a hidden state as `attach` hands it over.
    """
    found: dict[Place, Tensor] = {}

    def keeping(place: Place) -> Callable[[Tensor], None]:
        def keep(state: Tensor) -> None:
            found[place] = pick(state)

        return keep

    handles: list[Any] = []
    try:
        for place in places:
            handles.append(attach(replica, place, keeping(place)))
        yield found
    finally:
        for handle in handles:
            handle.remove()
