"""The stage that draws from better prompts: ``rewrite=True`` (Prompt-A-Video, arXiv 2412.15156).

A language model that was given to ``load_custom`` rewrites the prompt of a call. The picture is
never lost for it: an endpoint that does not answer, and answers that lose what the user asked for,
leave the user's prompt, with a warning.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from customize.concepts.tokens.prompt_phrases import find_phrase
from customize.errors import ConfigError, EndpointError
from customize.evaluation.rewards.reward import Reward
from customize.pipeline.stage import CallArguments, CallContext, Stage
from customize.pipeline.state import AttachedState, StageSetting
from customize.rewriting.instructions import Instructions
from customize.rewriting.language_model import AfterUse, LanguageModel, Sampling
from customize.rewriting.load_model import load_model
from customize.rewriting.required_terms import RequiredTerms, required_terms
from customize.rewriting.rewrite_prompts import Rewriting, rewrite_prompts
from customize.stages.best_rewriting import choose_best
from customize.stages.rewrite_checks import (
    check_after_call,
    check_best_of,
    check_count,
    check_instructions,
    parse_keep,
)
from customize.stages.rewrite_requests import (
    attached_class_words,
    call_prompts,
    call_requests,
    call_seeds,
    check_prompts,
)
from customize.stages.rewrite_warnings import leave_unanswered, warn_about_notes
from customize.text import quote

#: All that a rewriting depends on: request, seed, sampling, class words and instructions.
_Key = tuple[RequiredTerms, int, Sampling, tuple[tuple[str, str], ...], Instructions]
#: Number of rewritings that a setting keeps, the latest used.
_MAX_KEPT = 4096
#: Attributes that copies do not share.
_MADE_ANEW = ("_lock", "_kept", "_latest")
#: Argument of steps that rewrite the prompt: this package's, and diffusers' of LTX-2.
_STEP_ARGUMENT = "enable_prompt_enhancement"


class Rewriter(StageSetting):
    """Rewrites prompts with a language model: ``pipe.load_custom(Rewriter(...))``.

    Calls with ``rewrite=True`` then draw from a better prompt.

    Args:
        model: The language model.
        instructions: The text around the prompt. None: instructions for untrained models.
        temperature: 0 for the most likely rewriting, up to 2.
        max_new_tokens: Largest number of tokens of a rewriting, from 1 to 4,096.
        keep: Phrases that stay in every prompt that contains them, besides triggers, numbers,
            quoted text and what is excluded.
        after_call: "keep" leaves the weights on the pipeline's device; "offload" moves them to the
            CPU before the picture is drawn; "unload" frees them, and the next prompt loads them
            again, which models of :meth:`from_pretrained` can.
        best_of: Number of rewritings of each prompt, from 1 to 64. Several are drawn, with the
            prompt itself, and the one with the highest reward is drawn again.
        reward: Reward of the pictures, such as :func:`customize.evaluation.rewards.load_reward`
            returns; only with ``best_of``.

    Raises:
        ConfigError: A value is out of its range, or does not belong to the others.
    """

    def __init__(
        self,
        model: LanguageModel,
        instructions: Instructions | None = None,
        *,
        temperature: float = 0.0,
        max_new_tokens: int = 160,
        keep: str | Sequence[str] = (),
        after_call: AfterUse = "keep",
        best_of: int = 1,
        reward: Reward | None = None,
    ) -> None:
        check_instructions(instructions)
        check_best_of(best_of, reward, temperature)
        check_after_call(after_call, model)
        self.model = model
        self.instructions = Instructions() if instructions is None else instructions
        self.sampling = Sampling(temperature, max_new_tokens)
        self.keep = parse_keep(keep)
        self.after_call = after_call
        self.best_of, self.reward = best_of, reward
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[_Key, Rewriting] = OrderedDict()
        self._latest: tuple[Rewriting, ...] = ()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        base: str | Path | None = None,
        *,
        dtype: torch.dtype | None = None,
        load_in_4bit: bool | None = None,
        instructions: Instructions | None = None,
        max_new_tokens: int | None = None,
        **settings: Any,
    ) -> Rewriter:
        """Load a language model of this machine; see :func:`customize.rewriting.load_model`.

        Args:
            source: Folder, hub id, GGUF file or name of a model, or the folder of a LoRA.
            base: The model that a LoRA was trained on. None: the one that it names.
            dtype: dtype of the weights. None: float32 without a CUDA device, else the files'.
            load_in_4bit: Whether bitsandbytes quantizes the weights. None: large ones on GPUs.
            instructions: The text around the prompt. None: what the model was trained with.
            max_new_tokens: Largest number of tokens. None: what the model was trained with.
            settings: Other arguments of the class.

        Raises:
            ConceptError: A file is missing, damaged, a pickle, or of an unknown architecture.
            ConfigError: An argument is wrong, or does not belong to the source.
            PipelineError: The model has no chat template, or lacks a package.
        """
        check_instructions(instructions)
        model, trained = load_model(
            source, base, dtype=dtype, load_in_4bit=load_in_4bit, instructions=instructions
        )
        if max_new_tokens is None:
            max_new_tokens = trained.max_new_tokens
        return cls(model, trained.instructions, max_new_tokens=max_new_tokens, **settings)

    @classmethod
    def from_endpoint(
        cls, base_url: str, model: str, *, timeout: float = 30.0, **settings: Any
    ) -> Rewriter:
        """Use a model behind an OpenAI-compatible endpoint, such as vLLM's or Ollama's.

        Args:
            base_url: Address up to ``/v1``.
            model: Name of the model there.
            timeout: Seconds that a rewriting may take.
            settings: Arguments of the class. The key is read from OPENAI_API_KEY.

        Raises:
            ConfigError: An argument is wrong.
        """
        from customize.rewriting.endpoint import Endpoint

        return cls(Endpoint(base_url, model, timeout=timeout), **settings)

    def rewrite(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        keep: str | Sequence[str] = (),
        n: int = 1,
        temperature: float | None = None,
        class_words: Mapping[str, str] | None = None,
    ) -> list[Rewriting]:
        """Rewrite prompts without drawing.

        Args:
            prompts: A prompt, or a list of them.
            seed: Seed of the first rewriting of each prompt.
            keep: Phrases to keep besides those of the setting.
            n: Rewritings of each prompt; they have the seeds ``seed``, ``seed + 1`` and so on.
            temperature: None: that of the setting, or 1 for several rewritings.
            class_words: Trigger words of concepts, which are kept -> their class word, for repairs.
                Words in angle brackets are kept without it.

        Returns:
            The rewritings, those of one prompt one after another.

        Raises:
            ConfigError: A prompt is not text, or a value is out of its range.
            EndpointError: The endpoint answered for none of the prompts.
        """
        check_count(n)
        words = class_words or {}
        texts = check_prompts([prompts] if isinstance(prompts, str) else prompts)
        kept = (*self.keep, *parse_keep(keep))
        requests = [required_terms(text, words, kept) for text in texts for _ in range(n)]
        if temperature is None:
            temperature = self.sampling.temperature or float(n > 1)
        sampling = Sampling(temperature, self.sampling.max_new_tokens)
        seeds = [seed + k for _ in texts for k in range(n)]
        found = self._rewrite(requests, seeds, sampling, words, self.instructions)
        errors = [each for each in found if isinstance(each, EndpointError)]
        if len(errors) == len(found):
            raise errors[0]
        return leave_unanswered(requests, found)

    def forget(self) -> None:
        """Drop the rewritings that were kept, so that the next calls ask the model again."""
        with self._lock:
            self._kept.clear()

    def report(self, state: AttachedState) -> str:
        """Return the model, and the rewritings of the latest call."""
        latest = [f"{quote(each.prompt, 60)} -> {quote(each.text, 120)}" for each in self._latest]
        return "; ".join([f"rewriting: {self.model.name}", *latest])

    def __repr__(self) -> str:
        return f"Rewriter({self.model!r}, temperature={self.sampling.temperature})"

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle model and settings; the lock and the kept rewritings are made anew."""
        return {name: value for name, value in vars(self).items() if name not in _MADE_ANEW}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`__getstate__` returned."""
        vars(self).update(state)
        self._start()

    def rewrite_call(
        self,
        requests: Sequence[RequiredTerms],
        seeds: Sequence[int],
        class_words: Mapping[str, str],
        device: torch.device | str,
        instructions: Instructions | None = None,
        sampling: Sampling | None = None,
    ) -> list[Rewriting | EndpointError]:
        """Rewrite the prompts of a call, and keep them for the report."""
        result = self._rewrite(
            requests,
            seeds,
            sampling or self.sampling,
            class_words,
            instructions or self.instructions,
            device,
        )
        self._latest = tuple(each for each in result if isinstance(each, Rewriting))
        return result

    def _rewrite(
        self,
        requests: Sequence[RequiredTerms],
        seeds: Sequence[int],
        sampling: Sampling,
        class_words: Mapping[str, str],
        instructions: Instructions,
        device: torch.device | str | None = None,
    ) -> list[Rewriting | EndpointError]:
        if sampling.temperature == 0:
            seeds = [0] * len(seeds)
        words = tuple(sorted(class_words.items()))
        keys: list[_Key] = [
            (request, seed, sampling, words, instructions)
            for request, seed in zip(requests, seeds, strict=True)
        ]
        found: dict[_Key, Rewriting | EndpointError] = {**self._find_kept(keys)}
        if all(key in found for key in keys):
            return [found[key] for key in keys]
        with self.model.use(device, self.after_call):
            found.update(self._find_kept(keys))  # another thread may have asked meanwhile
            new = list(dict.fromkeys(key for key in keys if key not in found))
            answers = rewrite_prompts(
                self.model,
                [request for request, *_ in new],
                [seed for _, seed, *_ in new],
                instructions=instructions,
                sampling=sampling,
                class_words=class_words,
            )
            found.update(zip(new, answers, strict=True))
            self._keep(found)
        return [found[key] for key in keys]

    def _find_kept(self, keys: Sequence[_Key]) -> dict[_Key, Rewriting]:
        """Return the rewritings that are kept, and count them as used last."""
        with self._lock:
            found = {key: self._kept[key] for key in keys if key in self._kept}
            for key in found:
                self._kept.move_to_end(key)
        return found

    def _keep(self, found: Mapping[_Key, Rewriting | EndpointError]) -> None:
        answered = {key: each for key, each in found.items() if isinstance(each, Rewriting)}
        with self._lock:
            self._kept.update(answered)
            while len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)


@contextmanager
def _run(
    context: CallContext, call: CallArguments, rewrite: Any = None, keep: Any = None
) -> Iterator[CallArguments]:
    if rewrite is not None and not isinstance(rewrite, bool):
        raise ConfigError(
            f"rewrite={quote(rewrite)} is neither True nor False",
            where="rewrite",
            fix="give rewrite=True; the model is loaded by "
            "pipe.load_custom(customize.Rewriter.from_pretrained(...))",
        )
    if not rewrite:
        if keep is not None:
            raise ConfigError(
                "keep= was given without rewrite=True",
                where="keep",
                fix="give rewrite=True too, or leave it out",
            )
        yield call
        return
    if call.get(_STEP_ARGUMENT, context.parameters.get(_STEP_ARGUMENT)) is True:
        raise ConfigError(
            f"rewrite=True and {_STEP_ARGUMENT}=True would both rewrite the prompt",
            where="rewrite",
            fix="give one of them",
        )
    setting = context.state.get_setting(Rewriter)
    if setting is None:
        raise ConfigError(
            "rewrite=True needs a language model, and none is loaded",
            where="rewrite",
            fix="load one: pipe.load_custom(customize.Rewriter.from_pretrained(...))",
        )
    prompts = call_prompts(call)
    kept = parse_keep(keep or ())
    requests = call_requests(context, call, prompts, (*setting.keep, *kept))
    for phrase in kept:
        if not any(find_phrase(phrase, prompt) for prompt in prompts):
            raise ConfigError(
                f"no prompt contains {quote(phrase)}",
                where="keep",
                fix="give words of the prompt",
            )
    seeds = call_seeds(call, len(prompts)) if setting.sampling.temperature else [0] * len(prompts)
    count = setting.best_of
    rewritings = rewrite_for_call(
        context,
        setting,
        [request for request in requests for _ in range(count)],
        [seed + k for seed in seeds for k in range(count)],
    )
    if setting.reward is not None:
        pools = [
            [Rewriting(prompt, prompt), *rewritings[k * count : (k + 1) * count]]
            for k, prompt in enumerate(prompts)
        ]
        rewritings = choose_best(context, call, pools, setting.reward)
    warn_about_notes(rewritings)
    texts = [each.text for each in rewritings]
    context.results.update(prompts=texts, rewritings=rewritings)
    yield {**call, "prompt": texts[0] if isinstance(call["prompt"], str) else texts}


#: Adds ``rewrite=`` and ``keep=`` to the arguments of pipelines.
STAGE = Stage(
    "rewrite",
    _run,
    arguments=("rewrite", "keep"),
    setting=Rewriter,
    exclusive=False,
    any_family=True,
    repeats=False,
)


def rewrite_for_call(
    context: CallContext,
    setting: Rewriter,
    requests: Sequence[RequiredTerms],
    seeds: Sequence[int],
    instructions: Instructions | None = None,
    sampling: Sampling | None = None,
) -> list[Rewriting]:
    """Rewrite the prompts of a call; a warning names those that an endpoint does not answer.

    Args:
        context: The pipeline that is called.
        setting: The language model.
        requests: Each prompt with what its rewriting must keep.
        seeds: Seed of each rewriting.
        instructions: The text around the prompt. None: that of the setting.
        sampling: How answers are generated. None: as in the setting.
    """
    class_words = attached_class_words(context)
    device = getattr(context.pipe, "_execution_device", None) or "cpu"
    found = setting.rewrite_call(requests, seeds, class_words, device, instructions, sampling)
    return leave_unanswered(requests, found)
