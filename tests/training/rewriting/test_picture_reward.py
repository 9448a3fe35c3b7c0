"""The reward of online training: totals of faithful answers, less for others, None for failures."""

from __future__ import annotations

import pytest

from customize.errors import PipelineError
from customize.rewriting.instructions import Instructions
from customize.rewriting.local_model import LocalModel
from customize.stages.token_limits import default_token_limits
from customize.training.rewriting.picture_renderer import Rating
from customize.training.rewriting.picture_reward import PictureReward
from tests.tiny import tiny_sd
from tests.tiny_rewriter import tiny_llama, tiny_llama_tokenizer

DOG, CATS = "puppy", "2 cats"


class LetterCount:
    """Rates a text by its letters; texts with "zzz" fail, and those below a floor do not pass."""

    digest = "letters"

    def __init__(self, floor: int = 0) -> None:
        self.jobs, self.floor = [], floor

    def __call__(self, jobs):
        self.jobs += jobs
        if all("zzz" in job.text for job in jobs):
            raise PipelineError("no picture was scored", where="letters", fix="none")
        return [
            Rating(None, {}, False, (), "zzz")
            if "zzz" in job.text
            else Rating(float(len(job.text)), {}, len(job.text) >= self.floor)
            for job in jobs
        ]


@pytest.fixture(scope="module")
def model():
    return LocalModel(tiny_llama(), tiny_llama_tokenizer(), "tiny")


def make(model, floor: int = 0, limits=()):
    renderer = LetterCount(floor)
    reward = PictureReward(renderer, model, Instructions("", "Prompt: {prompt}"), 2.0, limits)
    logged = {}

    def call(*answers: tuple[str, str]):
        ids = [model.tokenizer(text, add_special_tokens=False).input_ids for _, text in answers]
        return reward(ids, [prompt for prompt, _ in answers], log_metric=logged.__setitem__)

    return call, renderer, logged


def test_faithful_answers_earn_their_total_and_others_less_than_all_of_their_group(model):
    call, renderer, logged = make(model)
    rewards = call(
        (DOG, "Better prompt: a dog<|im_end|>"),
        (DOG, "dog<|im_end|>"),
        (DOG, "a dog at the beach"),  # does not end
        (DOG, "I'm sorry, I can't help with that.<|im_end|>"),
        (CATS, "two cats<|im_end|>"),
        (CATS, "cats on the beach<|im_end|>"),  # how many?
    )
    # Below "dog", which is worse than "puppy"; below "2 cats", which is worse than "two cats".
    assert rewards == [5.0, 3.0, 1.0, 1.0, 8.0, 4.0]
    drawn = [(job.prompt, job.text) for job in renderer.jobs]
    assert drawn == [(DOG, DOG), (CATS, CATS), (DOG, "a dog"), (DOG, "dog"), (CATS, "two cats")]
    assert logged["faithful"] == pytest.approx(3 / 6)
    assert logged["gain"] == pytest.approx((0 - 2 + 2) / 3)
    call((DOG, "dog<|im_end|>"))
    assert len(renderer.jobs) == 6  # the prompt itself was drawn once


def test_answers_below_a_floor_earn_as_little(model):
    call, _, _ = make(model, floor=4)
    assert call((DOG, "a dog<|im_end|>"), (DOG, "dog<|im_end|>"), (DOG, "<|im_end|>")) == [5, 3, 3]


def test_answers_that_the_text_encoder_does_not_read_to_their_end_are_unfaithful(model):
    limits = default_token_limits(tiny_sd())
    assert [limit.tokens for limit in limits] == [24]
    long = "a red dog on the beach, a blue cat in the forest and a green bird near the sea"
    answers = ((DOG, f"{long}<|im_end|>"), (DOG, "a dog<|im_end|>"))
    rewards = [make(model, limits=each)[0](*answers) for each in ((), limits)]
    assert rewards == [[len(long), 5.0], [3.0, 5.0]]  # 2 below "a dog"


def test_a_group_without_faithful_answers_earns_one_number(model):
    call, renderer, logged = make(model)
    assert call((DOG, ""), (DOG, "<|im_end|>")) == [3.0, 3.0]
    assert [job.text for job in renderer.jobs] == [DOG]
    assert "gain" not in logged


def test_failures_earn_none_and_the_first_call_needs_a_score(model):
    call, _, _ = make(model)
    first = ("zzz", "zzz<|im_end|>")
    with pytest.raises(PipelineError, match="no picture"):
        call(first)
    assert call((DOG, "zzz dog<|im_end|>"), (DOG, "a dog<|im_end|>")) == [None, 5.0]
    assert call(first, ("zzz", "<|im_end|>")) == [None, None]
