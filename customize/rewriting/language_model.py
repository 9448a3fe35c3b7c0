"""The interface of language models: chats in, completions out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

from customize.errors import ConfigError, EndpointError
from customize.text import quote

Role = Literal["system", "user", "assistant"]

#: What becomes of a local model's weights after a use: they stay, go to the CPU, or are freed.
AfterUse = Literal["keep", "offload", "unload"]


@dataclass(frozen=True)
class Message:
    """One message of a chat."""

    role: Role
    content: str


@dataclass(frozen=True)
class Chat:
    """A chat whose next message is requested.

    Attributes:
        messages: The messages so far; the last one is the user's.
        seed: Seed of the completion, from 0 to 2**31 - 1. Greedy completions do not read it.
    """

    messages: tuple[Message, ...]
    seed: int = 0


@dataclass(frozen=True)
class Sampling:
    """How completions are generated.

    Attributes:
        temperature: 0 for the most likely token, up to 2.
        max_new_tokens: Largest number of tokens of a completion, from 1 to 4,096.

    Raises:
        ConfigError: A value is out of its range.
    """

    temperature: float = 0.0
    max_new_tokens: int = 160

    def __post_init__(self) -> None:
        number = isinstance(self.temperature, int | float) and not isinstance(
            self.temperature, bool
        )
        if not number or not 0.0 <= self.temperature <= 2.0:
            raise ConfigError(
                f"invalid temperature {quote(self.temperature)}",
                where="temperature",
                fix="give a number from 0 (the most likely tokens) to 2",
            )
        count = self.max_new_tokens
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 4096:
            raise ConfigError(
                f"invalid number of tokens {quote(count)}",
                where="max_new_tokens",
                fix="give a number from 1 to 4,096",
            )


@dataclass(frozen=True)
class Completion:
    """The text that a language model answers.

    Attributes:
        text: The text, without special tokens.
        is_complete: Whether the model ended it, and not the limit of tokens.
    """

    text: str
    is_complete: bool


class LanguageModel(Protocol):
    """A language model that continues chats.

    Attributes:
        name: Its name in messages and reports.
        digest: What identifies it in caches: equal digests give equal completions.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def digest(self) -> str: ...  # noqa: D102

    @property
    def can_reload(self) -> bool:
        """Whether weights that were freed can be loaded again; true for models without weights."""
        ...

    def complete(
        self, chats: Sequence[Chat], sampling: Sampling
    ) -> Sequence[Completion | EndpointError]:
        """Return the completion of each chat, or why a server elsewhere did not complete it.

        The completion of a chat depends on its messages and seed, whatever other chats there are.
        """
        ...

    def check_length(self, messages: Sequence[Message], max_new_tokens: int) -> None:
        """Refuse a chat that is too long to be completed; those that run elsewhere refuse none.

        Raises:
            PipelineError: It has more tokens than the model reads, with those of the answer.
        """
        ...

    def use(self, device: object = None, after: AfterUse = "keep") -> AbstractContextManager[None]:
        """Return a context that holds the weights on a device, and locks them for one thread.

        Models that run elsewhere do nothing, and lock nothing.

        Args:
            device: The device; None leaves the weights where they are.
            after: What becomes of the weights after the context.
        """
        ...
