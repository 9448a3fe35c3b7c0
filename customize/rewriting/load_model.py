"""Loading language models: a folder or hub id of transformers, a GGUF file, or a LoRA of one."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from customize.concepts.io.data_files import read_json_file
from customize.concepts.io.find_files import refuse_pickles
from customize.concepts.io.hub import is_hub_id
from customize.errors import ConceptError, ConfigError, PipelineError, first_line
from customize.near_names import suggest_paths
from customize.rewriting.cached_models import NAMES, cached_model
from customize.rewriting.instructions import Instructions
from customize.rewriting.local_model import LocalModel
from customize.safe_read import as_path, check_regular_files, path_exists
from customize.text import one_line, plural, quote, shorten

#: Instructions and number of tokens that a model was trained with, beside its weights.
SETTINGS_FILE = "rewriter.json"
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
#: Names of files of tokenizers.
_TOKENIZERS = ("tokenizer*", "vocab*", "spiece*", "*.tiktoken")
#: The fix for other folders and files.
_WANTED = (
    "give a folder or hub id of a causal language model of transformers with safetensors weights, "
    "or a GGUF file of an architecture that transformers converts"
)
#: Bytes of weights from which 4 bits are chosen on a GPU.
_LARGE = 4 * 2**30


@dataclass(frozen=True)
class TrainedSettings:
    """What a model that was trained to rewrite brings with it.

    Attributes:
        instructions: The text around the prompt.
        max_new_tokens: Largest number of tokens of a rewriting.
    """

    instructions: Instructions = field(default_factory=Instructions)
    max_new_tokens: int = 160


def load_model(
    source: str | Path,
    base: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    load_in_4bit: bool | None = None,
    instructions: Instructions | None = None,
) -> tuple[LocalModel, TrainedSettings]:
    """Load a language model.

    Args:
        source: Folder or hub id of a causal language model with a chat template; a ``.gguf`` file;
            a folder with a LoRA of one (peft); or a name in
            :data:`customize.rewriting.cached_models.NAMES`.
        base: The model that a LoRA was trained on. None: the one that the LoRA names.
        dtype: dtype of the weights. None: float32 on machines without a CUDA device, otherwise that
            of the files.
        load_in_4bit: Whether bitsandbytes quantizes the weights. None: where there is a CUDA
            device, bitsandbytes is installed, and the weights have over 4 GiB.
        instructions: The text around a prompt. None: what the model was trained with.

    Raises:
        ConceptError: A file is missing, damaged, a pickle, or of an unknown architecture.
        ConfigError: The source is no path or name, or an argument does not belong to it.
        PipelineError: The model has no chat template, or needs a package that is not installed.
    """
    path = _locate(source)
    settings = _read_settings(path)
    if instructions is not None:
        settings = TrainedSettings(instructions, settings.max_new_tokens)
    is_lora = isinstance(path, Path) and path_exists(path / ADAPTER_CONFIG)
    if base is not None and not is_lora:
        raise ConfigError(
            "base= belongs to a LoRA, and the source is a whole model",
            where=source,
            fix=f"leave it out, or name a folder with {ADAPTER_CONFIG}",
        )
    whole = _load_model(path, base, dtype, load_in_4bit)
    reload = functools.partial(_load_weights, path, base, dtype, load_in_4bit)
    model = LocalModel(whole.model, whole.tokenizer, whole.name, reload)
    model.check_words(settings.instructions.messages(""))
    return model, settings


def load_trainable(source: str | Path) -> tuple[Any, LocalModel, TrainedSettings, bool]:
    """Load a language model to train a LoRA of it, in float32.

    Args:
        source: As in :func:`load_model`. A LoRA stays one, and its weights are trained on.

    Returns:
        The model to train, the model without a LoRA, the settings that it was trained with, and
        whether the source is a LoRA.

    Raises:
        CustomizeError: See :func:`load_model`.
    """
    path = _locate(source)
    settings = _read_settings(path)
    is_lora = isinstance(path, Path) and path_exists(path / ADAPTER_CONFIG)
    if isinstance(path, Path) and is_lora:
        model, whole = _attach_adapter(path, None, torch.float32, False, is_trainable=True)
    else:
        whole = _load_whole(path, torch.float32, False)
        model = whole.model
        if source in NAMES:  # which its LoRA names, as another machine has another folder
            model.name_or_path = source
    whole.check_words(settings.instructions.messages(""))
    return model, whole, settings, is_lora


def _locate(source: str | Path) -> Path | str:
    """Return the path of a source, or a hub id."""
    if isinstance(source, str) and source in NAMES:
        return cached_model(source)
    path = as_path(source, "source")
    if path_exists(path):
        return path
    if isinstance(source, str) and is_hub_id(source):
        return source
    raise ConceptError(
        "the language model does not exist",
        where=source,
        fix=suggest_paths(source, f"check the path; known names are {', '.join(NAMES)}"),
    )


def _read_settings(path: Path | str) -> TrainedSettings:
    file = path / SETTINGS_FILE if isinstance(path, Path) else None
    if file is None or not path_exists(file):
        return TrainedSettings()
    values = read_json_file(file)
    known = {"system", "user", "max_new_tokens"}
    if not isinstance(values, Mapping) or not known >= values.keys():
        raise ConceptError(
            f"it has other fields than {', '.join(sorted(known))}",
            where=file,
            fix="use a folder that the training of rewriters wrote",
        )
    defaults = TrainedSettings()
    return TrainedSettings(
        Instructions(
            values.get("system", defaults.instructions.system),
            values.get("user", defaults.instructions.user),
        ),
        values.get("max_new_tokens", defaults.max_new_tokens),
    )


def write_settings(settings: TrainedSettings) -> str:
    """Return the text of the settings file."""
    values = {
        "system": settings.instructions.system,
        "user": settings.instructions.user,
        "max_new_tokens": settings.max_new_tokens,
    }
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _load_model(
    path: Path | str, base: str | Path | None, dtype: torch.dtype | None, in_4bit: bool | None
) -> LocalModel:
    """Load a whole model, or merge a LoRA into its base."""
    if isinstance(path, Path) and path_exists(path / ADAPTER_CONFIG):
        return _load_adapter(path, base, dtype, in_4bit)
    return _load_whole(path, dtype, in_4bit)


def _load_weights(*arguments: Any) -> Any:
    """Return the model of transformers of :func:`_load_model`."""
    return _load_model(*arguments).model


def _load_whole(path: Path | str, dtype: torch.dtype | None, in_4bit: bool | None) -> LocalModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = str(path)
    options: dict[str, Any] = {"dtype": dtype or _default_dtype()}
    folder, file = path, None
    if isinstance(path, Path) and path.is_file():
        folder, file = path.parent, path.name
        options |= _gguf_options(path)
    elif isinstance(path, Path):
        check_regular_files(path)
        refuse_pickles(path)
        _check_folder(path)
    if file is None:
        options["use_safetensors"] = True
    if _wants_4bit(path, in_4bit):
        options["quantization_config"] = _quantization()
    if in_4bit and file is not None:
        raise ConfigError(
            "weights of a GGUF file are quantized already",
            where=path,
            fix="leave load_in_4bit out",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, **({"gguf_file": file} if file else {})
        )
        model, notes = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, output_loading_info=True, **options
        )
    except Exception as error:  # missing or damaged files, unknown architectures, offline
        reason = first_line(error)
        if reason.endswith(":"):  # which announces the next lines
            reason = shorten(one_line(str(error)), 400)
        raise ConceptError(
            f"the language model cannot be loaded: {reason}", where=path, fix=_WANTED
        ) from error
    missing = sorted(notes["missing_keys"])
    if missing:
        raise ConceptError(
            f"the language model lacks {plural(len(missing), 'weight')}, such as {missing[0]}",
            where=path,
            fix="download it again",
        )
    return LocalModel(model, tokenizer, name)


def _check_folder(path: Path) -> None:
    """Refuse a folder that obviously holds no language model.

    Raises:
        ConceptError: It has no configuration or no tokenizer.
    """
    if path_exists(path / "model_index.json"):
        problem = "the folder has an image pipeline of diffusers, and no language model"
    elif not path_exists(path / "config.json"):
        problem = f"the folder has neither config.json nor {ADAPTER_CONFIG}, so no language model"
    elif not any(file for pattern in _TOKENIZERS for file in path.glob(pattern)):
        problem = "the folder has a model without a tokenizer"
    else:
        return
    raise ConceptError(problem, where=path, fix=_WANTED)


def _load_adapter(
    folder: Path, base: str | Path | None, dtype: torch.dtype | None, in_4bit: bool | None
) -> LocalModel:
    model, whole = _attach_adapter(folder, base, dtype, in_4bit)
    return LocalModel(model.merge_and_unload(), whole.tokenizer, str(folder))


def _attach_adapter(
    folder: Path,
    base: str | Path | None,
    dtype: torch.dtype | None,
    in_4bit: bool | None,
    is_trainable: bool = False,
) -> tuple[Any, LocalModel]:
    """Return the base model with a LoRA, and the base model."""
    from peft import PeftModel

    refuse_pickles(folder)
    if not path_exists(folder / _ADAPTER_WEIGHTS):
        raise ConceptError(
            f"{_ADAPTER_WEIGHTS} is missing", where=folder, fix="download the LoRA again"
        )
    values = read_json_file(folder / ADAPTER_CONFIG)
    named = values.get("base_model_name_or_path") if isinstance(values, Mapping) else None
    if base is None and not isinstance(named, str):
        raise ConceptError(
            "the LoRA does not name its base model",
            where=folder / ADAPTER_CONFIG,
            fix="give base=, the folder or hub id of the model that it was trained on",
        )
    whole = _load_whole(_locate(base or str(named)), dtype, in_4bit)
    try:
        model = PeftModel.from_pretrained(whole.model, str(folder), is_trainable=is_trainable)
    except Exception as error:  # other shapes, unknown settings
        reason = first_line(error)
        raise ConceptError(
            f"the LoRA does not fit its base model: {reason}",
            where=folder,
            fix=f"give base=, the model that it was trained on; it names {quote(named)}",
        ) from error
    return model, whole


def _default_dtype() -> torch.dtype | str:
    return "auto" if torch.cuda.is_available() else torch.float32


def _gguf_options(path: Path) -> dict[str, Any]:
    if path.suffix.lower() != ".gguf":
        raise ConfigError(
            "it is a file, and neither a folder nor a GGUF file",
            where=path,
            fix="name the folder of the model",
        )
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise PipelineError(
            "GGUF files need the package gguf",
            where=path,
            fix="pip install 'diffusers-customize[rewrite]'",
        ) from error
    from transformers import GgufConfig

    # Without dequantize the model counts as quantized, and can neither be cast nor trained.
    return {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}


def _wants_4bit(path: Path | str, chosen: bool | None) -> bool:
    if chosen is not None:
        return chosen
    if not torch.cuda.is_available() or not isinstance(path, Path) or path.is_file():
        return False
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return size > _LARGE and _has_bitsandbytes()


def _has_bitsandbytes() -> bool:
    from transformers.utils import is_bitsandbytes_available

    return bool(is_bitsandbytes_available())


def _quantization() -> Any:
    from transformers import BitsAndBytesConfig

    if not _has_bitsandbytes():
        raise PipelineError(
            "4 bits need the package bitsandbytes",
            where="load_in_4bit",
            fix="pip install bitsandbytes, or leave load_in_4bit out",
        )
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
