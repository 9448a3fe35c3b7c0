"""The recipe: a LoRA of a language model, trained by trl to rewrite prompts.

How it is trained is one of :data:`customize.training.rewriting.methods.METHODS`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from customize.atomic import write_atomic
from customize.concepts.io.output_folder import check_writable
from customize.errors import PipelineError, TrainingError
from customize.rewriting.load_model import SETTINGS_FILE, load_trainable, write_settings
from customize.safe_read import read_bytes, read_json
from customize.training.rewriting.config import RewriterTrainConfig
from customize.training.rewriting.methods import METHODS
from customize.training.rewriting.methods.method import RewriterRun, TrainerParts
from customize.training.rewriting.rows import MAX_BYTES, read_rows
from customize.training.rewriting.settings_record import check_record, write_record

#: The settings and losses of a training, beside its LoRA.
FACTS_FILE = "training.json"
#: Files of a whole checkpoint, besides the trainer's state.
_CHECKPOINT_FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt")
#: Settings that may differ between a run and its resumption; of the data the content counts.
_FREE_SETTINGS = {
    *("data", "output", "resume", "device", "ray", "workers"),
    *("checkpoint_every", "keep_checkpoints"),
}


def train_rewriter(config: RewriterTrainConfig) -> Path:
    """Train a rewriter, or resume, and return the folder of its LoRA.

    Raises:
        ConfigError: A setting is wrong, or a row is longer than ``max_length``.
        CustomizeError: The model or the data cannot be read, or the loss is not finite.
        SettingsError: The output folder has checkpoints of other settings.
        PipelineError: trl is not installed.
    """
    _check_trl()
    method = METHODS[config.method]
    rows = read_rows(config.data, method.fields)
    model, whole, settings, is_lora = load_trainable(config.model)
    if config.system is not None:
        instructions = replace(settings.instructions, system=config.system)
        settings = replace(settings, instructions=instructions)
    if config.max_new_tokens is not None:
        settings = replace(settings, max_new_tokens=config.max_new_tokens)
    output = config.output
    with ExitStack() as resources:
        parts = method.prepare(RewriterRun(config, rows, whole, settings, resources))
        described = _describe(config)
        resumed = _check_output(config, described)
        trainer = _make_trainer(config, parts, model, whole.tokenizer, is_lora)
        result = trainer.train(resume_from_checkpoint=resumed)
    if not torch.isfinite(torch.tensor(result.training_loss)):
        raise TrainingError(
            f"the loss is {result.training_loss}", where=output, fix="lower learning_rate"
        )
    trainer.model.save_pretrained(str(output), selected_adapters=["default"])
    whole.tokenizer.save_pretrained(str(output))
    write_atomic(output / SETTINGS_FILE, write_settings(settings).encode())
    facts = {"settings": described, "rows": len(rows), "log": trainer.state.log_history}
    write_atomic(output / FACTS_FILE, (json.dumps(facts, indent=1) + "\n").encode())
    return output


def _check_trl() -> None:
    """Refuse to train without trl.

    Raises:
        PipelineError: trl cannot be imported.
    """
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise PipelineError(
            f"training a rewriter needs trl, which cannot be imported: {error}",
            where="customize rewriter train",
            fix="pip install 'diffusers-customize[rewrite]'",
        ) from error


def _make_trainer(
    config: RewriterTrainConfig, parts: TrainerParts, model: Any, tokenizer: Any, is_lora: bool
) -> Any:
    """Return trl's trainer.

    Args:
        config: The settings.
        parts: What the method trains with.
        model: The model to train.
        tokenizer: Its tokenizer.
        is_lora: Whether the model has the LoRA already that is trained on.
    """
    from datasets import Dataset
    from peft import LoraConfig

    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(config.seed)
    return _round_warmup_down(parts.trainer, config.warmup)(
        model=model,
        args=parts.arguments(**{**_arguments(config), **parts.options}),
        train_dataset=Dataset.from_list(parts.texts),
        processing_class=tokenizer,
        peft_config=None if is_lora else lora,
        **parts.keywords,
    )


def _arguments(config: RewriterTrainConfig) -> dict[str, Any]:
    """Return the arguments of trl's trainers that all methods share."""
    is_cpu = (config.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cpu"
    return {
        "output_dir": str(config.output),
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "learning_rate": config.rate,
        "lr_scheduler_type": "linear",
        "bf16": config.mixed_precision == "bf16",
        "gradient_checkpointing": config.gradient_checkpointing,
        "seed": config.seed,
        "use_cpu": is_cpu,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_steps": config.checkpoint_every,
        "save_total_limit": config.keep_checkpoints,
        "report_to": [],
        "disable_tqdm": True,
    }


def _round_warmup_down(trainer: type, warmup: float) -> Any:
    """Return a trainer whose warmup leaves at least one step.

    transformers rounds a share of the steps up, so that the only step of a short training would
    have a learning rate of 0. The number of steps is known once the trainer counted its batches.

    Args:
        trainer: Class of the trainer.
        warmup: Share of the steps with a rising learning rate, below 1.
    """

    def create_scheduler(self: Any, num_training_steps: int, optimizer: Any = None) -> Any:
        self.args.warmup_steps = int(warmup * num_training_steps)
        return trainer.create_scheduler(self, num_training_steps, optimizer)  # type: ignore[attr-defined]

    return type(trainer.__name__, (trainer,), {"create_scheduler": create_scheduler})


def _check_output(config: RewriterTrainConfig, settings: Mapping[str, Any]) -> str | None:
    """Prepare the output folder, and return the checkpoint to resume from.

    Args:
        config: The settings.
        settings: As :func:`_describe` returns them.

    Raises:
        SettingsError: The folder has checkpoints of other settings or data.
        StorageError: The folder cannot be written to.
    """
    output = config.output
    check_writable(output)
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = _last_whole_checkpoint(output) if config.resume else None
    if checkpoint is not None:
        fixed = {name: settings[name] for name in settings.keys() - _FREE_SETTINGS}
        check_record(output, fixed, "the checkpoints", "choose another output, or resume=false")
        return str(checkpoint)
    for old in _checkpoints(output):  # of which a later run must not resume
        shutil.rmtree(old)
    write_record(output, settings)
    return None


def _checkpoints(output: Path) -> list[Path]:
    """Return the folders of checkpoints, the latest first."""
    found = [path for path in output.glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def _last_whole_checkpoint(output: Path) -> Path | None:
    """Return the latest checkpoint that was written completely; later ones are deleted."""
    for path in _checkpoints(output):
        try:
            read_json(path / "trainer_state.json", MAX_BYTES)  # is written last
        except (OSError, ValueError):
            pass
        else:
            if all((path / name).is_file() for name in _CHECKPOINT_FILES):
                return path
        shutil.rmtree(path)
    return None


def _describe(config: RewriterTrainConfig) -> dict[str, Any]:
    """Return the settings, and the digest of the data."""
    digest = hashlib.sha256(read_bytes(config.data, MAX_BYTES)).hexdigest()
    return {**config.used(), "content of data": digest}
