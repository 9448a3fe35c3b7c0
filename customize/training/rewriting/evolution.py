"""Evolution of prompts by rewards (Prompt-A-Video, arXiv 2412.15156, section 3.1).

Each user prompt has a population of rewritings, at first the prompt itself. In each round a
language model writes new ones from the best so far, whose scores it sees; they are drawn and
scored against the user's prompt. A rewriting that loses what the prompt asks for is dropped before
it is drawn.

Each prompt has a JSON file, named by the prompt and all settings, which is replaced after each
round: an evolution that was cut off goes on from there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError

from customize.atomic import write_atomic
from customize.concepts.io.data_files import read_file_bytes
from customize.concepts.tokens.token_limit import TokenLimit
from customize.errors import ConceptError, ConfigError, DataError, EndpointError, PipelineError
from customize.rewriting.clean_answer import clean_answer
from customize.rewriting.instructions import Instructions
from customize.rewriting.language_model import Chat, LanguageModel, Message, Sampling
from customize.rewriting.preference_pairs import Candidate
from customize.rewriting.prompt_characters import find_control_character
from customize.rewriting.required_terms import find_problems, required_terms
from customize.rewriting.rewrite_prompts import find_fault
from customize.text import quote
from customize.training.rewriting.picture_renderer import Job, Renderer, short_hash, try_render

#: Ends the system message where the model sees scored predecessors.
SCORED_RULES = """
You also see earlier prompts for the same wish with their scores, the best first. Learn what the \
good ones have in common, and answer with one new prompt that should score higher than all."""

Operator = Literal["scored", "rewrite"]


@dataclass(frozen=True)
class EvolutionSettings:
    """Settings of an evolution.

    Attributes:
        rounds: Number of rounds.
        children: New rewritings of a prompt in each round.
        parents: Number of the best rewritings that a new one is written from.
        operator: "scored": the model sees the parents with their scores, as in the paper.
            "rewrite": it rewrites one of the parents, for models that know no other task.
        temperature: Temperature of the model.
        seed: Random seed.
        batch: Prompts that go through a round together.

    Raises:
        ConfigError: A number is out of its range.
    """

    rounds: int = 4
    children: int = 3
    parents: int = 3
    operator: Operator = "scored"
    temperature: float = 1.0
    seed: int = 0
    batch: int = 16

    def __post_init__(self) -> None:
        for name in ("rounds", "children", "parents", "batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(
                    f"{name} is {quote(value)}", where=name, fix="give a whole number from 1"
                )
        if self.operator not in get_args(Operator):
            raise ConfigError(
                f"unknown operator {quote(self.operator)}",
                where="operator",
                fix=f"give {' or '.join(get_args(Operator))}",
            )


_STRICT = ConfigDict(extra="forbid")


@dataclass
class Member:
    """One rewriting of a population.

    Attributes:
        text: The rewriting.
        round: The round that wrote it; 0 for the prompt itself.
        total: Weighted sum of its rewards; None where one failed.
        rewards: Name -> reward.
        passes: Whether all rewards reach their floors.
        pictures: File names of its pictures.
        failure: Why it has no total; empty if it has one.
    """

    text: str
    round: int
    total: float | None = None
    rewards: dict[str, float] = field(default_factory=dict)
    passes: bool = False
    pictures: list[str] = field(default_factory=list)
    failure: str = ""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


@dataclass
class Population:
    """The rewritings of one prompt.

    Attributes:
        prompt: The user's prompt.
        rounds: Finished rounds; -1 before the prompt itself is scored.
        members: The rewritings, in the order in which they were written.
        dropped: Number of answers that were dropped, as they were faulty or known.
        unfaithful: Those of them that lose what the prompt asks for. They are not drawn, and serve
            as the rejected ones of pairs.
    """

    prompt: str
    rounds: int = -1
    members: list[Member] = field(default_factory=list)
    dropped: int = 0
    unfaithful: list[str] = field(default_factory=list)

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    def best(self, count: int) -> list[Member]:
        """Return the best scored members."""
        scored = [member for member in self.members if member.total is not None]
        return sorted(scored, key=lambda member: member.total or 0.0, reverse=True)[:count]

    def candidates(self) -> list[Candidate]:
        """Return the scored members, and below them the unfaithful ones, for pairs."""
        scored = [member for member in self.members if member.total is not None]
        return [
            *(Candidate(m.text, m.rewards, m.total or 0.0) for m in scored),
            *(Candidate(text, {}, float("-inf")) for text in self.unfaithful),
        ]


_POPULATION = TypeAdapter(Population)


def evolve(
    prompts: Sequence[str],
    model: LanguageModel,
    renderer: Renderer,
    folder: Path,
    settings: EvolutionSettings | None = None,
    instructions: Instructions | None = None,
    max_new_tokens: int = 160,
    limits: Sequence[TokenLimit] = (),
    places: Mapping[str, str] | None = None,
    on_round: Callable[[int, Sequence[Population]], None] | None = None,
) -> list[Population]:
    """Evolve prompts, or resume.

    Args:
        prompts: The users' prompts; equal ones are evolved once.
        model: The language model.
        renderer: Draws and scores rewritings.
        folder: Folder of the populations' files.
        settings: None: the defaults.
        instructions: The text around a prompt. None: instructions for untrained models.
        max_new_tokens: Largest number of tokens of a rewriting.
        limits: What each text encoder of the base reads; a rewriting that none reads to its end is
            dropped.
        places: Prompt -> where it was read, for errors. None: errors quote the prompt.
        on_round: Called with the round and the batch that finished it.

    Returns:
        The population of each distinct prompt.

    Raises:
        ConfigError: There are no prompts, or one is no text, has control characters, or is longer
            than the model reads.
        DataError: A population's file is damaged.
        EndpointError: The model runs elsewhere and cannot be reached; what was finished stays.
    """
    settings = settings or EvolutionSettings()
    instructions = instructions or Instructions()
    places = places or {}
    for prompt in prompts:
        if not isinstance(prompt, str) or find_control_character(prompt) is not None:
            raise ConfigError(
                f"the prompt {quote(prompt)} is not text",
                where=places.get(prompt, "prompts"),
                fix="give texts without control characters",
            )
    distinct = [prompt for prompt in dict.fromkeys(prompts) if prompt.strip()]
    if not distinct:
        raise ConfigError("there are no prompts", where="prompts", fix="give at least one")
    for prompt in distinct:
        own = Population(prompt, members=[Member(prompt, 0)])
        try:
            model.check_length(
                _messages(own, own.members, 0, settings, instructions), max_new_tokens
            )
        except PipelineError as error:
            raise ConfigError(
                error.problem, where=places.get(prompt, "prompts"), fix=error.fix
            ) from error
    folder.mkdir(parents=True, exist_ok=True)
    identity = _identity(model, renderer, settings, instructions, max_new_tokens)
    files = {prompt: folder / f"{short_hash(prompt, identity)}.json" for prompt in distinct}
    populations = [_read(files[prompt], prompt) for prompt in distinct]
    sampling = Sampling(settings.temperature, max_new_tokens)
    for batch in _batches(populations, settings.batch):
        for number in range(settings.rounds + 1):
            waiting = [each for each in batch if each.rounds < number]
            if not waiting:
                continue
            if number == 0:
                children = [[each.prompt] for each in waiting]
            else:
                children = _write_children(
                    waiting, number, model, settings, instructions, sampling, limits
                )
            _score(waiting, children, number, renderer)
            for each in waiting:
                each.rounds = number
                text = json.dumps(asdict(each), indent=1, ensure_ascii=False, allow_nan=False)
                write_atomic(files[each.prompt], (text + "\n").encode())
            if on_round is not None:
                on_round(number, waiting)
    return populations


def _write_children(
    populations: Sequence[Population],
    number: int,
    model: LanguageModel,
    settings: EvolutionSettings,
    instructions: Instructions,
    sampling: Sampling,
    limits: Sequence[TokenLimit],
) -> list[list[str]]:
    """Return the new faithful rewritings of each population."""
    chats, owners = [], []
    for index, population in enumerate(populations):
        parents = _choose_parents(population, model, settings, instructions, sampling)
        for child in range(settings.children):
            seed = int(short_hash(population.prompt, settings.seed, number, child), 16) % 2**31
            messages = _messages(population, parents, child, settings, instructions)
            chats.append(Chat(messages, seed))
            owners.append(index)
    wording = " ".join((instructions.system, SCORED_RULES, instructions.user))
    children: list[list[str]] = [[] for _ in populations]
    for index, answer in zip(owners, model.complete(chats, sampling), strict=True):
        if isinstance(answer, EndpointError):
            raise answer
        population, text = populations[index], clean_answer(answer.text)
        known = {member.text for member in population.members} | set(children[index])
        required = required_terms(population.prompt, limits=limits)
        lost = find_problems(required, text)
        if text in known or lost or find_fault(population.prompt, answer, wording):
            population.dropped += 1
            if lost and text and answer.is_complete and text not in population.unfaithful:
                population.unfaithful.append(text)
        else:
            children[index].append(text)
    return children


def _choose_parents(
    population: Population,
    model: LanguageModel,
    settings: EvolutionSettings,
    instructions: Instructions,
    sampling: Sampling,
) -> Sequence[Member]:
    """Return the best members, without the longest where the model cannot read them all."""
    parents = population.best(settings.parents)
    while parents:
        chats = {
            _messages(population, parents, child, settings, instructions)
            for child in range(len(parents))
        }
        try:
            for chat in chats:
                model.check_length(chat, sampling.max_new_tokens)
        except PipelineError:
            parents.remove(max(parents, key=lambda member: len(member.text)))
        else:
            return parents
    return population.members[:1]  # the prompt itself, which evolve() has checked


def _messages(
    population: Population,
    parents: Sequence[Member],
    child: int,
    settings: EvolutionSettings,
    instructions: Instructions,
) -> tuple[Message, ...]:
    """Return the chat that asks for one child."""
    if settings.operator == "scored":
        return scored_messages(instructions, population, parents)
    return instructions.messages(parents[child % len(parents)].text)


def scored_messages(
    instructions: Instructions, population: Population, parents: Sequence[Member]
) -> tuple[Message, ...]:
    """Return the chat that asks for a prompt that scores higher than its predecessors."""
    lines = [f"{member.total or 0.0:.3f}: {member.text}" for member in parents]
    asked = instructions.messages(population.prompt)
    text = "\n".join(["Earlier prompts with their scores:", *lines, "", asked[-1].content])
    system = Message("system", instructions.system + SCORED_RULES)
    return (system, Message("user", text))


def _score(
    populations: Sequence[Population],
    children: Sequence[Sequence[str]],
    number: int,
    renderer: Renderer,
) -> None:
    jobs = [
        (population, Job(population.prompt, text))
        for population, texts in zip(populations, children, strict=True)
        for text in texts
    ]
    drawn = [job for _, job in jobs]
    # Failures of the first round are raised: probably no reward works at all.
    ratings = renderer(drawn) if number == 0 else try_render(renderer, drawn)
    for (population, job), rating in zip(jobs, ratings, strict=True):
        population.members.append(
            Member(
                job.text,
                number,
                rating.total,
                dict(rating.rewards),
                rating.passes,
                list(rating.pictures),
                rating.failure,
            )
        )


def _read(path: Path, prompt: str) -> Population:
    """Return the population of a file, or a new one.

    Raises:
        DataError: The file is damaged.
    """
    if not path.is_file():
        return Population(prompt)
    try:
        population: Population = _POPULATION.validate_json(read_file_bytes(path))
    except ConceptError as error:
        raise _damaged(path, prompt, error.problem) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise _damaged(
            path, prompt, f"{where}: {first['msg']}" if where else first["msg"]
        ) from error
    return population


def _damaged(path: Path, prompt: str, reason: str) -> DataError:
    return DataError(
        f"the file of the prompt {quote(prompt, 80)} is damaged: {reason}",
        where=path,
        fix="delete it, and run again: the prompt is evolved anew, with the pictures there are",
    )


def _identity(model: LanguageModel, renderer: Renderer, *settings: object) -> str:
    return short_hash(model.digest, renderer.digest, *(repr(each) for each in settings))


def _batches(items: Sequence[Population], size: int) -> Iterator[Sequence[Population]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
