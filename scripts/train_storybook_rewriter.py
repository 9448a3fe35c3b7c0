"""Train the bundled language model from scratch: `python scripts/train_storybook_rewriter.py`.

A miniature of an instruction-tuned language model for the storybook: it learns what words mean and
to say a prompt in other words, mostly in those of the base's captions. Run the script again to
resume from `--folder`, which receives checkpoints and losses (log.jsonl). The bundled one took
1,300 steps, 31 minutes on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from customize.rewriting.instructions import Instructions
from customize.rewriting.language_model import Chat, Message, Sampling
from customize.rewriting.load_model import SETTINGS_FILE, TrainedSettings, write_settings
from customize.rewriting.local_model import LocalModel
from storybook_rewriter.corpus import USER, definition, paraphrase
from storybook_rewriter.miniature import make_batch, make_model, make_tokenizer
from storybook_training.pretrain_base import train_loop
from storybook_training.training_files import log_row

#: Chats of a seed that no training step has, for measuring.
_HELD_OUT_SEED = 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/storybook-rewriter"))
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = make_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)

    def loss_of(generator: torch.Generator) -> Tensor:
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        # One kind a step, as definitions are short and would be padded.
        make = definition if rng.random() < 0.3 else paraphrase
        chats = [make(rng) for _ in range(args.batch)]
        loss: Tensor = model(**make_batch(tokenizer, chats)).loss
        return loss

    def on_checkpoint(step: int) -> None:
        save(args.folder / "model", model, tokenizer)
        log_row(args.folder, stage="language", step=step, **measure(model, tokenizer))
        model.train()

    model.train()
    train_loop(
        "language", args.folder, {"model": model}, loss_of, args.steps, args.lr, 0, on_checkpoint
    )
    print(f"the language model is in {args.folder / 'model'}")


def save(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the model in half precision, with its instructions."""
    half = make_model(tokenizer)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = TrainedSettings(Instructions(system="", user=USER), 96)
    (folder / SETTINGS_FILE).write_text(write_settings(settings), encoding="utf-8")


def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int = 32
) -> dict[str, float]:
    """Share of definitions that name the right word, of chats that were not trained on."""
    rng = np.random.default_rng(_HELD_OUT_SEED)
    chats = [definition(rng) for _ in range(count)]
    answers = LocalModel(model, tokenizer, "miniature").complete(
        [Chat((Message("user", question),)) for question, _ in chats], Sampling(0.0, 32)
    )
    right = [answer.text == wanted for answer, (_, wanted) in zip(answers, chats, strict=True)]
    return {"definitions": sum(right) / count}


if __name__ == "__main__":
    main()
