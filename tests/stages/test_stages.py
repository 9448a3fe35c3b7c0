"""The table of stages, and the protocol that each of them follows."""

from __future__ import annotations

import inspect
from contextlib import contextmanager

import pytest

import customize
import customize.stages
from customize.pipeline.stage import Stage
from customize.pipeline.state import AttachedState, StageSetting, get_state
from customize.stages import CALL_ARGUMENTS, ORDER, load_stages
from tests.pipeline.making import draw
from tests.tiny import tiny_sd


def test_the_table_has_the_order_of_the_stages_and_their_arguments():
    assert [stage.name for stage in load_stages()] == [
        "library",
        "rewrite",
        "prompts",
        "avoid",
        "references",
        "regions",
        "together",
    ]
    for (module, arguments), stage in zip(ORDER, load_stages(), strict=True):
        assert stage.run.__module__ == f"customize.stages.{module}"
        assert stage.arguments == arguments
    assert list(CALL_ARGUMENTS) == [
        *("avoid", "keep", "reference_images", "reference_scale", "regions", "return_masks"),
        *("rewrite", "together"),
    ]


@pytest.mark.parametrize("stage", load_stages(), ids=lambda stage: stage.name)
def test_a_stage_takes_its_arguments_by_name_and_may_leave_them_out(stage):
    parameters = list(inspect.signature(stage.run).parameters.values())[2:]
    assert tuple(parameter.name for parameter in parameters) == stage.arguments
    assert all(parameter.default is None for parameter in parameters)
    assert not stage.acts(AttachedState(), {})
    assert stage.setting is None or issubclass(stage.setting, StageSetting)


class Suffix(StageSetting):
    """Words that a test's stage adds to all prompts."""

    def __init__(self, words: str) -> None:
        self.words = words

    def report(self, state: AttachedState) -> str:
        return f"suffix: {self.words}"


@contextmanager
def _add_suffix(context, arguments):
    words = context.state.get_setting(Suffix).words
    yield arguments | {"prompt": f"{arguments['prompt']} {words}"}


STAGE = Stage(
    "suffix",
    _add_suffix,
    setting=Suffix,
    acts=lambda state, arguments: Suffix in state.stage_settings,
)


def test_a_new_stage_is_one_file_and_one_line(monkeypatch):
    stages = (*load_stages(), STAGE)
    load_stages.cache_clear()
    monkeypatch.setattr(customize.stages, "ORDER", (*ORDER, ("suffix", ())))
    real = customize.stages.import_module

    def import_stage(name):
        return inspect.getmodule(_add_suffix) if name.endswith(".suffix") else real(name)

    monkeypatch.setattr(customize.stages, "import_module", import_stage)
    try:
        assert load_stages() == stages
        pipe = tiny_sd()
        plain = draw(pipe, "a photo of a dog on a beach")
        pipe.load_custom(Suffix("on a beach"))
        assert pipe.custom.reports == {"suffix": "suffix: on a beach"}
        assert repr(pipe.custom) == "no concepts attached\nsuffix: on a beach"
        assert (draw(pipe, "a photo of a dog") == plain).all()
        pipe.unload_custom()
        assert get_state(pipe) is None
        assert (draw(pipe, "a photo of a dog") != plain).any()
    finally:
        load_stages.cache_clear()
