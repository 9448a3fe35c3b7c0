"""Evolution of prompts: what is kept, dropped and resumed, and the page of it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from customize.concepts.tokens.token_limit import TokenLimit
from customize.errors import ConfigError, DataError, EndpointError, PipelineError
from customize.rewriting.instructions import Instructions
from customize.rewriting.language_model import Completion
from customize.rewriting.preference_pairs import PairRule, best_rewritings, make_pairs
from customize.training.rewriting.evolution import EvolutionSettings, evolve
from customize.training.rewriting.evolution_sheet import write_sheet
from customize.training.rewriting.picture_renderer import Rating

DOG, REX = "puppy", "<rex> at sea"


class LetterCount:
    """Rates a text by its letters, and fails on texts with "zzz"."""

    digest = "letters"

    def __init__(self) -> None:
        self.jobs = []

    def __call__(self, jobs):
        self.jobs += jobs
        return [
            Rating(None, {}, False, (), "zzz")
            if "zzz" in job.text
            else Rating(len(job.text) / 10, {"letters": len(job.text) / 10}, len(job.text) > 8)
            for job in jobs
        ]


class Counting:
    """Answers the n-th chat that contains a key with the n-th answer of that key."""

    name, digest, can_reload = "counting", "counting", False

    def __init__(self, answers):
        self.answers, self.chats = {key: list(values) for key, values in answers.items()}, []

    def complete(self, chats, sampling):
        self.chats += chats
        return [self._answer(chat) for chat in chats]

    def _answer(self, chat):
        text = " ".join(message.content for message in chat.messages[-1:])
        answers = next(found for key, found in self.answers.items() if key in text)
        answers.append(answers.pop(0))
        if isinstance(answers[-1], Exception):
            return answers[-1]
        return Completion(answers[-1], True)

    def check_length(self, messages, max_new_tokens):
        pass

    def use(self, device=None, after="keep"):
        return nullcontext()


ANSWERS = {
    "puppy": ["a dog", "a dog on the beach", "a dog", "a photo of a dog at sea", "zzz dog", "dog"],
    "<rex>": ["a dog at sea", "<rex> on a beach", "I'm sorry, no", "<rex>"],
}
SETTINGS = EvolutionSettings(rounds=2, children=3, parents=2)


def texts(population):
    return [(member.round, member.text) for member in population.members]


def test_populations_grow_by_faithful_new_rewritings(tmp_path):
    model, renderer = Counting(ANSWERS), LetterCount()
    dog, rex = evolve([DOG, REX, DOG, " "], model, renderer, tmp_path, SETTINGS)
    assert texts(dog) == [
        (0, DOG),
        (1, "a dog"),
        (1, "a dog on the beach"),
        (2, "a photo of a dog at sea"),
        (2, "zzz dog"),
        (2, "dog"),
    ]
    assert texts(rex) == [(0, REX), (1, "<rex> on a beach"), (2, "<rex>")]
    assert (dog.dropped, rex.dropped) == (1, 4)
    assert [member.text for member in dog.best(2)] == [
        "a photo of a dog at sea",
        "a dog on the beach",
    ]
    assert {job.prompt for job in renderer.jobs} == {DOG, REX}
    failed = next(member for member in dog.members if member.text == "zzz dog")
    assert (failed.total, failed.failure) == (None, "zzz")


def test_rewritings_that_the_text_encoder_would_cut_off_are_dropped(tmp_path):
    words = TokenLimit("text_encoder", lambda text, **_: SimpleNamespace(input_ids=text.split()), 5)
    (dog,) = evolve([DOG], Counting(ANSWERS), LetterCount(), tmp_path, SETTINGS, limits=[words])
    assert "a dog on the beach" in [member.text for member in dog.members]
    assert "a photo of a dog at sea" not in [member.text for member in dog.members]


def test_the_model_sees_the_parents_with_their_scores(tmp_path):
    model = Counting(ANSWERS)
    evolve([DOG], model, LetterCount(), tmp_path, SETTINGS)
    system, user = model.chats[-1].messages
    assert system.content.startswith(Instructions().system)
    assert "1.800: a dog on the beach" in user.content
    assert "0.500: puppy" in user.content
    assert user.content.index("1.800") < user.content.index("0.500")
    assert len({chat.seed for chat in model.chats}) == len(model.chats)


def test_a_parent_is_rewritten_by_models_that_know_no_other_task(tmp_path):
    model = Counting({"": [f"a dog {k}" for k in range(9)]})
    settings = EvolutionSettings(rounds=2, children=2, parents=2, operator="rewrite")
    evolve(["the dog"], model, LetterCount(), tmp_path, settings)
    asked = [chat.messages[-1].content for chat in model.chats]
    assert asked[0] == asked[1] == Instructions().messages("the dog")[-1].content
    assert {asked[2], asked[3]} < {
        Instructions().messages(text)[-1].content for text in ("the dog", "a dog 0", "a dog 1")
    }


def test_an_evolution_that_was_cut_off_goes_on(tmp_path):
    whole = evolve([DOG], Counting(ANSWERS), LetterCount(), tmp_path / "whole", SETTINGS)
    broken = {"puppy": [*ANSWERS["puppy"][:3], EndpointError("gone", where="x", fix="y")]}
    with pytest.raises(EndpointError):
        evolve([DOG], Counting(broken), LetterCount(), tmp_path / "cut", SETTINGS)
    rest, renderer = Counting({"puppy": ANSWERS["puppy"][3:]}), LetterCount()
    assert evolve([DOG], rest, renderer, tmp_path / "cut", SETTINGS) == whole
    assert len(rest.chats) == 3
    assert all(job.text not in ("a dog", DOG) for job in renderer.jobs)
    again = Counting({})
    assert evolve([DOG], again, LetterCount(), tmp_path / "cut", SETTINGS) == whole
    assert again.chats == []
    (file,) = (tmp_path / "cut").iterdir()
    assert json.loads(file.read_text())["rounds"] == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-20],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"members"', '"humans"'),
        lambda text: text.replace('"text"', '"words"'),
        lambda text: text.replace('"total": 0.5', '"total": "high"'),
        lambda text: "\udcff",
    ],
)
def test_a_damaged_file_of_a_population_is_named(tmp_path, change):
    evolve([DOG], Counting(ANSWERS), LetterCount(), tmp_path, SETTINGS)
    (file,) = tmp_path.iterdir()
    file.write_bytes(change(file.read_text()).encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match="the prompt 'puppy' is damaged") as caught:
        evolve([DOG], Counting(ANSWERS), LetterCount(), tmp_path, SETTINGS)
    assert caught.value.where == str(file)
    assert "delete it" in caught.value.fix


def test_a_round_whose_rewards_all_fail_is_kept_and_passed(tmp_path):
    class Failing(LetterCount):
        def __call__(self, jobs):
            if any(job.text != DOG for job in jobs):
                raise PipelineError("none of 3 pictures was scored")
            return super().__call__(jobs)

    (dog,) = evolve([DOG], Counting(ANSWERS), Failing(), tmp_path, SETTINGS)
    assert dog.rounds == 2
    assert [member.text for member in dog.best(9)] == [DOG]
    assert "none of 3" in dog.members[1].failure

    class Broken(LetterCount):
        def __call__(self, jobs):
            raise PipelineError("broken")

    with pytest.raises(PipelineError, match="broken"):
        evolve([DOG], Counting(ANSWERS), Broken(), tmp_path / "other", SETTINGS)


class ShortReader(Counting):
    """Reads chats of up to a number of words."""

    def __init__(self, answers, limit):
        super().__init__(answers)
        self.limit = limit

    def check_length(self, messages, max_new_tokens):
        words = sum(len(message.content.split()) for message in messages)
        if words > self.limit:
            raise PipelineError(f"the chat has {words} words", where="reader", fix="shorten it")


@pytest.mark.parametrize("operator", ["scored", "rewrite"])
def test_a_prompt_that_the_model_cannot_read_is_named_before_anything_is_drawn(tmp_path, operator):
    model, renderer = ShortReader(ANSWERS, 300), LetterCount()
    prompts = [DOG, "a dog " * 200]
    places = {prompts[1]: "prompts.txt, line 7"}
    settings = EvolutionSettings(operator=operator)
    with pytest.raises(ConfigError, match=r"the chat has \d+ words") as caught:
        evolve(prompts, model, renderer, tmp_path / "out", settings, places=places)
    assert caught.value.where == "prompts.txt, line 7"
    assert not renderer.jobs and not model.chats and not (tmp_path / "out").exists()


def test_parents_that_the_model_cannot_read_are_left_out(tmp_path):
    """Of two parents the chat has only the shorter one where it has no room for the longer."""
    long = "a dog on sand with " + ", ".join(f"shade {chr(97 + k)} of grey" for k in range(20))
    model = ShortReader({"": [long, "a dog", "a dog at sea"]}, 10_000)
    settings = EvolutionSettings(rounds=2, children=1, parents=2)
    evolve([DOG], model, LetterCount(), tmp_path / "a", settings)
    assert long.strip() in model.chats[-1].messages[-1].content
    words = sum(len(message.content.split()) for message in model.chats[0].messages)
    short = ShortReader({"": [long, "a dog", "a dog at sea"]}, words + 20)
    evolve([DOG], short, LetterCount(), tmp_path / "b", settings)
    assert len(short.chats) == 2
    assert long.strip() not in short.chats[-1].messages[-1].content
    assert f"0.500: {DOG}" in short.chats[-1].messages[-1].content


def test_other_settings_evolve_anew(tmp_path):
    evolve([DOG], Counting(ANSWERS), LetterCount(), tmp_path, SETTINGS)
    evolve([DOG], Counting(ANSWERS), LetterCount(), tmp_path, EvolutionSettings(rounds=1))
    assert len(list(tmp_path.iterdir())) == 2


def test_populations_become_training_data(tmp_path):
    (dog,) = evolve([DOG], Counting(ANSWERS), LetterCount(), tmp_path, SETTINGS)
    assert best_rewritings({DOG: dog.candidates()}, {}) == [(DOG, "a photo of a dog at sea")]
    pairs = make_pairs(DOG, dog.candidates(), PairRule(margin=1.0, max_length_ratio=9))
    assert {pair.chosen for pair in pairs} == {"a photo of a dog at sea", "a dog on the beach"}
    assert all(pair.rejected in ("a dog", "dog", DOG) for pair in pairs)


def test_answers_that_lose_a_trigger_are_rejected_in_pairs_and_not_drawn(tmp_path):
    renderer = LetterCount()
    (rex,) = evolve([REX], Counting(ANSWERS), renderer, tmp_path, SETTINGS)
    assert rex.unfaithful == ["a dog at sea", "I'm sorry, no"]
    assert not {job.text for job in renderer.jobs} & set(rex.unfaithful)
    pairs = make_pairs(REX, rex.candidates(), PairRule(0.1))
    assert {pair.rejected for pair in pairs} > set(rex.unfaithful)
    assert all("<rex>" in pair.chosen for pair in pairs)
    assert best_rewritings({REX: rex.candidates()}, {}) == [(REX, "<rex> on a beach")]


def test_the_page_shows_texts_as_text(tmp_path):
    prompt = "<script>alert(1)</script> & <rex>"
    answer = f"{prompt}, a dog <b x"
    populations = evolve(
        [prompt], Counting({"": [answer]}), LetterCount(), tmp_path / "p", SETTINGS
    )
    populations[0].members[0].pictures.append('a" onerror="x.png')
    write_sheet(tmp_path / "index.html", populations)
    page = Path(tmp_path / "index.html").read_text()
    assert "<script>" not in page and "<b>" not in page and 'onerror="x' not in page
    assert "&lt;rex&gt;" in page
    assert page.index("a dog &lt;b x") < page.index("class=own")  # the better one is first


def test_bad_settings_are_refused(tmp_path):
    for values in ({"rounds": 0}, {"children": 1.5}, {"batch": -1}, {"operator": "x"}):
        with pytest.raises(ConfigError):
            EvolutionSettings(**values)
    for prompt in (None, "a \ud800", "a \x1b[31mdog"):
        with pytest.raises(ConfigError, match="is not text"):
            evolve([prompt], Counting({}), LetterCount(), tmp_path)
    with pytest.raises(ConfigError, match="no prompts"):
        evolve(["", " "], Counting({}), LetterCount(), tmp_path)
