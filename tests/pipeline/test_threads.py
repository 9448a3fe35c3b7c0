"""Calls of several threads on shared models: each gets the picture that it gets alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from customize import Decor
from customize.api.modular_step import ConceptsStep
from customize.concepts.io.write_concept import save_concept
from customize.errors import PipelineError
from tests.pipeline.making import MAKERS, attached, concept, modular
from tests.tiny import tiny_sd, tiny_sd3

WAIT = 0.2  # seconds for which a call waits in its first step for others to come between
REGIONS = {"<rex>": (0.0, 0.0, 0.5, 1.0), "beach": (0.5, 0.0, 1.0, 1.0)}
PLAIN = {"prompt": "a photo of <rex> on the beach"}

Job = tuple[Any, dict[str, Any]]


def draw(pipe: Any, seed: int = 0, between: Callable[[], None] | None = None, **call: Any) -> Any:
    """A picture; `between` is called in its first step."""

    def step(_: Any, number: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        if number == 0 and between is not None:
            between()
        return values

    arguments = {"num_inference_steps": 3, "output_type": "np", "height": 32, "width": 32} | call
    if "image" in arguments:
        del arguments["height"], arguments["width"]
    noise = torch.Generator().manual_seed(seed)
    return pipe(generator=noise, callback_on_step_end=step, **arguments).images[0]


def race(*jobs: Job) -> None:
    """Each alone, then all at once, each in its first step waiting for the others."""
    alone = [draw(pipe, seed, **call) for seed, (pipe, call) in enumerate(jobs)]
    pictures, errors = at_once(*jobs)
    assert not errors, errors
    for number, picture in enumerate(alone):
        assert np.array_equal(pictures[number], picture), number


def at_once(*jobs: Job) -> tuple[dict[int, Any], list[BaseException]]:
    together = threading.Barrier(len(jobs))
    pictures: dict[int, Any] = {}
    errors: list[BaseException] = []

    def wait() -> None:
        # Broken where the others are not let in before this call has ended.
        with suppress(threading.BrokenBarrierError):
            together.wait(WAIT)

    def run(number: int) -> None:
        pipe, call = jobs[number]
        try:
            pictures[number] = draw(pipe, number, wait, **call)
        except BaseException as error:
            errors.append(error)

    run_all(*(lambda n=n: run(n) for n in range(len(jobs))))
    return pictures, errors


def run_all(*functions: Callable[[], None]) -> None:
    threads = [threading.Thread(target=function, daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "deadlock"


def sharing(pipe: Any, kind: Any = None, **changes: Any) -> Any:
    """Another pipeline of the same models with a scheduler of its own."""
    kind = kind or type(pipe)
    scheduler = {"scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)}
    extra = {"requires_safety_checker": False} if "safety_checker" in pipe.components else {}
    other = kind(**pipe.components | scheduler | changes, **extra)
    other.set_progress_bar_config(disable=True)
    return other


def test_layer_embeddings_in_four_threads():
    pipe = attached(layers=True)
    prompts = ["a <rex>", "a dog", "<rex> on the beach", "a photo of a cup"]
    pipelines = [sharing(pipe) for _ in prompts]
    race(*((one, {"prompt": text}) for one, text in zip(pipelines, prompts, strict=True)))
    negative = {"negative_prompt": "<rex>"}
    race(*((pipe, {"prompt": text} | negative) for text in prompts))


def test_pipelines_with_separate_schedulers_draw_concurrently():
    pipe = attached()
    inside = threading.Barrier(2, timeout=20)
    others = [pipe, sharing(pipe)]
    run_all(
        *(
            lambda one=one: draw(one, between=lambda: inside.wait() and None, **PLAIN)
            for one in others
        )
    )
    assert not inside.broken


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    "asked", [{"regions": REGIONS}, {"avoid": "house"}], ids=["regions", "avoid"]
)
def test_stage_arguments_affect_one_call_only(make, asked):
    pipe = attached(make)
    race((pipe, PLAIN | asked), (pipe, PLAIN))
    race((pipe, PLAIN | asked), (sharing(pipe), PLAIN))
    plain = make()
    race(
        (
            plain,
            {"prompt": "a dog on the beach"}
            | asked
            | ({"regions": {"dog": (0, 0, 0.5, 1)}} if "regions" in asked else {}),
        ),
        (sharing(plain), {"prompt": "a dog"}),
    )


def test_adapter_scales_affect_one_call_only():
    pipe = attached()
    scaled = PLAIN | {"cross_attention_kwargs": {"scale": 0.3}}
    race((pipe, scaled), (sharing(pipe), PLAIN))
    sd3 = attached(tiny_sd3)
    race((sd3, PLAIN | {"joint_attention_kwargs": {"scale": 0.3}}), (sharing(sd3), PLAIN))


def test_library_concepts_affect_one_thread_only(tmp_path):
    pipe = tiny_sd()
    for index, name in enumerate(("rex", "tom")):
        save_concept(concept(pipe, name, index=index), tmp_path / name)
    pipe.load_custom(library=tmp_path)
    redraw = sharing(pipe, StableDiffusionImg2ImgPipeline)
    image = {"image": torch.zeros(1, 3, 32, 32), "strength": 0.9}
    race(
        (pipe, {"prompt": "a <rex>"}),
        (sharing(pipe), {"prompt": "a <tom>"}),
        (redraw, {"prompt": "a <tom> and <rex>"} | image),
        (pipe, {"prompt": "a dog"}),
    )


def test_loading_and_calls_wait_for_each_other():
    pipe, other = tiny_sd(), tiny_sd()
    plain, rex = draw(pipe, **PLAIN), concept(pipe)
    other.load_custom(rex)
    with_rex = draw(other, **PLAIN)
    other.load_custom(weights={"rex": 0.3})
    weaker = draw(other, **PLAIN)
    second = sharing(pipe)
    changes = [
        (plain, lambda: second.load_custom(rex), with_rex),
        (with_rex, lambda: second.load_custom(weights={"rex": 0.3}), weaker),
        (weaker, lambda: second.unload_custom(), plain),
    ]
    for before, change, after in changes:
        began = threading.Event()
        changed = threading.Event()
        pictures = []

        def call(began=began, changed=changed, pictures=pictures):
            def between() -> None:
                began.set()
                assert not changed.wait(WAIT)

            pictures.append(draw(pipe, between=between, **PLAIN))

        def load(began=began, changed=changed, change=change):
            began.wait(20)
            change()
            changed.set()

        run_all(call, load)
        assert np.array_equal(pictures[0], before) and changed.is_set()
        assert np.array_equal(draw(pipe, **PLAIN), after)


def test_callbacks_may_call_and_load_inside_a_call():
    pipe = attached()
    tom = concept(pipe, "tom", index=1)
    other = sharing(pipe)
    inner = []

    def between() -> None:
        inner.append(draw(other, **PLAIN))
        inner.append(draw(other, regions=REGIONS, **PLAIN))
        other.load_custom(tom)
        other.unload_custom("tom")

    expected = [draw(other, **PLAIN), draw(other, regions=REGIONS, **PLAIN)]
    outer = draw(pipe, **PLAIN)
    assert np.array_equal(draw(pipe, between=between, **PLAIN), outer)
    assert all(np.array_equal(a, b) for a, b in zip(inner, expected, strict=True))


ASKED = ({"regions": REGIONS}, {"avoid": "house"}, {})


@pytest.mark.parametrize("make", [tiny_sd, tiny_sd3], ids=["sd", "sd3"])
def test_stage_arguments_do_not_affect_calls_in_callbacks(make):
    pipe = attached(make)
    other = sharing(pipe)
    alone = [draw(pipe, **PLAIN, **asked) for asked in ASKED]
    for outer, expected in zip(ASKED, alone, strict=True):
        inner: list[Any] = []

        async def in_threads(inner: list[Any] = inner) -> None:
            inner.append(await asyncio.to_thread(draw, other, **PLAIN))

        def between(inner: list[Any] = inner) -> None:
            inner += [draw(other, **PLAIN, **asked) for asked in ASKED]
            asyncio.run(in_threads())

        assert np.array_equal(draw(pipe, between=between, **PLAIN, **outer), expected)
        assert all(np.array_equal(a, b) for a, b in zip(inner, (*alone, alone[-1]), strict=True))


def test_callback_objects_of_diffusers_are_isolated():
    pipe = attached()
    other = sharing(pipe)
    plain, regional = draw(other, **PLAIN), draw(pipe, **PLAIN, regions=REGIONS)
    inner: list[Any] = []

    class Drawing(PipelineCallback):
        tensor_inputs: ClassVar[list[str]] = ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            inner.append(draw(other, **PLAIN))
            return callback_kwargs

    class Called:
        def __call__(self, pipeline, step_index, timestep, callback_kwargs):
            inner.append(draw(other, **PLAIN))
            return callback_kwargs

    one = Drawing(cutoff_step_ratio=None, cutoff_step_index=1)
    call = {"num_inference_steps": 3, "output_type": "np", "height": 32, "width": 32}
    for callback in (one, MultiPipelineCallbacks([one]), Called()):
        inner.clear()
        noise = torch.Generator().manual_seed(0)
        arguments = PLAIN | call | {"regions": REGIONS, "callback_on_step_end": callback}
        assert np.array_equal(pipe(**arguments, generator=noise).images[0], regional)
        assert inner and all(np.array_equal(drawn, plain) for drawn in inner)


def test_delegated_calls_pass_on_stage_arguments():
    inner = attached()

    class Handing(type(inner)):
        def __call__(self, prompt, **kwargs):
            return inner(prompt, **kwargs)

    outer = sharing(inner, Handing)
    for asked in ASKED:
        expected = draw(inner, **PLAIN, **asked)
        assert np.array_equal(draw(outer, **PLAIN, **asked), expected)
    inner.load_custom(Decor("house"))  # acts once, and not in both calls
    assert np.array_equal(draw(outer, **PLAIN), draw(inner, **PLAIN))
    asked = {"avoid": "car"}
    assert np.array_equal(draw(outer, **PLAIN, **asked), draw(inner, **PLAIN, **asked))


def test_calls_in_callbacks_restore_library_concepts(tmp_path):
    pipe = tiny_sd()
    for index, name in enumerate(("rex", "tom")):
        save_concept(concept(pipe, name, index=index), tmp_path / name)
    pipe.load_custom(library=tmp_path)
    other = sharing(pipe)
    tom, rex = draw(other, prompt="a <tom>"), draw(pipe, **PLAIN)
    inner = []
    for one in (other, pipe):
        drawn = draw(
            pipe, between=lambda one=one: inner.append(draw(one, prompt="a <tom>")), **PLAIN
        )
        assert np.array_equal(drawn, rex) and np.array_equal(inner[-1], tom)


def test_stock_tokenizers_are_used_by_one_thread_at_a_time():
    pipe = attached()
    pipe.unload_custom()
    prompts = ["a dog", "a photo of the red dog on the beach"] * 2

    def encoded(prompt: str) -> torch.Tensor:
        with torch.no_grad():
            return pipe.encode_prompt(prompt, "cpu", 1, True)[0]

    alone = {prompt: encoded(prompt) for prompt in prompts}
    wrong: list[Any] = []

    def run(prompt: str) -> None:
        for _ in range(60):
            try:
                wrong.extend([] if torch.equal(encoded(prompt), alone[prompt]) else [prompt])
            except Exception as error:
                wrong.append(error)

    run_all(*(lambda prompt=prompt: run(prompt) for prompt in prompts))
    assert wrong == []


def test_failed_calls_release_their_locks():
    pipe = attached()

    def between() -> None:
        raise KeyboardInterrupt

    for asked in ({}, {"regions": REGIONS}, {"avoid": "house"}):
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, between=between, **PLAIN, **asked)
    race((pipe, PLAIN | {"regions": REGIONS}), (pipe, PLAIN))


def test_loading_inside_concurrent_calls_raises_instead_of_deadlocking():
    pipe = attached()
    both = threading.Barrier(2, timeout=20)
    errors = []

    def call(one: Any) -> None:
        def between() -> None:
            both.wait()
            one.load_custom(weights={"rex": 0.5})

        try:
            draw(one, between=between, **PLAIN)
        except PipelineError as error:
            errors.append(str(error))

    run_all(lambda: call(pipe), lambda: call(sharing(pipe)))
    assert len(errors) == 1 and "outside of callbacks" in errors[0]


def test_steps_that_attach_concepts_in_two_threads():
    standard = tiny_sd3()
    rex, tom = concept(standard), concept(standard, "tom", index=1)
    blocks = modular(standard).blocks
    blocks.sub_blocks.insert("concepts", ConceptsStep(), 0)
    pipe = blocks.init_pipeline()
    pipe.update_components(**standard.components)
    pipe.set_progress_bar_config(disable=True)

    def picture(seed: int, name: str, source: Any) -> np.ndarray:
        noise = torch.Generator().manual_seed(seed)
        call = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
        prompt = f"a photo of <{name}>"
        return pipe(prompt=prompt, concepts=[source], generator=noise, output="images", **call)[0]

    jobs = [("rex", rex), ("tom", tom)] * 2
    alone = [picture(n, *job) for n, job in enumerate(jobs)]
    pictures: dict[int, Any] = {}
    run_all(
        *(lambda n=n, job=job: pictures.update({n: picture(n, *job)}) for n, job in enumerate(jobs))
    )
    assert all(np.array_equal(pictures[n], single) for n, single in enumerate(alone))


def test_stock_pipelines_draw_concurrently():
    pipe = tiny_sd()
    assert isinstance(pipe.scheduler, DDIMScheduler)
    inside = threading.Barrier(2, timeout=20)
    calls = [lambda: draw(pipe, between=lambda: inside.wait() and None, prompt="a dog")] * 2
    run_all(*calls)
    assert not inside.broken
