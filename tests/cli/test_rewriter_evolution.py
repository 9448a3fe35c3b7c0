"""``customize rewriter evolve``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from customize.storybook.bundled_assets import rewriter_folder
from tests.cli.making import Run, World, refused
from tests.evaluation.making import save_clip
from tests.rewriting.local_server import completion, send, serve

USERS = ["puppy at the seaside", "2 cats"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_clip(tmp_path_factory.mktemp("clip")))


def arguments(world: World, clip: str, folder: Path) -> tuple[object, ...]:
    (folder / "prompts.txt").write_text("\n".join([*USERS, ""]))
    return (
        *("rewriter", "evolve", "--base", world.base, "--prompts", folder / "prompts.txt"),
        *("--reward", "clip=10", "--reward-model", f"clip={clip}", "--output", folder / "out"),
        *("--rounds", 2, "--children", 2, "--pictures", 1, "--steps", 2, "--device", "cpu"),
    )


def read_results(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("good.jsonl", "pairs.jsonl", "index.html")]


def test_a_prompt_that_is_longer_than_the_model_reads_is_named(
    run: Run, world: World, clip: str, tmp_path: Path
) -> None:
    given = (*arguments(world, clip, tmp_path), "--rewriter", rewriter_folder())
    (tmp_path / "prompts.txt").write_text(f"a dog\n\n{'a dog ' * 2000}\n")
    refused(run(*given), r"the language model reads", "prompts.txt, line 3")
    assert not (tmp_path / "out" / "prompts").exists()
    assert not list((tmp_path / "out" / "pictures").iterdir())


def test_prompts_are_drawn_scored_and_written_as_training_data(
    run: Run, world: World, clip: str, tmp_path: Path
) -> None:
    answers = ["a dog on the beach", "two cats", "a red dog", "a photo of two cats"]
    with serve(*(send(completion(text)) for text in answers)) as server:
        flags = ("--rewriter", server.url, "--endpoint-model", "llama")
        result = run(*arguments(world, clip, tmp_path), *flags)
        assert result.code == 0, result.err
        count = len(server.requests)
        again = run(*arguments(world, clip, tmp_path), *flags)  # from its files
        assert (again.out, len(server.requests)) == (result.out, count)
        results = read_results(tmp_path / "out")
        # What would replace the results is refused, and what the results do not depend on is not.
        other = arguments(world, clip, tmp_path)
        for changed, name in (
            (("--rounds", 3), "rounds"),
            (("--seed", 1), "seed"),
            (("--margin", 0.5), "margin"),
            (("--floor", "clip=0.1"), "floor"),
            (("--endpoint-model", "qwen"), "rewriter"),
        ):
            refused(run(*other, *flags, *changed), f"were made with other settings: {name} ")
        (tmp_path / "prompts.txt").write_text("2 cats\n")
        refused(run(*other, *flags), "were made with other settings: prompts ")
        assert read_results(tmp_path / "out") == results
        (tmp_path / "out" / "settings.json").unlink()
        refused(run(*arguments(world, clip, tmp_path), *flags), "cannot be read")
        assert read_results(tmp_path / "out") == results
    assert "round 2 of 2: 2 prompts" in result.err
    output = tmp_path / "out"
    populations = [json.loads(path.read_text()) for path in (output / "prompts").iterdir()]
    assert {each["prompt"] for each in populations} == set(USERS)
    pictures = {name for p in populations for m in p["members"] for name in m["pictures"]}
    assert {path.name for path in (output / "pictures").iterdir()} == pictures
    page = (output / "index.html").read_text()
    assert all(name in page for name in pictures)
    rows = [json.loads(line) for line in (output / "pairs.jsonl").read_text().splitlines()]
    totals = {(p["prompt"], m["text"]): m["total"] for p in populations for m in p["members"]}
    assert rows
    for row in rows:
        rejected = totals.get((row["prompt"], row["rejected"]), float("-inf"))  # unfaithful
        assert totals[row["prompt"], row["chosen"]] > rejected


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ray_gives_the_same_evolution(run: Run, world: World, clip: str, tmp_path: Path) -> None:
    populations = []
    for name, flags in (("one", ()), ("ray", ("--ray", "local", "--workers", 2))):
        (tmp_path / name).mkdir()
        # Requests come in any order, so all have the same answer.
        answers = [send(completion("a dog on the beach"))] * 4
        with serve(*answers) as server:
            model = ("--rewriter", server.url, "--endpoint-model", "llama")
            result = run(*arguments(world, clip, tmp_path / name), *model, *flags)
        assert result.code == 0, result.err
        files = (tmp_path / name / "out" / "prompts").iterdir()
        read = [json.loads(path.read_text()) for path in files]
        populations.append({each["prompt"]: each["members"] for each in read})
    one, ray = populations
    for prompt in USERS:
        assert [m["pictures"] for m in ray[prompt]] == [m["pictures"] for m in one[prompt]]
        totals = [m["total"] for m in one[prompt]]
        assert [m["total"] for m in ray[prompt]] == pytest.approx(totals, rel=1e-3, abs=1e-3)


def test_bad_flags_are_refused(run: Run, world: World, clip: str, tmp_path: Path) -> None:
    given = (*arguments(world, clip, tmp_path), "--rewriter", "http://localhost:1/v1")
    model = ("--endpoint-model", "llama")
    for flags, problem in (
        ((), "none is named"),
        ((*model, "--reward", "clip"), "--reward should be names with weights"),
        ((*model, "--reward", "aesthetic=much"), "'much' is not a number"),
        ((*model, "--reward", "clip=2"), "--reward gives clip more than one weight"),
        ((*model, "--reward-model", "clip=b"), "--reward-model gives clip more than one value"),
        ((*model, "--floor", "clip=1", "--floor", "clip=2"), "--floor gives clip more than one"),
        ((*model, "--reward", "clap=1"), "unknown reward 'clap'"),
        ((*model, "--reward-model", "clap=x"), "did you mean clip?"),
        ((*model, "--reward-model", "blip=x"), "belongs to no reward"),
        ((*model, "--floor", "blip_itm=1"), "the floor blip_itm=1.0 belongs to no"),
        ((*model, "--operator", "cross"), "unknown operator"),
        ((*model, "--workers", 2), "without --ray"),
        ((*model, "--guidance", "inf"), "guidance scale is inf"),
        ((*model, "--margin", "nan"), "margin is nan"),
    ):
        refused(run(*given, *flags), problem)
    (tmp_path / "prompts.txt").write_text("a dog\n\na \x1b[31mred\x1b[0m cat\n")
    refused(run(*given, *model), r"line 3 has the control character '\x1b'")
    (tmp_path / "prompts.txt").write_text("\n \n")
    refused(run(*given, *model), "no prompts")
    (tmp_path / "prompts.txt").write_bytes(b"\xff\xfe")
    refused(run(*given, *model), "UTF-8")
    (tmp_path / "prompts.txt").unlink()
    refused(run(*given, *model), "cannot be read")
    assert not (tmp_path / "out").exists()
