"""A reference model: encoder, adapter and processor, and its folder.

A folder has ``references.json`` (the configuration), ``encoder/config.json`` (that of the whole
MLLM), ``encoder/model.safetensors``, ``adapter.safetensors``, and tokenizer and image processor in
``processor/``. Weights may be stored in half precision; they are loaded in float32.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from customize.concepts.io.data_files import safetensors_bytes
from customize.core.lowrank import all_finite
from customize.core.precision import full_precision
from customize.errors import ConfigError
from customize.image_folder import join_names
from customize.near_names import did_you_mean
from customize.references.adapter import ReferenceAdapter
from customize.references.agreement import Agreement, measure_agreement
from customize.references.config import ReferencesConfig
from customize.references.encoder import ReferenceEncoder
from customize.references.encoder_inputs import (
    GroupRequest,
    ReferenceProcessor,
    check_aspect,
    unconditional_request,
)
from customize.references.group import ReferenceGroup
from customize.references.images import Reference
from customize.references.model_files import (
    ADAPTER_FILE,
    CONFIG_FILE,
    ENCODER_CONFIG_FILE,
    ENCODER_FILE,
    check_dtype,
    locate_model,
    mllm_config_json,
    read_adapter,
    read_config,
    read_encoder,
    read_processor,
)
from customize.references.write_model import check_model_folder, write_model
from customize.safe_read import as_path
from customize.text import quote
from customize.user_warnings import warn_user


class ReferenceModel:
    """Encodes groups of images to tokens, which its adapter lets a denoiser read.

    Args:
        config: The configuration.
        encoder: Images and prompt -> tokens.
        adapter: The denoiser's projections of tokens.
        processor: Tokenizer and image processor of the encoder.
    """

    def __init__(
        self,
        config: ReferencesConfig,
        encoder: ReferenceEncoder,
        adapter: ReferenceAdapter,
        processor: ReferenceProcessor,
    ) -> None:
        self.config, self.encoder, self.adapter = config, encoder, adapter
        self.processor = processor
        self._lock = threading.RLock()
        self._digest: tuple[Any, str] = (None, "")
        self._unconditional: tuple[Any, Tensor] | None = None
        self._adapters: dict[tuple[torch.device, torch.dtype], tuple[Any, ReferenceAdapter]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the parts; the lock and what is kept are made anew."""
        return type(self), (self.config, self.encoder, self.adapter, self.processor)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> ReferenceModel:
        """Load a model from a folder or hub id; everything is checked before it is used.

        Raises:
            ConceptError: A file is missing or damaged, has missing, further or wrongly shaped
                tensors or values that are not finite, or is a pickle.
            ConfigError: The source is no path, or the configuration has unknown, missing or wrong
                values.
        """
        folder = locate_model(source)
        config = read_config(folder)
        encoder = read_encoder(folder, config)
        adapter = read_adapter(folder, config)
        return cls(config, encoder, adapter, read_processor(folder, encoder))

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write the model to a folder, atomically; see :func:`write_model`.

        Args:
            folder: New, of a training run, or of a reference model, which is replaced. Files that
                are not of the model stay.
            dtype: Floating dtype of the stored weights.

        Raises:
            ConfigError: The folder is no path, or the dtype is no floating dtype, or too small for
                a weight.
            StorageError: The folder contains something else, or cannot be written.
        """
        check_dtype(dtype)
        folder = as_path(folder, "folder")
        check_model_folder(folder)
        files = {
            CONFIG_FILE: self.config.to_json().encode(),
            ENCODER_CONFIG_FILE: mllm_config_json(self.encoder).encode(),
            ENCODER_FILE: _weights_bytes(self.encoder, dtype),
            ADAPTER_FILE: _weights_bytes(self.adapter, dtype),
        }
        write_model(folder, files, self.processor)
        return folder

    def encode(
        self,
        images: Sequence[Image.Image] | Sequence[Reference],
        attributes: Sequence[str] = (),
        prompt: str = "",
        *,
        weigh: bool = True,
    ) -> ReferenceGroup:
        """Encode a group of images.

        Args:
            images: RGB images, or references, which have attributes and names of their own.
            attributes: For each of plain images the attribute to take from it; "" for all.
            prompt: The prompt; ignored by models that read none.
            weigh: Whether images that do not agree with the others count less. Images that give
                different attributes need not agree, so groups with attributes are not weighed.

        Raises:
            ConfigError: There are no images, or more than the model reads; or the prompt is not
                a text.
            DataError: An image is too narrow.
        """
        check_prompt(prompt)
        references = _as_references(images, attributes)
        self.check_references(references)
        if not self.config.includes_prompt:
            prompt = ""
        weigh = weigh and not any(reference.attribute for reference in references)
        request = GroupRequest(
            [reference.image for reference in references],
            [reference.attribute for reference in references],
            prompt,
        )
        with self._lock, torch.no_grad(), full_precision():
            inputs = self.processor.make_inputs([request], self.config).to(self.encoder.device)
            states = self.encoder.read_images(inputs)
            result = measure_agreement(self.encoder, states, inputs, len(references))
            weights = torch.tensor([result.weights]) if weigh else None
            tokens = self.encoder.read_tokens(states, inputs, weights)[0].float().cpu()
            model = self.digest
        if weigh and result.outliers:
            _warn_about_outliers(result, [reference.name for reference in references])
        return ReferenceGroup(
            tokens,
            result.agreement,
            result.weights if weigh else (1.0,) * len(references),
            tuple(reference.name for reference in references),
            tuple(reference.digest for reference in references),
            prompt,
            model,
        )

    def check_references(self, references: Sequence[Reference]) -> None:
        """Refuse a group that the model does not read, and warn of unknown attributes.

        Raises:
            ConfigError: There are no images, or more than the model reads.
            DataError: An image is too narrow.
        """
        limit, known = self.config.max_references, self.config.attributes
        if not 0 < len(references) <= limit:
            raise ConfigError(
                f"{len(references):,} reference images are given; the model reads 1 to {limit}",
                where="reference_images",
                fix="choose the images that show best what they share",
            )
        for reference in references:
            check_aspect(reference.image.size, reference.name)
        unknown = {reference.attribute for reference in references} - {"", *(known or ())}
        if known is not None and unknown:
            _warn_about_attributes(sorted(unknown), known)

    def unconditional_tokens(self) -> Tensor:
        """Return the tokens of a black image with an empty prompt: (num_tokens, width), float32.

        They are computed once.
        """
        with self._lock:
            key = _versions(self.encoder)
            if self._unconditional is None or self._unconditional[0] != key:
                images: Any = unconditional_request().images
                self._unconditional = (key, self.encode(images).tokens)
            return self._unconditional[1]

    @property
    def digest(self) -> str:
        """SHA-256 of the configuration and the values of the encoder's weights.

        These make the tokens, up to rounding. A precision or device that holds the same values has
        the same digest, so a group may be encoded on a GPU in half precision and read elsewhere.
        A cast that rounds the weights makes another model, as training does. The known attributes
        make no tokens, and do not count.
        """
        key = _versions(self.encoder)
        if self._digest[0] != key:
            config = dataclasses.replace(self.config, attributes=None)
            sha = hashlib.sha256(config.to_json().encode())
            for name, tensor in sorted(self.encoder.state_dict().items()):
                sha.update(name.encode())
                sha.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
            self._digest = (key, sha.hexdigest())
        return self._digest[1]

    def adapter_on(self, device: torch.device, dtype: torch.dtype) -> ReferenceAdapter:
        """Return the adapter on a device in a dtype: itself, or a copy that is kept."""
        with self._lock:
            weight = next(self.adapter.parameters())
            if (weight.device, weight.dtype) == (device, dtype):
                return self.adapter
            key = _versions(self.adapter)
            kept = self._adapters.get((device, dtype))
            if kept is None or kept[0] != key:
                kept = (key, copy.deepcopy(self.adapter).to(device, dtype).requires_grad_(False))
                self._adapters[device, dtype] = kept
            return kept[1]

    def move_encoder(self, device: torch.device | str) -> None:
        """Move the encoder to a device, once no other thread encodes with it."""
        with self._lock:
            self.encoder.to(device)

    def release(self) -> None:
        """Move the encoder to the CPU and drop copies of the adapter on other devices."""
        with self._lock:
            self.encoder.to("cpu")
            self._adapters = {k: v for k, v in self._adapters.items() if k[0].type == "cpu"}

    def __repr__(self) -> str:
        config = self.config
        return (
            f"ReferenceModel({config.family}, {config.num_tokens} tokens of {config.width}, "
            f"up to {config.max_references} images)"
        )


def check_prompt(prompt: Any) -> None:
    """Refuse a prompt that is not one text.

    Raises:
        ConfigError: It is something else, or has lone surrogates, which cannot be tokenized.
    """
    if not isinstance(prompt, str) or any("\ud800" <= char <= "\udfff" for char in prompt):
        raise ConfigError(
            f"the prompt of a group must be a text, not {quote(prompt)}",
            where="prompt",
            fix='give such as prompt="a dog on a beach", or leave it out',
        )


def _as_references(
    images: Sequence[Image.Image] | Sequence[Reference], attributes: Sequence[str]
) -> list[Reference]:
    if attributes and len(attributes) != len(images):
        raise ConfigError(
            f"{len(attributes)} attributes are given for {len(images)} images",
            where="attributes",
            fix='give one for each image, "" for those without',
        )
    texts = list(attributes) or [""] * len(images)
    return [
        image if isinstance(image, Reference) else Reference(image, text, f"image {number}")  # type: ignore[arg-type]
        for number, (image, text) in enumerate(zip(images, texts, strict=True), 1)
    ]


def _warn_about_outliers(result: Agreement, names: Sequence[str]) -> None:
    count = len(result.outliers)
    listed = [
        f"{names[index]} (agreement {result.agreement[index]:.2f}, counts "
        f"{result.weights[index]:.0%})"
        for index in result.outliers
    ]
    warn_user(
        f"{count} of {len(names)} references {'does' if count == 1 else 'do'} not fit the others: "
        + join_names(listed)
    )


def _warn_about_attributes(unknown: Sequence[str], known: Sequence[str]) -> None:
    listed = join_names([quote(word) for word in unknown])
    if not known:
        warn_user(
            f"the reference model was trained without attributes, so {listed} may have no effect"
        )
        return
    hints = [hint for word in unknown if (hint := did_you_mean(word, known))]
    warn_user(
        f"the reference model was not trained with the attribute{'s' * (len(unknown) > 1)} "
        f"{listed}: {' '.join([*hints, 'it knows ' + ', '.join(known)])}"
    )


def _versions(module: torch.nn.Module) -> tuple[Any, ...]:
    """Return what changes when a module's parameters are replaced, cast or changed in place."""
    parameters = list(module.parameters())
    counters = [0 if p.is_inference() else p._version for p in parameters]
    return (*map(id, parameters), *counters, *(p.dtype for p in parameters))


def _weights_bytes(module: torch.nn.Module, dtype: torch.dtype) -> bytes:
    tensors = {name: tensor.to(dtype) for name, tensor in module.state_dict().items()}
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise ConfigError(
                f"{name} is not finite in {dtype}",
                where="dtype",
                fix="save the model in torch.float32, or train it again if it is not finite there",
            )
    return safetensors_bytes(tensors, {})


def is_model_folder(path: str | Path) -> bool:
    """Whether a path is the folder of a reference model."""
    return os.path.isfile(Path(path) / CONFIG_FILE)
