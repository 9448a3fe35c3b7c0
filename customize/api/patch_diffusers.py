"""Patches of diffusers' classes, applied at once or when the classes are imported.

Both bases of all pipelines get the methods of :mod:`customize.api.pipeline_methods`, and their
``save_pretrained`` refuses pipelines that could not be loaded again. ``__call__`` and
``encode_prompt`` of every pipeline class are wrapped when the class is defined, or now for existing
classes. So the calls of every pipeline of the same models run the stages, whether it was made
before or after concepts were loaded.

This module imports nothing heavy. ``import diffusers`` leaves out the modules that define its
pipelines, and importing them takes seconds; so where they are not imported yet, patching waits.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any

from customize.api.short_repr import shorten_repr
from customize.pipeline.call_wrapper import wrap_call
from customize.pipeline.model_guards import SAVE_METHODS, check_copyable
from customize.pipeline.model_locks import lock_tokenizers
from customize.pipeline.state import check_saveable, get_state
from customize.stages import CALL_ARGUMENTS, SHARED_ARGUMENTS, load_stages

# Where diffusers defines the two bases of all its pipelines, and that of its models.
_PIPELINES = {
    "diffusers.pipelines.pipeline_utils": "DiffusionPipeline",
    "diffusers.modular_pipelines.modular_pipeline": "ModularPipeline",
}
_MODELS = {"diffusers.models.modeling_utils": "ModelMixin"}

# Class methods of models that copy the weights of another one, by the names of its layers.
_COPYING = ("from_unet", "from_unet2d", "from_transformer")


def patch_when_imported(methods: Mapping[str, Any]) -> None:
    """Patch both pipeline bases, at once or as soon as they are imported.

    May be called any number of times. An attribute of the same name that another package defined is
    not overwritten: a warning names it, and the functions of this package still work.

    Args:
        methods: Name -> method or property that the bases get.
    """
    bases = _PIPELINES | _MODELS

    def patch_in(module: ModuleType) -> None:
        base = getattr(module, bases[module.__name__], None)
        if base is None:  # it is being imported right now, or this diffusers has none
            return
        if module.__name__ in _MODELS:
            _with_all_subclasses(base, _guard_copying)
        else:
            _patch_pipelines(base, methods)

    for name in bases:
        if name in sys.modules:
            patch_in(sys.modules[name])
    others = [finder for finder in sys.meta_path if not _is_waiting(finder)]
    sys.meta_path[:] = [_AfterImport(bases, patch_in), *others]


def wrap_calls(cls: type) -> None:
    """Wrap the calls of a class and of those that it inherits from, so that stages run.

    May be called again after someone replaced ``__call__``.
    """
    wrap_stages = functools.partial(
        wrap_call,
        stage_arguments=CALL_ARGUMENTS,
        load_stages=load_stages,
        shared_arguments=SHARED_ARGUMENTS,
    )
    for base in cls.__mro__:
        for name, wrap in (("__call__", wrap_stages), ("encode_prompt", _pad_layerwise)):
            function = vars(base).get(name)
            if isinstance(function, FunctionType) and not hasattr(function, "_customize_patched"):
                setattr(base, name, wrap(function))


def _patch_pipelines(base: Any, methods: Mapping[str, Any]) -> None:
    _with_all_subclasses(base, wrap_calls)
    for name in SAVE_METHODS:
        _guard_saving(base, name)
    shorten_repr(base)
    foreign = [name for name in methods if hasattr(base, name) and not _is_ours(base, name)]
    if foreign:
        warnings.warn(
            f"diffusers' {base.__name__} has attributes {foreign} that customize did not make; "
            "they are left alone. Call customize.load_custom(pipe, ...) and "
            "customize.unload_custom(pipe) instead of the methods.",
            RuntimeWarning,
            stacklevel=4,
        )
        return
    for name, method in methods.items():
        setattr(base, name, method)


def _with_all_subclasses(base: Any, change: Callable[[Any], None]) -> None:
    """Change a class and all its subclasses, including those defined later."""
    for cls in _with_subclasses(base):
        change(cls)
    before = vars(base).get("__init_subclass__")
    if hasattr(getattr(before, "__func__", None), "_customize_patched"):
        return

    def init_subclass(cls: Any, **kwargs: Any) -> None:
        if before is None:
            super(base, cls).__init_subclass__(**kwargs)
        else:
            before.__get__(None, cls)(**kwargs)
        change(cls)

    init_subclass._customize_patched = True  # type: ignore[attr-defined]
    base.__init_subclass__ = classmethod(init_subclass)


def _with_subclasses(base: Any) -> Iterator[type]:
    yield base
    for cls in base.__subclasses__():
        yield from _with_subclasses(cls)


def _pad_layerwise(encode: Any) -> Any:
    """Wrap ``encode_prompt`` to return conditions of one length for prompt and negative prompt.

    They differ where only one of them has tokens with an embedding for each layer. Stock
    tokenizers are set to a length before each text, so threads take turns.
    """

    @functools.wraps(encode)
    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        with lock_tokenizers(self):
            encoded = encode(self, *args, **kwargs)
        state = get_state(self)
        if state is None or not state.has_layerwise_tokens:
            return encoded
        from customize.concepts.tokens.layerwise_embeddings import match_lengths

        return match_lengths(encoded)

    encode_prompt._customize_patched = True  # type: ignore[attr-defined]
    return encode_prompt


def _guard_copying(cls: Any) -> None:
    """Make a model's class refuse to copy the weights of a model with our adapter."""
    for name in _COPYING:
        method = vars(cls).get(name)
        if isinstance(method, classmethod) and not hasattr(method.__func__, "_customize_patched"):
            setattr(cls, name, classmethod(_refusing_to_copy(method.__func__)))


def _refusing_to_copy(make: Any) -> Any:
    @functools.wraps(make)
    def copying(cls: Any, *args: Any, **kwargs: Any) -> Any:
        check_copyable((*args, *kwargs.values()), f"{cls.__name__}.{make.__name__}")
        return make(cls, *args, **kwargs)

    copying._customize_patched = True  # type: ignore[attr-defined]
    return copying


def _guard_saving(base: Any, name: str) -> None:
    """Make a pipeline refuse to be saved while a component carries concepts that would be lost.

    The components' own guards are too late, since others are written before them.
    """
    save = getattr(base, name, None)
    if save is None or hasattr(save, "_customize_patched"):
        return

    @functools.wraps(save)
    def saving(self: Any, *args: Any, **kwargs: Any) -> Any:
        check_saveable(self)
        return save(self, *args, **kwargs)

    saving._customize_patched = True  # type: ignore[attr-defined]
    setattr(base, name, saving)


def _is_ours(base: type, name: str) -> bool:
    attribute = getattr(base, name)
    function = attribute.fget if isinstance(attribute, property) else attribute
    return str(getattr(function, "__module__", "")).startswith("customize.")


class _AfterImport(MetaPathFinder):
    """A finder that patches modules right after their import; other finders locate them."""

    def __init__(self, names: Sequence[str] | Mapping[str, Any], patch_in: Callable[..., None]):
        self.names, self.patch_in = names, patch_in

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.names:
            return None
        for finder in sys.meta_path:
            if _is_waiting(finder):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                _run_after(spec.loader, self.patch_in)
            if spec is not None:
                return spec
        return None


def _is_waiting(finder: object) -> bool:
    # By name, so that a reloaded module recognizes the finder of its previous version.
    return (type(finder).__module__, type(finder).__name__) == (__name__, "_AfterImport")


def _run_after(loader: Any, patch_in: Callable[..., None]) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        patch_in(module)

    loader.exec_module = exec_module  # the loader is this one import's own
