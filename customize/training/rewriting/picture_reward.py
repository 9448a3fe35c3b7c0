"""The reward of online training: the score of a rewriting's pictures, if it is faithful."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from customize.concepts.tokens.token_limit import TokenLimit
from customize.rewriting.clean_answer import clean_answer
from customize.rewriting.instructions import Instructions
from customize.rewriting.local_model import LocalModel
from customize.rewriting.required_terms import required_terms
from customize.rewriting.rewrite_prompts import find_answer_problems
from customize.training.rewriting.picture_renderer import Job, Rating, Renderer, try_render


class PictureReward:
    """A reward function of trl: sampled answers in, a number or None for each out.

    - A faithful answer earns the total of its pictures, scored for the user's own prompt.
    - An answer that loses what the prompt asks for, or is no prompt, is not drawn. It earns
      ``penalty`` less than the worst of its group: the lowest total among the faithful answers to
      the same prompt and the prompt itself. So it ranks below all of them whatever they scored, as
      in the pairs of :mod:`customize.rewriting.preference_pairs`; the prompt itself counts as it
      is what a user gets where no rewriting is faithful. An answer whose pictures score below a
      floor earns as much.
    - An answer whose pictures a reward failed on earns None. trl leaves it out of the group's mean
      and does not learn from it; if that happens to a whole group, the group teaches nothing.

    Args:
        renderer: Draws and scores rewritings.
        model: The language model that answers, for its tokens.
        instructions: The text around a prompt, which an answer must not repeat.
        penalty: By how much an unfaithful answer earns less, 0 or more.
        limits: What each text encoder reads; a rewriting that none reads to its end is unfaithful.
    """

    #: Name in trl's log.
    __name__ = "pictures"

    def __init__(
        self,
        renderer: Renderer,
        model: LocalModel,
        instructions: Instructions,
        penalty: float,
        limits: Sequence[TokenLimit] = (),
    ) -> None:
        self.limits = tuple(limits)
        self.renderer, self.model, self.penalty = renderer, model, penalty
        self._wording = f"{instructions.system} {instructions.user}"
        self._own: dict[str, float] = {}  # user's prompt -> total of its own pictures

    def __call__(
        self,
        completion_ids: Sequence[Sequence[int]],
        user_prompt: Sequence[str],
        log_metric: Callable[[str, float], None] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """Return the reward of each answer.

        Args:
            completion_ids: Tokens of each answer, with the one that ends it.
            user_prompt: The user's prompt of each answer.
            log_metric: Takes metrics of the step for the log: ``faithful``, the share of faithful
                answers, and ``gain``, the mean of total minus total of the user's own prompt.

        Raises:
            PipelineError: In the first call, no picture was scored by all rewards.
        """
        texts = [
            self._read_faithful(ids, prompt)
            for ids, prompt in zip(completion_ids, user_prompt, strict=True)
        ]
        ratings = self._rate(user_prompt, texts)
        worst = self._worst_totals(user_prompt, ratings)
        rewards = [
            _reward(rating, worst.get(prompt), self.penalty)
            for prompt, rating in zip(user_prompt, ratings, strict=True)
        ]
        if log_metric is not None:
            log_metric("faithful", sum(text is not None for text in texts) / max(len(texts), 1))
            gains = [
                rating.total - self._own[prompt]
                for prompt, rating in zip(user_prompt, ratings, strict=True)
                if rating is not None and rating.total is not None and prompt in self._own
            ]
            if gains:
                log_metric("gain", sum(gains) / len(gains))
        return rewards

    def _read_faithful(self, ids: Sequence[int], prompt: str) -> str | None:
        """Return the rewriting in an answer; None if it is not faithful."""
        answer = self.model.read_answer(ids)
        if find_answer_problems(required_terms(prompt, limits=self.limits), answer, self._wording):
            return None
        return clean_answer(answer.text)

    def _rate(self, prompts: Sequence[str], texts: Sequence[str | None]) -> list[Rating | None]:
        """Return the rating of each faithful rewriting, and rate prompts that are new."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._own]
        jobs = [Job(prompt, prompt) for prompt in new]
        jobs += [Job(p, t) for p, t in zip(prompts, texts, strict=True) if t is not None]
        # Failures of the first call are raised: probably no reward works at all.
        ratings = try_render(self.renderer, jobs) if self._own else self.renderer(jobs)
        for prompt, rating in zip(new, ratings, strict=False):
            if rating.total is not None:
                self._own[prompt] = rating.total
        rated = iter(ratings[len(new) :])
        return [None if text is None else next(rated) for text in texts]

    def _worst_totals(
        self, prompts: Sequence[str], ratings: Sequence[Rating | None]
    ) -> dict[str, float]:
        """Return prompt -> lowest total of its accepted rewritings and itself."""
        worst = {prompt: self._own[prompt] for prompt in prompts if prompt in self._own}
        for prompt, rating in zip(prompts, ratings, strict=True):
            if rating is not None and rating.total is not None and rating.passes:
                worst[prompt] = min(worst.get(prompt, rating.total), rating.total)
        return worst


def _reward(rating: Rating | None, worst: float | None, penalty: float) -> float | None:
    """Return the reward of one answer.

    Args:
        rating: Of its pictures; None: it is not faithful.
        worst: Lowest total of its group; None: nothing was scored.
        penalty: By how much an unfaithful answer earns less.
    """
    if rating is not None and rating.total is None:
        return None
    if rating is not None and rating.passes:
        return rating.total
    return None if worst is None else worst - penalty
