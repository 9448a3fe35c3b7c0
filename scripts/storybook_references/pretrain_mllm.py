"""First stage: teach the miniature to see, by answering questions about images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2VLModel

from customize.references.encoder import causal_mask
from customize.references.encoder_inputs import EncoderInputs, ReferenceProcessor, rotary_positions
from storybook_training.pretrain_base import train_loop
from storybook_training.training_files import log_row, save_tensors

from . import mllm
from .questions import Question, groups_by_class, make_question
from .render_groups import Groups, patches


def make_batch(
    processor: ReferenceProcessor, groups: Groups, questions: Sequence[Question]
) -> tuple[EncoderInputs, Tensor]:
    """Tokenize questions with their answers.

    Returns:
        The inputs, and labels (batch, length): the next token of the answer, -100 elsewhere.
    """
    tokenizer = processor.tokenizer
    grid = torch.tensor([[1, 4, 4]])
    rows: list[tuple[list[int], list[int], int]] = []
    for question in questions:
        text = "<|im_start|>user\n"
        text += "".join(
            f"{name}<|vision_start|><|image_pad|><|vision_end|>" for name in question.attributes
        )
        text += f"{question.text}<|im_end|>\n<|im_start|>assistant\n"
        ids: list[int] = []
        index: list[int] = []
        number = 0
        for token in tokenizer(text).input_ids:
            if token == processor.image_token_id:
                ids, index = ids + [token] * 16, index + [number] * 16
                number += 1
            else:
                ids, index = [*ids, token], [*index, -1]
        answer = tokenizer(question.answer + "<|im_end|>").input_ids
        rows.append((ids + answer, index + [-1] * len(answer), len(ids)))
    length = max(len(ids) for ids, _, _ in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.int64)
    image_index = torch.full((len(rows), length), -1)
    position_ids = torch.zeros(3, len(rows), length, dtype=torch.int64)
    labels = torch.full((len(rows), length), -100)
    for row, (ids, index, start) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        image_index[row, : len(ids)] = torch.tensor(index)
        grids = grid.expand(max(index) + 1, -1)
        position_ids[:, row, : len(ids)] = rotary_positions(index, grids, mllm.CONFIG)
        labels[row, start - 1 : len(ids) - 1] = torch.tensor(ids[start:])
    numbers = [pick for question in questions for pick in question.images]
    pixels = np.stack([groups.pixels[group, image] for group, image in numbers])
    inputs = EncoderInputs(
        input_ids=input_ids,
        lengths=torch.tensor([len(ids) for ids, _, _ in rows]),
        image_index=image_index,
        position_ids=position_ids,
        next_position=torch.zeros(len(rows), dtype=torch.int64),
        pixel_values=patches(pixels),
        image_grid_thw=torch.tensor([[1, 8, 8]]).expand(len(numbers), -1),
    )
    return inputs, labels


def answer_logits(model: Qwen2VLModel, inputs: EncoderInputs, labels: Tensor) -> Tensor:
    """Logits (answer tokens, vocabulary) at the positions that have labels."""
    embeds = model.get_input_embeddings()(inputs.input_ids)
    visual = model.visual(inputs.pixel_values, inputs.image_grid_thw).pooler_output
    is_image = (inputs.image_index >= 0)[..., None].expand_as(embeds)
    embeds = embeds.masked_scatter(is_image, visual.to(embeds.dtype))
    mask = causal_mask(inputs, 0, "causal", embeds.dtype)
    output = model.language_model(
        inputs_embeds=embeds,
        attention_mask={"full_attention": mask},
        position_ids=inputs.position_ids,
        use_cache=False,
    )
    states = output.last_hidden_state[labels >= 0]
    return states @ model.get_input_embeddings().weight.T


@torch.no_grad()
def measure(
    model: Qwen2VLModel, processor: ReferenceProcessor, groups: Groups, count: int = 256
) -> dict[str, float]:
    """Share of right answer tokens, by kind of question, of groups that were not trained on."""
    members = groups_by_class(groups)
    rng = np.random.default_rng(1)
    hits: dict[str, list[float]] = {}
    for _ in range(count // 32):
        questions = [make_question(groups, members, rng) for _ in range(32)]
        inputs, labels = make_batch(processor, groups, questions)
        right = (answer_logits(model, inputs, labels).argmax(1) == labels[labels >= 0]).float()
        sizes = (labels >= 0).sum(1).tolist()
        for question, row in zip(questions, right.split(sizes), strict=True):
            kind = question.text.split()[0] if len(question.images) > 1 else "describe one"
            hits.setdefault(kind, []).append(float(row.mean()))
            if kind == "same":
                hits.setdefault("same whole", []).append(float(row.all()))
    return {kind: sum(values) / len(values) for kind, values in sorted(hits.items())}


def pretrain(
    folder: Path,
    groups: Groups,
    held_out: Groups,
    steps: int,
    batch: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
) -> Qwen2VLModel:
    """Train the MLLM, or resume, and write its averaged weights to ``folder/mllm.safetensors``."""
    processor = mllm.make_processor()
    torch.manual_seed(seed)
    model = mllm.make_mllm(len(processor.tokenizer))
    model.visual.load_state_dict(load_file(folder / "tower.safetensors"))
    model.train()
    members = groups_by_class(groups)

    def loss_of(generator: torch.Generator) -> Tensor:
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        questions = [make_question(groups, members, rng) for _ in range(batch)]
        inputs, labels = make_batch(processor, groups, questions)
        return F.cross_entropy(answer_logits(model, inputs, labels), labels[labels >= 0])

    def on_checkpoint(step: int) -> None:
        save_tensors(folder / "mllm.safetensors", dict(model.state_dict()))
        log_row(folder, stage="mllm", step=step, **measure(model, processor, held_out))

    train_loop("pretrain", folder, {"mllm": model}, loss_of, steps, lr, seed, on_checkpoint)
    return model.eval()
