"""Language models for tests of rewriting: a tiny random Llama, and answers by a script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from customize.errors import EndpointError, PipelineError
from customize.rewriting.language_model import AfterUse, Chat, Completion, Message, Sampling
from tests.tiny import qwen_tokenizer
from tests.tiny_llm import CHAT


def tiny_llama_tokenizer():
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def tiny_llama(positions: int = 2048, seed: int = 0, width: int = 16) -> LlamaForCausalLM:
    tokenizer = tiny_llama_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def save_tiny_llama(folder: Path, width: int = 16) -> Path:
    tiny_llama(width=width).save_pretrained(folder)
    tiny_llama_tokenizer().save_pretrained(folder)
    return folder


class ScriptedModel:
    """Answers by a table: part of the user's first message -> its answers, the last one again."""

    name, digest, can_reload = "script", "script", False

    def __init__(
        self, answers: Mapping[str, Sequence[str | Completion | EndpointError | PipelineError]]
    ) -> None:
        self.answers = answers
        self.chats: list[Chat] = []
        self.samplings: list[Sampling] = []
        self.uses: list[tuple[object, str]] = []

    def complete(
        self, chats: Sequence[Chat], sampling: Sampling
    ) -> list[Completion | EndpointError]:
        self.chats += chats
        self.samplings.append(sampling)
        return [self._answer(chat) for chat in chats]

    def check_length(self, messages: Sequence[Message], max_new_tokens: int) -> None:
        pass

    def use(self, device: object = None, after: AfterUse = "keep") -> AbstractContextManager[None]:
        self.uses.append((device and str(device), after))
        return nullcontext()

    def _answer(self, chat: Chat) -> Completion | EndpointError:
        first = next(m.content for m in chat.messages if m.role == "user")
        rounds = sum(m.role == "assistant" for m in chat.messages)
        answers = next(found for key, found in self.answers.items() if key in first)
        answer = answers[min(rounds, len(answers) - 1)]
        if isinstance(answer, PipelineError):
            raise answer
        return Completion(answer, True) if isinstance(answer, str) else answer
