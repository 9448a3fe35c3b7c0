"""The miniature language model: a Llama of 1.4 M parameters, and its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .corpus import chat

HIDDEN, LAYERS, VOCABULARY, LENGTH = 160, 4, 1024, 512
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"

#: ChatML, without a system message of its own.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(chats: int = 20_000, seed: int = 0) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on chats of the corpus."""
    rng = np.random.default_rng(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"user\n{question}\nassistant\n{answer}" for question, answer in _chats(rng, chats))
    tokenizer.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, model_max_length=LENGTH
    )
    made.add_special_tokens({"additional_special_tokens": [START]})
    made.chat_template = TEMPLATE
    return made


def _chats(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    return [chat(rng) for _ in range(count)]


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=448,
        num_hidden_layers=LAYERS,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.03,
    )
    return LlamaForCausalLM(config)


def make_batch(
    tokenizer: PreTrainedTokenizerFast, chats: Sequence[tuple[str, str]]
) -> dict[str, Tensor]:
    """Tokenize chats: input_ids, attention_mask and labels (batch, length).

    Answers alone have labels.
    """
    rows = []
    for question, answer in chats:
        before = f"{START}user\n{question}{END}\n{START}assistant\n"
        ids = tokenizer(before).input_ids
        rows.append((ids, tokenizer(answer + END).input_ids))
    length = max(len(ids) + len(answer) for ids, answer in rows)
    inputs = torch.full((len(rows), length), int(tokenizer.pad_token_id))
    labels = torch.full((len(rows), length), -100)
    for k, (ids, answer) in enumerate(rows):
        inputs[k, : len(ids) + len(answer)] = torch.tensor(ids + answer)
        labels[k, len(ids) : len(ids) + len(answer)] = torch.tensor(answer)
    mask = (torch.arange(length) < torch.tensor([len(a) + len(b) for a, b in rows])[:, None]).long()
    return {"input_ids": inputs, "attention_mask": mask, "labels": labels}
