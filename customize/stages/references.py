"""The stage that draws with reference images: ``reference_images=``, ``reference_scale=``.

Models that read references by themselves (:mod:`customize.references.native`) get them as their own
argument, and nothing else of the call changes. Other models read them through a reference model
(EasyRef, arXiv 2412.09618) that was given to ``load_custom``; the denoiser is changed during the
call alone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from customize.base.offload import is_offloaded
from customize.errors import ConfigError, PipelineError
from customize.families import Family
from customize.pipeline.modular_blocks import has_block
from customize.pipeline.stage import CallArguments, CallContext, Stage
from customize.pipeline.state import AttachedState, StageSetting
from customize.references.easyref_file import load_easyref
from customize.references.group import ReferenceGroup
from customize.references.images import ARGUMENT, Reference, read_group
from customize.references.model import ReferenceModel, check_prompt
from customize.references.native import (
    all_native_references,
    find_native_references,
    native_arguments,
    with_prompt_first,
)
from customize.references.request import ReferenceRequest, Source, parse_request
from customize.references.scale import SCALE_ARGUMENT
from customize.references.seams import SEAMS, seam_of
from customize.safe_read import PICKLE_SUFFIXES, as_path
from customize.stages.reference_avoid import avoid_in_references, warn_about_avoided
from customize.stages.reference_prompts import (
    by_region_words,
    check_words,
    prompt_texts,
    warn_about_prompts,
)
from customize.stages.reference_tokens import (
    PromptReferences,
    execution_device,
    images_per_prompt,
    read_references,
)
from customize.text import quote

#: Number of encoded groups that a setting keeps, the latest used.
_MAX_KEPT = 32
_IP_ADAPTER_ARGUMENTS = ("ip_adapter_image", "ip_adapter_image_embeds")


class References(StageSetting):
    """A reference model for all calls of a pipeline: ``pipe.load_custom(References(...))``.

    Calls with ``reference_images=`` then draw what the images share.

    Args:
        model: The reference model.

    Raises:
        ConfigError: It is something else, such as the path of one.
    """

    def __init__(self, model: ReferenceModel) -> None:
        if not isinstance(model, ReferenceModel):
            raise ConfigError(
                f"References takes a loaded reference model, not {quote(model)}",
                where="model",
                fix="load it: customize.References.from_pretrained(...)",
            )
        self.model = model
        self._lock = threading.RLock()
        self._groups: OrderedDict[tuple[Any, ...], ReferenceGroup] = OrderedDict()
        self._latest: tuple[ReferenceGroup, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the model; the lock and the kept groups are made anew."""
        return type(self), (self.model,)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        mllm: str | Path | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> References:
        """Load a reference model from a folder or hub id, or EasyRef's released file.

        Args:
            source: Folder written by :meth:`ReferenceModel.save_pretrained`, or a hub id; or the
                ``.safetensors`` file of EasyRef.
            mllm: Only for EasyRef's file: local folder of Qwen2-VL-2B-Instruct.
            dtype: Only for EasyRef's file: dtype of encoder and adapter. None: float32, as folders.

        Raises:
            ConceptError: A file is missing, damaged or of another model, or is a pickle.
            ConfigError: The configuration has unknown, missing or wrong values; or an argument is
                no path or dtype, or does not belong to this kind of source.
        """
        if as_path(source, "source").suffix.lower() not in (".safetensors", *PICKLE_SUFFIXES):
            if mllm is not None or dtype is not None:
                raise ConfigError(
                    "mllm= and dtype= belong to EasyRef's file",
                    where=source,
                    fix="leave them out: a folder has its MLLM, and is loaded in float32",
                )
            return cls(ReferenceModel.from_pretrained(source))
        parts = load_easyref(source, mllm, dtype=torch.float32 if dtype is None else dtype)
        return cls(ReferenceModel(parts.config, parts.encoder, parts.adapter, parts.processor))

    def encode(self, images: Any, prompt: str = "", *, weigh: bool = True) -> ReferenceGroup:
        """Encode one group of images.

        Args:
            images: An image, a list of images, or a folder. An image is a path, PIL image, array or
                tensor, or a tuple of one of these and the attribute to take from it.
            prompt: The prompt, for models that read it with the images.
            weigh: Whether images that do not agree with the others count less.

        Raises:
            ConfigError: There are no images or too many, or one has another form; or the prompt is
                not a text.
            DataError: An image cannot be read.
        """
        check_prompt(prompt)
        return self._encode(read_group(images, "images"), prompt, weigh)

    def bind(self, family: Family) -> References:
        """Return the setting for a model, after checking that the adapter fits its denoiser."""
        config = self.model.config
        if config.family != family.name:
            raise PipelineError(
                f"the reference model is for models of family {config.family}, and this one is of "
                f"family {family.name}",
                where="References",
                fix=_fix_of_family(family),
            )
        expected, given = seam_of(family).attention_layers(family), self.model.adapter.layers
        pairs: list[tuple[Mapping[str, Any], Mapping[str, Any]]]
        pairs = [(expected.attentions, given.attentions)]
        if self.model.adapter.rank:
            pairs.append((expected.projections, given.projections))
        for needed, present in pairs:
            wrong = [
                name for name in {**needed, **present} if needed.get(name) != present.get(name)
            ]
            if wrong:
                raise PipelineError(
                    f"the reference model was trained for another denoiser: {len(wrong)} attention "
                    f"layers differ, such as {wrong[0]}",
                    where="References",
                    fix="load the reference model of this base",
                )
        return self

    def report(self, state: AttachedState) -> str:
        """Return the model, and the agreement of the latest call's images."""
        config = self.model.config
        text = (
            f"references: {config.num_tokens} tokens for up to {config.max_references} images "
            f"({config.family})"
        )
        return "; ".join([text, *(f"latest: {group}" for group in self._latest)])

    def __repr__(self) -> str:
        return f"References({self.model!r})"

    def _encode(self, group: Sequence[Reference], prompt: str, weigh: bool) -> ReferenceGroup:
        config = self.model.config
        prompt = prompt if config.includes_prompt else ""
        images = tuple((reference.digest, reference.name) for reference in group)
        key = (self.model.digest, images, prompt, weigh)
        with self._lock:  # pipelines of other models may share the setting
            if key not in self._groups:
                self._groups[key] = self.model.encode(group, prompt=prompt, weigh=weigh)
                while len(self._groups) > _MAX_KEPT:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(key)
            return self._groups[key]

    def check_request(self, request: ReferenceRequest) -> None:
        """Refuse groups that the model does not read.

        Raises:
            ConfigError: A group has too many images, or was encoded by another model.
        """
        for sources in request.sources:
            for source in sources.values():
                if isinstance(source, ReferenceGroup):
                    self._check_encoded(source)
                else:
                    self.model.check_references(source)

    def encode_request(
        self, request: ReferenceRequest, prompts: Sequence[str]
    ) -> list[PromptReferences]:
        """Return the encoded groups of each prompt, and keep them for the report.

        Raises:
            ConfigError: See :meth:`check_request`.
        """
        result = []
        for sources, scales, prompt in zip(request.sources, request.scales, prompts, strict=True):
            groups = {
                key: (self._group_of(source, prompt), scales[key])
                for key, source in sources.items()
            }
            result.append(PromptReferences(groups))
        if self.model.config.includes_prompt:
            warn_about_prompts(request, prompts)
        latest = {id(group): group for each in result for group, _ in each.groups.values()}
        self._latest = tuple(latest.values())
        return result

    def _group_of(self, source: Source, prompt: str) -> ReferenceGroup:
        if not isinstance(source, ReferenceGroup):
            return self._encode(source, prompt, True)
        self._check_encoded(source)
        return source

    def _check_encoded(self, source: ReferenceGroup) -> None:
        config = self.model.config
        if source.model != self.model.digest:
            raise ConfigError(
                "the group of references was encoded by another reference model, or by the same "
                "one in a precision that rounds its weights",
                where=ARGUMENT,
                fix="encode its images with the loaded one",
            )
        if tuple(source.tokens.shape) != (config.num_tokens, config.width):
            raise ConfigError(
                f"the group has tokens of the shape {tuple(source.tokens.shape)}, not "
                f"{(config.num_tokens, config.width)}",
                where=ARGUMENT,
                fix="encode its images again",
            )


@contextmanager
def _run(
    context: CallContext,
    call: CallArguments,
    reference_images: Any = None,
    reference_scale: Any = None,
) -> Iterator[CallArguments]:
    if reference_images is None:
        if reference_scale is not None:
            raise ConfigError(
                f"{SCALE_ARGUMENT}= was given without {ARGUMENT}=",
                where=SCALE_ARGUMENT,
                fix=f"give {ARGUMENT}= too, or leave it out",
            )
        yield call
        return
    setting = context.state.get_setting(References)
    if setting is None:
        native = find_native_references(context.pipe, context.parameters)
        if native is not None:
            warn_about_avoided(context, f"{native.model} reads the references by itself")
            yield call | native_arguments(native, call, reference_images, reference_scale)
            return
        if ARGUMENT in context.parameters and reference_scale is None:
            yield {**call, ARGUMENT: reference_images}  # of a pipeline of another origin
            return
        raise _unsupported(context)
    prompts = prompt_texts(call)
    request = parse_request(
        reference_images,
        reference_scale,
        len(prompts),
        lambda scale: seam_of(context.family).expand_scale(context.family, scale),
    )
    check_words(request, prompts)
    request = by_region_words(request, prompts, context)
    _check_adapters(call)
    model = setting.model
    if request.is_zero([*model.adapter.layers.attentions, *model.adapter.updates()]):
        setting.check_request(request)  # what nothing reads is not encoded
        yield call
        return
    denoiser = context.family.denoiser
    offloads = is_offloaded(denoiser)
    model.move_encoder(execution_device(context.pipe, denoiser))
    try:
        references = setting.encode_request(request, prompts)
        model.unconditional_tokens()
    finally:
        if offloads:
            model.move_encoder("cpu")
    references = avoid_in_references(context, references)
    groups = [{key: group for key, (group, _) in each.groups.items()} for each in references]
    context.results["references"] = [each.get(None, each) for each in groups]
    given = _given_to_blocks(context, call, groups)
    scale = request.layer_scale
    try:
        with read_references(context, call, model, references, scale, from_blocks=bool(given)):
            yield {**call, **given}
    finally:
        if offloads:
            model.release()


def _check_adapters(call: CallArguments) -> None:
    """Refuse arguments of IP-Adapters, which the references would replace."""
    given = [name for name in _IP_ADAPTER_ARGUMENTS if call.get(name) is not None]
    if given:
        raise ConfigError(
            f"{given[0]}= cannot be combined with {ARGUMENT}=",
            where=ARGUMENT,
            fix="leave one of them out",
        )


def _given_to_blocks(
    context: CallContext, call: CallArguments, groups: Sequence[Mapping[str | None, ReferenceGroup]]
) -> dict[str, Any]:
    """Return the argument of a step that gives the tokens to diffusers' blocks, if there is one.

    diffusers repeats the tokens of all prompts for several images of each, and the prompts each by
    itself, so different groups would change their order.
    """
    if not has_block(context.pipe, "gives_reference_tokens"):
        return {}
    if any(set(each) != {None} for each in groups):
        return {}
    whole = [each[None] for each in groups]
    is_ordered = images_per_prompt(context, call) == 1 or len({id(group) for group in whole}) == 1
    return {ARGUMENT: whole} if is_ordered else {}


def _prepare(context: CallContext, call: CallArguments) -> CallArguments:
    native = find_native_references(context.pipe, context.parameters)
    return call if native is None else with_prompt_first(native, call)


#: Adds ``reference_images=`` and ``reference_scale=`` to the arguments of pipelines.
STAGE = Stage(
    "references",
    _run,
    arguments=("reference_images", "reference_scale"),
    setting=References,
    prepare=_prepare,
    any_family=True,
)


def _unsupported(context: CallContext) -> PipelineError:
    names = ", ".join(_names_of_pipelines())
    try:
        has_seam = context.family.name in SEAMS
    except PipelineError:  # an unknown family
        has_seam = False
    if has_seam:
        return PipelineError(
            f"{type(context.pipe).__name__} takes no reference images by itself, and no reference "
            "model is loaded",
            where=ARGUMENT,
            fix="load one: pipe.load_custom(customize.References.from_pretrained(...)); or use a "
            f"pipeline that takes them: {names}",
        )
    return PipelineError(
        f"{type(context.pipe).__name__} takes no reference images by itself",
        where=ARGUMENT,
        fix=f"use a pipeline that does: {names}; or, with a reference model, a model of family "
        f"{', '.join(SEAMS)}",
    )


def _fix_of_family(family: Family) -> str:
    """Return what to do where a reference model is of another family than the pipeline."""
    if family.name in SEAMS:
        return "load a reference model of this family"
    names = [name for native in family.native_references for name in native.pipelines]
    if names:
        return f"leave it out: {', '.join(names)} take {ARGUMENT}= without one"
    return f"use a model of family {', '.join(SEAMS)}, which read references"


def _names_of_pipelines() -> list[str]:
    return [
        native.pipelines[0] if native.pipelines else f"{native.model} (modular)"
        for native in all_native_references()
    ]
