"""How jobs put a prompt to the model: in its chat template, or raw."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from jobs.engine.replica import Replica


class Asking(Protocol):
    """Parameters that say how."""

    @property
    def chat(self) -> bool:
        """Whether prompts are asked in the model's chat template."""

    @property
    def system(self) -> str | None:
        """System message; None leaves what the template does by itself."""


def encode_prompt(replica: "Replica", prompt: str, asking: Asking) -> list[int]:
    """Token ids of a prompt, ready for the reply. Raises ModelError if there is no chat template."""
    return replica.encode_chat(prompt, system=asking.system) if asking.chat else replica.encode(prompt)


def check_asking(asking: Asking) -> None:
    """Raises ValueError if a raw prompt was given a system message."""
    if asking.system is not None and not asking.chat:
        raise ValueError(f"system={asking.system!r} with chat=False; a raw prompt has no system message")
