"""Language models for tests of rewriting: a tiny random Llama, and answers by a script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from customize.rewriting.language_model import Chat, Completion, Sampling
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

    name, digest = "script", "script"

    def __init__(self, answers: Mapping[str, Sequence[str | Completion | Exception]]) -> None:
        self.answers = answers
        self.chats: list[Chat] = []
        self.samplings: list[Sampling] = []
        self.devices: list[str] = []

    def complete(self, chats: Sequence[Chat], sampling: Sampling) -> list[Completion]:
        self.chats += chats
        self.samplings.append(sampling)
        return [self._answer(chat) for chat in chats]

    def move(self, device: object) -> None:
        self.devices.append(str(device))

    def _answer(self, chat: Chat) -> Completion:
        first = next(m.content for m in chat.messages if m.role == "user")
        rounds = sum(m.role == "assistant" for m in chat.messages)
        answers = next(found for key, found in self.answers.items() if key in first)
        answer = answers[min(rounds, len(answers) - 1)]
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, Completion) else Completion(answer, True)
