"""A reference encoder, its adapter and its processor, and the folder they are saved in.

``references.json`` is the configuration, ``mllm.json`` that of the MLLM with all its layers,
``references.safetensors`` has the weights under ``encoder.`` and ``adapter.``, and beside them are
the files of the tokenizer and the image processor.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customize.atomic import write_atomic
from customize.errors import ConfigError, CustomizeError, storage_error
from customize.references.adapter import AttentionLayers, ReferenceAdapter
from customize.references.config import ReferencesConfig, parse_config
from customize.references.encoder import ReferenceEncoder
from customize.references.encoder_inputs import ReferenceProcessor
from customize.safe_read import MAX_TABLE_BYTES, check_regular_files, read_json, read_safetensors
from customize.text import one_line

CONFIG_FILE, MLLM_FILE = "references.json", "mllm.json"
WEIGHTS_FILE = "references.safetensors"
_FIX = "give a folder that was written by a training of references"
_ENCODER, _ADAPTER = "encoder.", "adapter."


@dataclass(eq=False)
class ReferenceModel:
    """What reads groups of images for a denoiser.

    Attributes:
        config: The configuration.
        encoder: Groups of images -> reference tokens.
        adapter: Reads the tokens in the denoiser's attention layers.
        processor: Images and prompts -> inputs of the encoder.
    """

    config: ReferencesConfig
    encoder: ReferenceEncoder
    adapter: ReferenceAdapter
    processor: ReferenceProcessor

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ReferenceModel:
        """Load a folder, with weights in float32 on the CPU.

        Raises:
            ConfigError: A file is missing, damaged, or does not fit the others.
        """
        folder = Path(folder)
        try:
            check_regular_files(folder)
            config = parse_config(read_json(folder / CONFIG_FILE, MAX_TABLE_BYTES), folder)
            weights = _read_weights(folder / WEIGHTS_FILE)
            encoder = make_encoder(config, read_json(folder / MLLM_FILE, MAX_TABLE_BYTES))
            encoder.load_state_dict(_with_prefix(weights, _ENCODER))
            adapter = make_adapter_of(config, _with_prefix(weights, _ADAPTER))
            processor = ReferenceProcessor.from_pretrained(folder)
        except CustomizeError:
            raise
        except OSError as error:
            raise ConfigError(
                one_line(f"the references cannot be read: {error.strerror or error}"),
                where=folder,
                fix=_FIX,
            ) from error
        except Exception as error:  # parsers raise nearly anything on damaged data
            raise ConfigError(
                one_line(f"the references are damaged: {error}"), where=folder, fix=_FIX
            ) from error
        return cls(config, encoder.eval(), adapter, processor)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the folder; each file is written atomically, the configuration last.

        Args:
            folder: The folder; created if missing.
            dtype: Dtype of the weights in the file.

        Raises:
            StorageError: A file cannot be written.
        """
        from safetensors.torch import save

        folder = Path(folder)
        weights = {_ENCODER + key: value for key, value in self.encoder.state_dict().items()}
        weights |= {_ADAPTER + key: value for key, value in self.adapter.state_dict().items()}
        stored = {
            key: value.detach().to("cpu", dtype).contiguous() for key, value in weights.items()
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.processor.save_pretrained(folder)
            mllm = json.dumps(full_mllm_config(self.encoder), indent=2) + "\n"
            write_atomic(folder / MLLM_FILE, mllm.encode())
            write_atomic(folder / WEIGHTS_FILE, save(stored))
            write_atomic(folder / CONFIG_FILE, self.config.to_json().encode())
        except OSError as error:
            raise storage_error(error, folder) from error


def make_encoder(config: ReferencesConfig, mllm_config: Mapping[str, Any]) -> ReferenceEncoder:
    """Create an encoder of random weights.

    Args:
        config: Configuration of the references.
        mllm_config: Configuration of a Qwen2-VL or Qwen2.5-VL with all its layers.
    """
    mllm_class = mllm_class_of(mllm_config)
    return ReferenceEncoder(config, mllm_class(mllm_class.config_class.from_dict(mllm_config)))


def mllm_class_of(mllm_config: Mapping[str, Any]) -> Any:
    """Return the class of an MLLM by its ``model_type``.

    Raises:
        ConfigError: It is of another kind.
    """
    import transformers

    classes = {
        "qwen2_vl": "Qwen2VLModel",
        "qwen2_5_vl": "Qwen2_5_VLModel",
        "qwen3_vl": "Qwen3VLModel",
    }
    kind = mllm_config.get("model_type") if isinstance(mllm_config, Mapping) else None
    if kind not in classes:
        raise ConfigError(
            f"an MLLM of the type {kind} cannot read references",
            where="mllm",
            fix=f"give a folder of the type {' or '.join(classes)}",
        )
    return getattr(transformers, classes[kind])


def full_mllm_config(encoder: ReferenceEncoder) -> dict[str, Any]:
    """Return the configuration of an encoder's MLLM with the layer that the encoder has apart."""
    config = copy.deepcopy(encoder.mllm.config)
    text = config.text_config
    text.num_hidden_layers += 1
    text.layer_types = [*text.layer_types, text.layer_types[-1]]
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return values


def make_adapter_of(config: ReferencesConfig, weights: Mapping[str, Tensor]) -> ReferenceAdapter:
    """Create an adapter with the weights of a file, whose keys name its layers."""
    key, up, down = ".to_k_ref.weight", ".lora_B.weight", ".lora_A.weight"
    layers = AttentionLayers(
        {name.removesuffix(key): len(w) for name, w in weights.items() if name.endswith(key)},
        {
            name.removesuffix(up): (len(w), weights[name.removesuffix(up) + down].shape[1])
            for name, w in weights.items()
            if name.endswith(up)
        },
    )
    adapter = ReferenceAdapter(layers, config.width, config.lora_rank, config.lora_alpha)
    adapter.load_state_dict(weights)
    return adapter


def _with_prefix(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def _read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load

    weights = {key: value.float() for key, value in load(read_safetensors(path)).items()}
    broken = [key for key, value in weights.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise ValueError(f"{broken[0]} has values that are not finite")
    return weights
