"""``customize rewrite`` and ``generate --rewrite``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from customize import Rewriter
from customize.cli import waiting
from tests.cli.making import Run, World, refused
from tests.rewriting.local_server import Handler, completion, drip, send, serve
from tests.tiny_rewriter import save_tiny_llama

BETTER = "a photo of a dog on the beach"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(autouse=True)
def without_lines_about_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine prints none; the test of them sets other times."""
    monkeypatch.setattr(waiting, "FIRST", 600.0)


def test_candidates_are_printed_one_a_line(run: Run, tmp_path: Path) -> None:
    with serve(send(completion(f"**New prompt:** {BETTER}"))) as server:
        flags = ("--rewriter", server.url, "--endpoint-model", "llama")
        result = run("rewrite", "puppy at the seaside", *flags, "--n", 2, "--json", tmp_path / "r")
        assert (result.code, result.out) == (0, f"{BETTER}\n{BETTER}\n")
        bodies = [body for _, _, body in server.requests]
        assert {body["seed"] for body in bodies} == {0, 1}
        assert {body["temperature"] for body in bodies} == {1.0}
    values = json.loads((tmp_path / "r").read_text())
    assert (values["model"], values["endpoint_model"]) == (server.url, "llama")
    assert [row["text"] for row in values["rewritings"]] == [BETTER, BETTER]
    assert values["rewritings"][0]["added"] == ["dog", "beach"]


def test_what_is_not_drawn_is_said_on_the_error_output(run: Run) -> None:
    with serve(send(completion("I'm sorry, I cannot."))) as server:
        flags = ("--rewriter", server.url, "--endpoint-model", "llama")
        result = run("rewrite", "2 dogs", *flags)
    assert (result.code, result.out) == (0, "2 dogs\n")
    assert "not rewritten, as it declines" in result.err


def test_triggers_of_concepts_are_kept(run: Run, world: World, tmp_path: Path) -> None:
    """A LoRA of another program names its trigger; a concept has a class word too, for repairs."""
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{key}.lora_A.weight": torch.ones(2, 4), f"{key}.lora_B.weight": torch.ones(4, 2)}
    lora = tmp_path / "lora.safetensors"
    save_file(tensors, lora, metadata={"modelspec.trigger_phrase": "sks dog"})
    with serve(send(completion(BETTER))) as server:
        flags = ("--rewriter", server.url, "--endpoint-model", "llama")
        assert run("rewrite", "sks dog at sea", *flags).out == f"{BETTER}\n"
        kept = run("rewrite", "sks dog at sea", *flags, "--concept", lora)
        assert kept.out == "sks dog at sea\n" and "it lacks sks dog" in kept.err
        both = ("--concept", lora, "--concept", world.rex)
        repaired = run("rewrite", "<rex> at sea", *flags, *both)
        assert repaired.out == "a photo of <rex> on the beach\n"
        assert "it lacks <rex>" in repaired.err
        refused(run("rewrite", "a dog", *flags, "--concept", tmp_path / "none"), "does not exist")


def test_a_slow_model_shows_what_is_done(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST", "INTERVAL"):
        monkeypatch.setattr(waiting, name, 0.1)
    body = json.dumps(completion(BETTER)).encode()
    slow = drip(b"HTTP/1.1 200 OK\r\n\r\n")

    def answer(handler: Handler) -> None:
        slow(handler)
        handler.wfile.write(body)

    with serve(answer) as server:
        flags = ("--rewriter", server.url, "--endpoint-model", "llama", "--n", 9)
        result = run("rewrite", "puppy at sea", "puppy at lunch", *flags)
    assert (result.code, result.out) == (0, f"{BETTER}\n" * 18)
    assert "rewriting, 0 of 2 prompts done (0 s)" in result.err
    assert "rewriting, 1 of 2 prompts done (" in result.err


def test_a_local_model(run: Run, model: str) -> None:
    expected = Rewriter.from_pretrained(model).rewrite("a dog", n=2, seed=5)
    result = run("rewrite", "a dog", "--rewriter", model, "--n", 2, "--seed", 5)
    assert result.out.splitlines() == [each.text for each in expected]


def test_generate_draws_the_better_prompt(run: Run, world: World, tmp_path: Path) -> None:
    arguments = ("generate", "--base", world.base, "--steps", 2, "--device", "cpu")
    with serve(send(completion(BETTER))) as server:
        flags = ("--rewrite", server.url, "--endpoint-model", "llama")
        result = run(*arguments, "--prompt", "puppy", *flags, "--output", tmp_path / "a")
        assert result.code == 0
    assert run(*arguments, "--prompt", BETTER, "--output", tmp_path / "b").code == 0
    first, second = (tmp_path / name / "0001.png" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    settings = json.loads((tmp_path / "a" / "0001.json").read_text())
    assert (settings["prompt"], settings["rewritten"]) == ("puppy", BETTER)
    assert (settings["rewriter"], settings["endpoint_model"]) == (server.url, "llama")


def test_bad_flags_are_refused(run: Run, model: str, tmp_path: Path) -> None:
    for flags, problem in (
        (("--rewriter", "http://localhost:1/v1"), "none is named"),
        (("--rewriter", model, "--endpoint-model", "x"), "without the address"),
        (("--rewriter", tmp_path / "none"), "does not exist"),
        (("--rewriter", model, "--temperature", 9), "invalid temperature"),
    ):
        refused(run("rewrite", "a dog", *flags), problem)
    for prompt, problem in (
        ("", "prompt 2 is empty"),
        ("a \x1b[31mred\x1b[0m dog", "has the control character '\\x1b'"),
        ("a \udcff dog", "has the control character '\\udcff'"),
    ):
        refused(run("rewrite", "a dog", prompt, "--rewriter", model), problem)
    with serve(send(b"{", 401)) as server:
        flags = ("--rewriter", server.url, "--endpoint-model", "x")
        refused(run("rewrite", "a dog", *flags), "OPENAI_API_KEY")


def test_a_rewriter_is_trained_and_rewrites(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    model = save_tiny_llama(tmp_path / "model", width=48)
    settings = {"system": "", "user": "{prompt}:", "max_new_tokens": 8}
    (model / "rewriter.json").write_text(json.dumps(settings))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "puppy", "text": "a photo of a dog"}) + "\n")
    result = run(
        *("rewriter", "train", "--model", model, "--method", "sft", "--data", rows),
        *("--output", tmp_path / "lora", "--epochs", 30, "--learning-rate", 1e-2),
        *("--device", "cpu"),
    )
    assert result.code == 0, result.err
    assert f"The LoRA is in {tmp_path / 'lora'}" in result.out
    assert run("rewrite", "puppy", "--rewriter", tmp_path / "lora").out == "a photo of a dog\n"
    refused(run("rewriter", "train", "--model", model, "--method", "ppo"), "data", "output")
