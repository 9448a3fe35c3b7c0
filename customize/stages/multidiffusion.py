"""Drawing with a prompt for each region of a picture (MultiDiffusion, arXiv 2302.08113).

At every step the denoiser answers once for each prompt, always for the whole picture, and the
answers are put together by the regions. So what a region's words say reaches no other region within
a step; from one step to the next all regions see one another, as they are parts of one picture.
While there is much noise, where things go is decided: till then a region's answer sees noise in
place of all other regions (the paper's bootstrapping), so that its thing comes to stand within it.
This goes on at the denoiser's border: what attends by which kernel, and to what, is all the same.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from customize.core.region_weights import blend, stack_regions
from customize.errors import PipelineError
from customize.families import Family
from customize.families.denoiser_inputs import select_rows
from customize.families.pipeline_components import uncompiled
from customize.pipeline.call_wrapper import capture_call_scope

#: How far off an encoded prompt may be, over its own size, to be the one that is asked for:
#: rounding in bfloat16 stays below it, and another prompt is further away.
MATCH_TOLERANCE = 0.02

#: The share of noise down to which a region is drawn as if it were alone in the picture.
BOOTSTRAP_NOISE_SHARE = 0.5


@dataclass(frozen=True, eq=False)
class RegionalPrompt:
    """One prompt, and what is drawn instead of it.

    Attributes:
        prompt: as the pipeline is asked for it.
        prompts: of the background, and of each region.
        weights: for each region, ``(rows, columns) -> (rows, columns)`` in [0, 1].
    """

    prompt: str
    prompts: tuple[str, ...]
    weights: tuple[Callable[[int, int], Tensor], ...]


@contextmanager
def denoise_by_regions(family: Family, asked: Sequence[RegionalPrompt]) -> Iterator[None]:
    """Within it, the denoisers answer these prompts by regions, and all others as ever.

    Args:
        asked: one for each prompt of the call, in their order.

    Raises:
        PipelineError: the pipeline has drawn something else than these prompts, as it encodes them
            in another way.
    """
    drawing = _RegionalDenoiser(family, asked)
    handles = []
    try:
        for key in (family.denoiser_key, *family.other_denoisers):
            denoiser = family.components.get(key)
            if denoiser is not None:
                handles += drawing.follow(denoiser)
        yield
    finally:
        for handle in handles:
            handle.remove()
    if not drawing.matched:
        raise PipelineError(
            "the denoiser was never given this prompt as it is encoded here, so the picture was "
            "drawn without regions",
            where="regions",
            fix="leave out arguments that change how prompts are encoded, and steps that rewrite "
            "them",
        )


@dataclass(frozen=True, eq=False)
class _Layer:
    """What one prompt adds to a picture.

    Attributes:
        weights: (rows, columns), where it shows.
        text: its number.
        is_region: and not the background.
    """

    weights: Tensor
    text: int
    is_region: bool


@dataclass(eq=False)
class _DenoiserCall:
    """One call of a denoiser on its way.

    Attributes:
        arguments: as they were given, by name.
        batch: how many rows it has, and each row's number of entries among the words'.
        jobs: for each call that has to be made, the first of which is the one on its way: row ->
            part.
        alone: whether regions do not see one another yet.
    """

    arguments: dict[str, Any]
    batch: int
    each: int
    jobs: list[dict[int, _Layer]]
    alone: bool


class _RegionalDenoiser:
    """What goes on during one call of a pipeline.

    Attributes:
        matched: whether any of the prompts has come by.
    """

    def __init__(self, family: Family, asked: Sequence[RegionalPrompt]) -> None:
        self.family, self.asked = family, asked
        texts = dict.fromkeys(text for each in asked for text in each.prompts)
        self.numbers = {text: number for number, text in enumerate(texts)}
        with torch.no_grad():
            self.conditions = family.encode_prompts(list(texts))
            # As many as the pipeline has, so that they are rounded alike.
            whole = family.encode_prompts([each.prompt for each in asked])
        self.matched = False
        self._is_ours = capture_call_scope()
        said = [
            family.denoiser_kwargs({name: values[[number]] for name, values in whole.items()})
            for number in range(len(asked))
        ]
        self._words_argument = next(iter(said[0]))
        self._expected = [each[self._words_argument][0] for each in said]
        self._steps: list[_DenoiserCall | None] = []
        self._known: dict[int, tuple[Any, dict[int, list[int]]]] = {}
        self._shown: dict[tuple[int, int], list[list[_Layer]]] = {}
        self._count = 0
        # What has more channels than it answers is given more than what it draws.
        config = family.denoiser.config
        self._may_be_alone = config.get("out_channels") in (None, config.in_channels)

    def follow(self, denoiser: Any) -> list[Any]:
        """Hooks around a denoiser; their handles."""
        names = list(inspect.signature(type(uncompiled(denoiser)).forward).parameters)[1:]

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            step = self._step(given) if self._is_ours() else None
            self._steps.append(step)
            return None if step is None else ((), self._changed(step, 0))

        def after(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            step = self._steps.pop()
            if step is None:
                return None
            # Its own `forward`, which hooks of others may have replaced, and not ours again.
            answers = [module.forward(**self._changed(step, k)) for k in range(1, len(step.jobs))]
            return self._together(step, [output, *answers])

        # The last before the call, and the first behind it.
        return [
            denoiser.register_forward_pre_hook(before, with_kwargs=True),
            denoiser.register_forward_hook(after, with_kwargs=True, prepend=True),
        ]

    def _step(self, arguments: dict[str, Any]) -> _DenoiserCall | None:
        latents = arguments[self.family.latents_argument]
        words = arguments[self._words_argument]
        batch, each = len(latents), max(1, len(words) // len(latents))
        own = self._asked_rows(words, each)
        if not own:
            return None
        self.matched, self._count = True, self._count + 1
        size = self.family.latent_grid(arguments)
        jobs: list[dict[int, _Layer]] = []
        if size not in self._shown:
            self._shown[size] = [self._parts(regional, *size) for regional in self.asked]
        parts = self._shown[size]
        for place, (row, alike) in enumerate(own.items()):
            # All pictures of one prompt follow one another, and prompts may be the same.
            expected = place * len(parts) // len(own)
            prompt = expected if expected in alike else alike[0]
            for number, part in enumerate(parts[prompt]):
                if number == len(jobs):
                    jobs.append({})
                jobs[number][row] = part
        alone = self._may_be_alone and self.family.noise_level(arguments) > BOOTSTRAP_NOISE_SHARE
        return _DenoiserCall(arguments, batch, each, jobs, alone)

    def _asked_rows(self, words: Any, each: int) -> dict[int, list[int]]:
        """Row -> the numbers of the prompts that its words are; without rows of other prompts, such
        as the empty one."""
        if id(words) not in self._known:  # else as in a step before: comparing waits for a GPU
            found = {
                row: [
                    n
                    for n, own in enumerate(self._expected)
                    if _is_same_prompt(words[row * each], own)
                ]
                for row in range(len(words) // each)
            }
            own = {row: alike for row, alike in found.items() if alike}
            self._known[id(words)] = words, own  # kept, so that no other gets its id
        return self._known[id(words)][1]

    def _parts(self, regional: RegionalPrompt, rows: int, columns: int) -> list[_Layer]:
        """Of all that shows anywhere."""
        weights = stack_regions([weigh(rows, columns) for weigh in regional.weights])
        pairs = enumerate(zip(weights, regional.prompts, strict=True))
        parts = [_Layer(own, self.numbers[text], bool(number)) for number, (own, text) in pairs]
        return [part for part in parts if bool(part.weights.any())]

    def _changed(self, step: _DenoiserCall, number: int) -> dict[str, Any]:
        """The arguments of one of the calls.

        The first has all rows of the one on its way, others only those that are asked for.
        """
        job, batch, each = step.jobs[number], step.batch, step.each
        # Copies, because some denoisers take things out of the dicts that they are given.
        given = {k: dict(v) if isinstance(v, dict) else v for k, v in step.arguments.items()}
        rows = list(job)
        if number and len(rows) < batch:
            listed = {
                name: [given[name][row] for row in rows] for name in self.family.list_arguments
            }
            sizes = {batch * each: each, batch: 1}
            given, batch = select_rows(given, rows, sizes) | listed, len(rows)
            rows = list(range(len(rows)))
        if step.alone:
            name = self.family.latents_argument
            latents = list(given[name])
            for row, part in zip(rows, job.values(), strict=True):
                if part.is_region:
                    latents[row] = self._alone(latents[row], part.weights)
            stacked = isinstance(given[name], Tensor)
            given = given | {name: torch.stack(latents) if stacked else latents}
        texts = [part.text for part in job.values() for _ in range(each)]
        said = self.family.denoiser_kwargs(
            self._chosen(texts, given[self.family.latents_argument][0].device)
        )
        entries = [row * each + k for row in rows for k in range(each)]
        return given | _replace_rows(given, said, entries, whole=len(rows) == batch)

    def _alone(self, latents: Tensor, weights: Tensor) -> Tensor:
        """A picture's latents with noise of their own mean and deviation outside of a region."""
        outside = weights < 0.5 * weights.max()
        outside = self.family.broadcast_weights(outside.to(latents.device), latents)
        # The same for all rows, so that a picture does not depend on the batch it is drawn in.
        seed = torch.Generator().manual_seed(self._count)
        normal = torch.randn(latents.shape, generator=seed, device="cpu", dtype=torch.float32)
        noise = normal.to(latents)
        return torch.where(outside, noise * latents.std() + latents.mean(), latents)

    def _together(self, step: _DenoiserCall, answers: Sequence[Any]) -> Any:
        first = answers[0][0]
        found = list(first.unbind()) if isinstance(first, Tensor) else list(first)
        parts: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for number, (job, answer) in enumerate(zip(step.jobs, answers, strict=True)):
            partly = number and len(job) < step.batch
            for place, (row, part) in enumerate(job.items()):
                own = answer[0][place if partly else row]
                spread = self.family.broadcast_weights(part.weights.to(own.device), own)
                parts.setdefault(row, []).append((own, spread))
        for row, pairs in parts.items():
            found[row] = blend(*zip(*pairs, strict=True))
        return _replace_sample(
            answers[0], torch.stack(found) if isinstance(first, Tensor) else found
        )

    def _chosen(self, numbers: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        chosen = {name: values[list(numbers)] for name, values in self.conditions.items()}
        return {name: values.to(device) for name, values in chosen.items()}


def _is_same_prompt(words: Tensor, expected: Tensor) -> bool:
    """Whether two are one prompt: (tokens, ...) each, the shorter one filled up with zeros."""
    a, b = words.float(), expected.to(words.device, torch.float32)
    if a.shape[1:] != b.shape[1:]:
        return False
    shorter = min(len(a), len(b))
    off = (a[:shorter] - b[:shorter]).square().sum()
    off = off + a[shorter:].square().sum() + b[shorter:].square().sum()
    return bool(off.sqrt() <= MATCH_TOLERANCE * b.square().sum().sqrt())


def _replace_rows(
    given: Mapping[str, Any], said: Mapping[str, Any], entries: Sequence[int], *, whole: bool
) -> dict[str, Any]:
    """Arguments in which some entries are replaced by what is said, in their order."""
    found: dict[str, Any] = {}
    for name, value in said.items():
        old: Any = given.get(name)
        if isinstance(value, Mapping):
            found[name] = dict(old or {}) | _replace_rows(old or {}, value, entries, whole=whole)
        elif isinstance(value, list):
            found[name] = list(old or [])
            for entry, own in zip(entries, value, strict=True):
                found[name][entry] = own.to(found[name][entry])
        elif whole:
            found[name] = value if old is None else value.to(old)
        else:
            found[name] = old.clone()
            found[name][list(entries)] = value.to(old)
    return found


def _replace_sample(output: Any, answer: Any) -> Any:
    """A denoiser's output, a tuple or one of diffusers' classes, with another answer."""
    if isinstance(output, tuple):
        return (answer, *output[1:])
    return dataclasses.replace(output, **{next(iter(output.keys())): answer})
