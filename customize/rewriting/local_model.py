"""A causal language model of transformers that completes chats on this machine."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from customize.core.precision import full_precision
from customize.errors import PipelineError
from customize.rewriting.language_model import AfterUse, Chat, Completion, Message, Sampling
from customize.text import plural, quote

#: Chats that are completed at once.
_BATCH_SIZE = 16
#: Tokens that a sampled token is one of, as Prompt-A-Video samples.
_TOP_K = 50


class LocalModel:
    """Completes chats with a causal language model.

    Args:
        model: Model of transformers with ``generate``.
        tokenizer: Its tokenizer, which has a chat template.
        name: Its name in messages.
        load: Loads the weights again after they were freed; None: they cannot be freed. It is
            copied and pickled with the model.

    Raises:
        PipelineError: The tokenizer has no chat template or no token that ends a message.
    """

    def __init__(
        self, model: Any, tokenizer: Any, name: str, load: Callable[[], Any] | None = None
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise PipelineError(
                "the tokenizer of the language model has no chat template",
                where=name,
                fix="load a model that was tuned to follow instructions, such as one with "
                "'Instruct' in its name",
            )
        self._model, self.tokenizer, self._name = model.eval(), tokenizer, name
        self._load, self._lock = load, threading.RLock()
        self._ends = _end_tokens(model, tokenizer)
        if not self._ends:
            raise PipelineError(
                "neither the tokenizer nor the generation settings of the language model name a "
                "token that ends an answer",
                where=name,
                fix="set eos_token in its tokenizer_config.json",
            )

    @property
    def model(self) -> Any:
        """The model; weights that were freed are loaded again."""
        with self._lock:
            if self._model is None and self._load is not None:
                self._model = self._load().eval()
            return self._model

    @property
    def can_reload(self) -> bool:
        """Whether weights that were freed can be loaded again."""
        return self._load is not None

    @property
    def name(self) -> str:
        """Name of the model in messages."""
        return self._name

    @property
    def digest(self) -> str:
        """SHA-256 of weights, tokenizer and chat template, 16 hexadecimal digits."""
        found = hashlib.sha256(str(self.tokenizer.chat_template).encode())
        found.update(str(sorted(self.tokenizer.get_vocab().items())).encode())
        for key, tensor in sorted(self.model.state_dict().items()):
            found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return found.hexdigest()[:16]

    @property
    def end(self) -> str:
        """The token that ends an answer."""
        return str(self.tokenizer.eos_token or self.tokenizer.decode([min(self._ends)]))

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, with those that the tokenizer adds."""
        return len(self.tokenizer(text).input_ids)

    @property
    def context_length(self) -> int | None:
        """The most tokens that the model reads, with those of its answer; None: unknown."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        return None if limit is None else int(limit)

    def check_length(self, messages: Sequence[Message], max_new_tokens: int) -> None:
        """Refuse a chat that is too long to be completed.

        Raises:
            PipelineError: It has more tokens than the model reads, with those of the answer.
        """
        self._read_chat(messages, max_new_tokens)

    def read_answer(self, tokens: Sequence[int]) -> Completion:
        """Return the completion that generated tokens are, up to the token that ends it."""
        end = next((k for k, token in enumerate(tokens) if token in self._ends), None)
        text = self.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        return Completion(text, is_complete=end is not None)

    def check_words(self, messages: Sequence[Message]) -> None:
        """Refuse texts that the tokenizer cannot hold.

        Raises:
            PipelineError: Letters are lost, or become the token of unknown words.
        """
        for message in messages:
            ids = self.tokenizer(message.content, add_special_tokens=False).input_ids
            read = self.tokenizer.decode(ids, skip_special_tokens=True)
            lost = _letters(message.content) - _letters(read)
            if lost:
                raise PipelineError(
                    f"the tokenizer of the language model loses {plural(lost.total(), 'letter')} "
                    f"of the instructions, such as {min(lost)}",
                    where=self.name,
                    fix="give instructions= in the words that the model was trained with",
                )

    @full_precision(tf32=True)
    @torch.no_grad()
    def complete(self, chats: Sequence[Chat], sampling: Sampling) -> list[Completion]:
        """Return the completion of each chat, up to rounding whatever other chats there are.

        No random state of torch is read or changed.

        Raises:
            PipelineError: A chat has more tokens than the model reads, or the chat template
                refuses it.
        """
        with self._lock:
            texts = [self._read_chat(chat.messages, sampling.max_new_tokens) for chat in chats]
            result = []
            for first in range(0, len(chats), _BATCH_SIZE):
                seeds = [chat.seed for chat in chats[first : first + _BATCH_SIZE]]
                result += self._complete(texts[first : first + _BATCH_SIZE], seeds, sampling)
            return result

    @contextmanager
    def use(self, device: object = None, after: AfterUse = "keep") -> Iterator[None]:
        """Hold the weights on a device; other threads wait.

        Args:
            device: The device; None leaves the weights where they are.
            after: What becomes of the weights: "keep", "offload" to the CPU, or "unload", which
                needs :attr:`can_reload`.
        """
        with self._lock:
            if device is not None:
                self._move(device)
            try:
                yield
            finally:
                if after == "unload" and self.can_reload:
                    self._model = None
                elif after == "offload":
                    self._move("cpu")

    def _move(self, device: object) -> None:
        if str(self.model.device) != str(torch.device(str(device))):
            self.model.to(device)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle everything but the lock."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`__getstate__` returned."""
        vars(self).update(state)
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"LocalModel({self.name})"

    def render(self, messages: Sequence[Message]) -> str:
        """Return the text of a chat up to where its answer begins.

        Raises:
            PipelineError: The chat template refuses the chat.
        """
        chat = [{"role": m.role, "content": self._plain(m.content)} for m in messages]
        try:
            return self._apply_template(chat)
        except Exception as error:  # a template without system messages, such as Gemma's
            if len(chat) < 2 or chat[0]["role"] != "system":
                raise self._refused(error) from error
        merged = f"{chat[0]['content']}\n\n{chat[1]['content']}"
        try:
            return self._apply_template([{"role": "user", "content": merged}, *chat[2:]])
        except Exception as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> PipelineError:
        return PipelineError(
            f"the chat template refuses the chat: {error}",
            where=self.name,
            fix="load a model whose template takes messages of a user and an assistant",
        )

    def _apply_template(self, chat: list[dict[str, str]]) -> str:
        # enable_thinking is Qwen 3's; templates ignore names that they do not know.
        return str(
            self.tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=False, enable_thinking=False
            )
        )

    def _read_chat(self, messages: Sequence[Message], max_new_tokens: int) -> list[int]:
        """Return the tokens of a chat, which is short enough to be completed."""
        text = self.render(messages)
        tokens = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        limit = self.context_length
        if limit is not None and len(tokens) + max_new_tokens > limit:
            raise PipelineError(
                f"the chat {quote(messages[-1].content, 100)} has {len(tokens):,} tokens, and with "
                f"{max_new_tokens:,} new ones it exceeds the {limit:,} that the language model "
                "reads",
                where=self.name,
                fix="give a shorter prompt, shorter instructions or a smaller max_new_tokens",
            )
        return tokens

    def _plain(self, text: str) -> str:
        """Break the tokens of the chat format in a text, so that no prompt ends its own message."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates
        special = {*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab()}
        for token in sorted(special, key=len, reverse=True):
            if len(token) > 1 and token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _complete(
        self, rows: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> list[Completion]:
        length = max(map(len, rows))
        device, padding = self.model.device, min(self._ends)
        ids = torch.tensor([[padding] * (length - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        processors = LogitsProcessorList()
        if sampling.temperature > 0:
            processors.append(SeededSampling(seeds, sampling.temperature))
        answers = self.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            logits_processor=processors,
            eos_token_id=sorted(self._ends),
            pad_token_id=padding,
        )[:, length:].tolist()
        return [self.read_answer(answer) for answer in answers]


class SeededSampling(LogitsProcessor):
    """Makes greedy search sample each row by a seed of its own.

    The largest of ``logits / temperature + Gumbel noise`` is a sample of their softmax (Gumbel
    1954), so a row's tokens depend on its seed alone, and no global random state is read.

    Args:
        seeds: Seed of each row.
        temperature: Positive temperature.
    """

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (rows, vocabulary) whose maximum in each row is a sample."""
        width = scores.shape[-1]
        uniform = torch.stack(
            [torch.rand(width, generator=g, dtype=torch.float64) for g in self._generators]
        ).clamp_(min=1e-300)
        noise = -torch.log(-torch.log(uniform)).to(scores.device, torch.float32)
        scaled = scores.float() / self._temperature
        least = scaled.topk(min(_TOP_K, width), dim=-1).values[:, -1:]
        return torch.where(scaled < least, -torch.inf, scaled + noise)


def _letters(text: str) -> Counter[str]:
    return Counter(char for char in text.lower() if char.isalnum())


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    settings = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = settings if isinstance(settings, list | tuple) else [settings]
    return frozenset(int(token) for token in (*ends, tokenizer.eos_token_id) if token is not None)
