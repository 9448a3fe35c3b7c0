"""Putting a backend into a model's attentions, telling what took effect, and taking it back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from customize.families import Family

_KEY = "_customize_attention"


@dataclass(frozen=True)
class BackendChoice:
    """What one component is to use.

    Attributes:
        backend: diffusers' name of it, or transformers' for a text encoder.
        error: largest measured error, see
            :data:`customize.base.attention.backends.ERROR_BOUNDS`; None where nothing was measured.
        note: why the component keeps its own; empty where it takes the backend.
    """

    backend: str
    error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class BackendReport:
    """What took effect in one component, at the time of asking.

    Attributes:
        modules: how many of its attentions use the backend.
        kept: class -> number of the processors that were left alone, being someone's own.
    """

    component: str
    backend: str
    modules: int
    error: float | None
    kept: Mapping[str, int]
    note: str = ""

    def __str__(self) -> str:
        text = f"{self.component} {self.backend}"
        if self.note:
            return f"{text} ({self.note})"
        parts = [f"{self.modules} modules"]
        parts += [] if self.error is None else [f"error {self.error:.1g}"]
        parts += [f"{count} {name} kept" for name, count in self.kept.items()]
        return f"{text} ({', '.join(parts)})"


@dataclass(eq=False)
class _Setting:
    """What a model carries while a backend is set: enough to take it back.

    Attributes:
        processors: (module, what it had, what it got).
        names: (processor, the attributes that it had, the backend that it got).
        configs: (transformers' config, what it had).
    """

    choice: BackendChoice
    processors: list[tuple[Any, Any, Any]] = field(default_factory=list)
    names: list[tuple[Any, dict[str, Any], Any]] = field(default_factory=list)
    configs: list[tuple[Any, str]] = field(default_factory=list)


def attention_modules(model: nn.Module) -> list[Any]:
    """The modules of a diffusers model that have a processor."""
    return [each for each in model.modules() if hasattr(each, "set_processor")]


@contextmanager
def apply_backends(family: Family, choices: Mapping[str, BackendChoice]) -> Iterator[None]:
    """Put the choices in place; after an error within, all is as before.

    What was set by an earlier call is replaced.
    """
    models = {key: family.components[key] for key in choices}
    before = {key: vars(model).get(_KEY) for key, model in models.items()}
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
    """Give a model's attentions back what they had; what someone changed since stays."""
    setting = vars(model).pop(_KEY, None)
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
    """What took effect, component by component; empty where no backend is set."""
    found = []
    for key, part in components.items():
        setting = vars(part).get(_KEY) if isinstance(part, nn.Module) else None
        if setting is None:
            continue
        choice, kept = setting.choice, Counter[str]()
        # transformers' attentions have no processors, and are known by their names.
        names = [type(each).__name__ for each in part.modules() if hasattr(each, "config")]
        count = sum(name.endswith("Attention") for name in names)
        for module in attention_modules(part):
            if _uses(module, choice.backend):
                count += 1
            else:
                kept[type(module.processor).__name__] += 1
        found.append(
            BackendReport(key, choice.backend, count, choice.error, dict(kept), choice.note)
        )
    return found


def _apply(model: Any, choice: BackendChoice) -> None:
    setting = _Setting(choice)
    setattr(model, _KEY, setting)  # first, so that a failure below can be undone
    if not hasattr(model, "set_attn_implementation"):
        if not choice.note:
            _apply_to_processors(model, setting)
    elif model.config._attn_implementation != choice.backend:
        from transformers import PreTrainedModel

        parts = [each for each in model.modules() if isinstance(each, PreTrainedModel)]
        # Outermost first: setting one sets those within, which then get their own back.
        setting.configs = [(each.config, each.config._attn_implementation) for each in parts]
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
                own = {k: v for k, v in vars(processor).items() if k == "_attention_backend"}
                setting.names.append((processor, own, backend))
                processor._attention_backend = backend
        elif not _uses(module, backend.value):
            other = _stock()[type(processor)][backend.value]()
            setting.processors.append((module, processor, other))
            module.set_processor(other)


def _stock() -> dict[type, dict[str, type]]:
    """diffusers' own processors that may be replaced -> backend -> what does the same by it."""
    from diffusers.models import attention_processor as processors

    plain = {"native": processors.AttnProcessor2_0, "xformers": processors.XFormersAttnProcessor}
    joint = {
        "native": processors.JointAttnProcessor2_0,
        "xformers": processors.XFormersJointAttnProcessor,
    }
    # These have torch's alone, each its own: what xFormers has would leave out the rotation.
    alone = [
        {"native": processors.CogVideoXAttnProcessor2_0},
        {"native": processors.FusedCogVideoXAttnProcessor2_0},
    ]
    sliced = {processors.AttnProcessor: plain, processors.SlicedAttnProcessor: plain}
    return {each: kinds for kinds in (plain, joint, *alone) for each in kinds.values()} | sliced


def is_processor_replaceable(module: Any) -> bool:
    """Whether an attention's backend may be set: all but processors of someone's own."""
    if hasattr(module.processor, "_attention_backend"):
        return True
    # AttnProcessor2_0 divides by sqrt(width) whatever the module says.
    return type(module.processor) in _stock() and getattr(module, "scale_qk", True)


def _uses(module: Any, backend: str) -> bool:
    processor = module.processor
    if hasattr(processor, "_attention_backend"):
        return processor._attention_backend == backend
    return type(processor) is _stock().get(type(processor), {}).get(backend)


def supports_backend(module: Any, backend: str) -> bool:
    """Whether there is a way to give an open attention this backend."""
    processor = module.processor
    if hasattr(processor, "_attention_backend"):
        return True
    return backend in _stock()[type(processor)]


def uses_dispatcher(model: nn.Module) -> bool:
    """Whether any of a model's attentions goes through diffusers' dispatcher."""
    return any(hasattr(each.processor, "_attention_backend") for each in attention_modules(model))
