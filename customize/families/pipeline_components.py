"""The components of a pipeline that a family uses, by their names in ``pipe.components``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn

from customize.errors import PipelineError

#: An empty pipeline configuration.
NO_CONFIG: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class TokenDictionary:
    """One vocabulary that new tokens can be added to.

    Attributes:
        key: Component name of the text encoder.
        tokenizer: Its tokenizer.
        text_encoder: The model whose ``get_input_embeddings()`` is the (tokens, width) table.
    """

    key: str
    tokenizer: Any
    text_encoder: nn.Module


class Components:
    """The components of one model and their roles.

    It references the components and does not copy them. Freed components may be missing or None;
    only what needs them raises errors.

    Attributes:
        components: Component name -> object, as in ``pipe.components``.
        pipeline_config: As ``pipe.config``, which in some pipelines describes the model: whether it
            was distilled, which layers of its LLM the denoiser reads, or the noise level at which
            one denoiser follows another.
        max_sequence_length: The number of tokens that a call of the pipeline reads of a prompt;
            None for the pipeline's default.
    """

    name: ClassVar[str]
    denoiser_key: ClassVar[str]
    #: Component names of further denoisers, each for a range of noise levels.
    other_denoisers: ClassVar[tuple[str, ...]] = ()
    #: Component name of each CLIP text encoder -> that of its tokenizer.
    clip_encoders: ClassVar[dict[str, str]]
    #: Component names of text encoders that take neither adapters nor new tokens.
    other_encoders: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, components: Mapping[str, Any], pipeline_config: Mapping[str, Any] = NO_CONFIG
    ) -> None:
        self.components = dict(components)
        self.pipeline_config = pipeline_config
        self.max_sequence_length: int | None = None
        self._dtype_seen: tuple[int, torch.dtype, torch.dtype] | None = None

    @classmethod
    def component_names(cls) -> list[str]:
        """Return the names of all components that a model of this family may use."""
        others = {key: key.replace("text_encoder", "tokenizer") for key in cls.other_encoders}
        encoders = cls.clip_encoders | others
        models = (cls.denoiser_key, *cls.other_denoisers, "vae", *encoders)
        return [*models, "scheduler", *encoders.values()]

    @property
    def denoiser(self) -> Any:
        """The UNet or transformer; of several, the one for the highest noise levels."""
        return self._component(self.denoiser_key)

    @property
    def denoisers(self) -> dict[str, Any]:
        """Component name -> denoiser, for each of them; the first is :attr:`denoiser`.

        All denoisers take adapters.
        """
        return {self.denoiser_key: self.denoiser} | self._present(self.other_denoisers)

    @property
    def adaptable(self) -> dict[str, Any]:
        """Component name -> model, for each one that takes adapters."""
        return {**self.denoisers, **self.text_encoders}

    @property
    def vae(self) -> Any:
        """The autoencoder."""
        return self._component("vae")

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler; only its configuration is read, its state is never changed."""
        return self._component("scheduler")

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """Component name -> text encoder, for those that take adapters (CLIP only)."""
        return self._present(tuple(self.clip_encoders))

    def tokenizer_for(self, key: str) -> Any:
        """Return the tokenizer of a text encoder, or None if there is none.

        Args:
            key: Component name of the text encoder.
        """
        name = self.clip_encoders.get(key, key.replace("text_encoder", "tokenizer"))
        parts = [self.components.get(name), self.components.get("processor")]
        part = next((part for part in parts if part is not None), None)
        return getattr(part, "tokenizer", part)  # a processor contains its tokenizer

    @property
    def all_text_encoders(self) -> dict[str, nn.Module]:
        """Component name -> text encoder, for each one, with or without adapters."""
        return self._present((*self.clip_encoders, *self.other_encoders))

    @property
    def unused(self) -> dict[str, nn.Module]:
        """Component name -> model that a family never calls, such as an audio decoder."""
        used = {*self.denoisers, "vae", *self.clip_encoders, *self.other_encoders}
        return {
            key: part
            for key, part in self.components.items()
            if isinstance(part, nn.Module) and key not in used
        }

    def token_dictionaries(self) -> list[TokenDictionary]:
        """Return the vocabularies that a new token is added to, one for each CLIP text encoder."""
        return [
            TokenDictionary(key, self._component(self.clip_encoders[key]), encoder)
            for key, encoder in self.text_encoders.items()
        ]

    def _length(self, default: int) -> int:
        """Return the number of tokens that are read of a prompt."""
        return self.max_sequence_length or default

    @property
    def _denoiser_dtype(self) -> torch.dtype:
        """The denoiser's ``dtype``, cached because diffusers visits all modules for it."""
        denoiser = self.denoiser
        stored = next(denoiser.parameters()).dtype
        seen = self._dtype_seen
        if seen is None or seen[:2] != (id(denoiser), stored):
            self._dtype_seen = seen = (id(denoiser), stored, denoiser.dtype)
        return seen[2]

    def _component(self, key: str) -> Any:
        part = self.components.get(key)
        if part is None:
            raise PipelineError(
                f"the model has no {key}, which is needed here",
                where=f"family {self.name}",
                fix=f"load the pipeline with its {key}, and free it only after its last use",
            )
        return part

    def _present(self, keys: tuple[str, ...]) -> dict[str, nn.Module]:
        return {key: self.components[key] for key in keys if self.components.get(key) is not None}


def uncompiled(component: Any) -> Any:
    """Return the module inside torch.compile's wrapper, or the component itself."""
    return getattr(component, "_orig_mod", component)


def is_compiled(component: Any) -> bool:
    """Return whether torch.compile wraps a module, or compiles it or one inside it in place."""
    return uncompiled(component) is not component or any(
        getattr(module, "_compiled_call_impl", None) is not None for module in component.modules()
    )


def class_name(component: Any) -> str:
    """Return the name of a component's class; "None" for a missing component."""
    return "None" if component is None else type(uncompiled(component)).__name__


def modules_named(model: Any, pattern: str) -> list[str]:
    """Return the full names of a model's modules that match, in the module tree's order.

    Args:
        model: A module, compiled or not.
        pattern: Regular expression for the full name.
    """
    names = (name for name, _ in uncompiled(model).named_modules())
    return [name for name in names if re.fullmatch(pattern, name)]
