"""Application of attention backends to models, reports of the result, and restoration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from customize.families import Family

_SETTING_ATTRIBUTE = "_customize_attention"


@dataclass(frozen=True)
class BackendChoice:
    """The backend chosen for one component.

    Attributes:
        backend: Name in diffusers, or in transformers for a text encoder.
        error: Largest measured error, see
            :data:`customize.base.attention.backends.ERROR_BOUNDS`; None if nothing was measured.
        note: Why the component keeps its current backend; empty if it does not.
    """

    backend: str
    error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class BackendReport:
    """The backend that a component currently uses.

    Attributes:
        component: Name of the component.
        backend: Name of the backend.
        modules: Number of attention modules that use the backend.
        error: As in :class:`BackendChoice`.
        custom_processors: Class -> number of custom processors, which keep their own backend.
        note: As in :class:`BackendChoice`.
    """

    component: str
    backend: str
    modules: int
    error: float | None
    custom_processors: Mapping[str, int]
    note: str = ""

    def __str__(self) -> str:
        text = f"{self.component} {self.backend}"
        if self.note:
            return f"{text} ({self.note})"
        parts = [f"{self.modules} modules"]
        parts += [] if self.error is None else [f"error {self.error:.1g}"]
        parts += [f"{count} {name} kept" for name, count in self.custom_processors.items()]
        return f"{text} ({', '.join(parts)})"


@dataclass(eq=False)
class _Setting:
    """State of a model with a backend, from which the previous state can be restored.

    Attributes:
        choice: The backend.
        processors: (module, previous processor, new processor).
        names: (processor, previous attributes, new backend).
        configs: (transformers config, previous implementation).
    """

    choice: BackendChoice
    processors: list[tuple[Any, Any, Any]] = field(default_factory=list)
    names: list[tuple[Any, dict[str, Any], Any]] = field(default_factory=list)
    configs: list[tuple[Any, str]] = field(default_factory=list)


def attention_modules(model: nn.Module) -> list[Any]:
    """Return the modules of a diffusers model that have an attention processor."""
    return [module for module in model.modules() if hasattr(module, "set_processor")]


@contextmanager
def apply_backends(family: Family, choices: Mapping[str, BackendChoice]) -> Iterator[None]:
    """Apply backends, replacing earlier ones; an error in the body restores the previous state.

    Args:
        family: The pipeline's family.
        choices: Component -> backend.
    """
    models = {key: family.components[key] for key in choices}
    before = {key: vars(model).get(_SETTING_ATTRIBUTE) for key, model in models.items()}
    try:
        for key, model in models.items():
            restore_backends(model)
            _apply(model, choices[key])
        yield
    except BaseException:
        for key, model in models.items():
            restore_backends(model)
            if before[key] is not None:
                _apply(model, before[key].choice)
        raise


def restore_backends(model: Any) -> None:
    """Restore a model's attention modules, except those that were changed since."""
    setting = vars(model).pop(_SETTING_ATTRIBUTE, None)
    if setting is None:
        return
    for module, before, after in setting.processors:
        if module.processor is after:
            module.set_processor(before)
    for processor, before, backend in setting.names:
        if processor._attention_backend == backend:
            vars(processor).pop("_attention_backend", None)
            vars(processor).update(before)
    for config, before in setting.configs:
        config._attn_implementation = before


def report_backends(components: Mapping[str, Any]) -> list[BackendReport]:
    """Report the backends in use, for each component with one set by :func:`apply_backends`."""
    reports = []
    for key, model in components.items():
        setting = vars(model).get(_SETTING_ATTRIBUTE) if isinstance(model, nn.Module) else None
        if setting is None:
            continue
        choice, custom = setting.choice, Counter[str]()
        # transformers' attention modules have no processors; their class names identify them.
        names = [type(module).__name__ for module in model.modules() if hasattr(module, "config")]
        count = sum(name.endswith("Attention") for name in names)
        for module in attention_modules(model):
            if _uses(module, choice.backend):
                count += 1
            else:
                custom[type(module.processor).__name__] += 1
        reports.append(
            BackendReport(key, choice.backend, count, choice.error, dict(custom), choice.note)
        )
    return reports


def _apply(model: Any, choice: BackendChoice) -> None:
    setting = _Setting(choice)
    setattr(model, _SETTING_ATTRIBUTE, setting)  # first, so that a failure below can be reverted
    if not hasattr(model, "set_attn_implementation"):
        if not choice.note:
            _apply_to_processors(model, setting)
    elif model.config._attn_implementation != choice.backend:
        from transformers import PreTrainedModel

        nested = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        # Outermost first: setting a config sets nested ones, which are then restored themselves.
        setting.configs = [(part.config, part.config._attn_implementation) for part in nested]
        model.set_attn_implementation(choice.backend)


def _apply_to_processors(model: Any, setting: _Setting) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    backend = AttentionBackendName(setting.choice.backend)
    seen: set[int] = set()
    for module in filter(is_processor_replaceable, attention_modules(model)):
        processor = module.processor
        if hasattr(processor, "_attention_backend"):
            if id(processor) not in seen:  # several modules may share one
                seen.add(id(processor))
                before = {k: v for k, v in vars(processor).items() if k == "_attention_backend"}
                setting.names.append((processor, before, backend))
                processor._attention_backend = backend
        elif not _uses(module, backend.value):
            replacement = _builtin_processors()[type(processor)][backend.value]()
            setting.processors.append((module, processor, replacement))
            module.set_processor(replacement)


def _builtin_processors() -> dict[type, dict[str, type]]:
    """Return diffusers' replaceable processor -> backend -> equivalent processor."""
    from diffusers.models import attention_processor as processors

    plain = {"native": processors.AttnProcessor2_0, "xformers": processors.XFormersAttnProcessor}
    joint = {
        "native": processors.JointAttnProcessor2_0,
        "xformers": processors.XFormersJointAttnProcessor,
    }
    # Only torch's attention: diffusers' xFormers processors would omit the rotary embedding.
    native_only = [
        {"native": processors.CogVideoXAttnProcessor2_0},
        {"native": processors.FusedCogVideoXAttnProcessor2_0},
    ]
    sliced = {processors.AttnProcessor: plain, processors.SlicedAttnProcessor: plain}
    groups = (plain, joint, *native_only)
    return {processor: group for group in groups for processor in group.values()} | sliced


def is_processor_replaceable(module: Any) -> bool:
    """Whether a module's backend can be set, which is not the case for custom processors."""
    if hasattr(module.processor, "_attention_backend"):
        return True
    # AttnProcessor2_0 scales by 1 / sqrt(width) even if the module has scale_qk=False.
    return type(module.processor) in _builtin_processors() and getattr(module, "scale_qk", True)


def _uses(module: Any, backend: str) -> bool:
    processor = module.processor
    if hasattr(processor, "_attention_backend"):
        return processor._attention_backend == backend
    return type(processor) is _builtin_processors().get(type(processor), {}).get(backend)


def supports_backend(module: Any, backend: str) -> bool:
    """Whether a module with a replaceable processor supports a backend."""
    processor = module.processor
    if hasattr(processor, "_attention_backend"):
        return True
    return backend in _builtin_processors()[type(processor)]


def uses_dispatcher(model: nn.Module) -> bool:
    """Whether any attention module of a model uses diffusers' dispatcher."""
    modules = attention_modules(model)
    return any(hasattr(module.processor, "_attention_backend") for module in modules)
