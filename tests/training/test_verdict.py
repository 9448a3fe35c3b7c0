import pytest

from customize.concepts.concept_info import ConceptInfo
from customize.training.verdict import IdentityResult, format_verdict


def info(loss):
    return ConceptInfo.model_construct(name="rex", training={"fixed_loss": loss})


@pytest.mark.parametrize(
    ("learned", "judgement", "advice"),
    [
        (0.5, "rex: learned: ", "(-50%)"),
        (0.99, "hardly anything learned", "try more steps, or higher learning rates"),
        (1.2, "worse than the base", "try lower learning rates"),
    ],
)
def test_the_verdict_is_one_line(learned, judgement, advice):
    line = format_verdict(info({"base": 1.0, "learned": learned}))
    assert judgement in line and advice in line and "\n" not in line
    assert f"from 1.0000 to {learned:.4f}" in line


def test_a_judge_overrides_the_loss():
    bad = IdentityResult(False, "the last sample does not show rex (distance 0.90)", "a class word")
    line = format_verdict(info({"base": 1.0, "learned": 0.5}), bad)
    assert line.startswith("rex: the images' subject is not learned: ")
    assert line.endswith("does not show rex (distance 0.90). Next: a class word.")
    too_little = format_verdict(info({"base": 1.0, "learned": 0.99}), bad)
    assert too_little.endswith("Next: a class word; try more steps, or higher learning rates.")
    known = IdentityResult(False, "the last sample does not show rex")
    for learned in (0.5, 0.99):
        line = format_verdict(info({"base": 1.0, "learned": learned}), known)
        assert line.endswith("rex. Next: try more steps, or higher learning rates.")
    worse = format_verdict(info({"base": 1.0, "learned": 1.2}), known)
    assert worse.endswith("Next: try lower learning rates.")
    good = IdentityResult(True, "the last sample shows rex", "nothing")
    assert format_verdict(info({"base": 1.0, "learned": 0.5}), good).endswith("sample shows rex.")


@pytest.mark.parametrize("loss", [None, {}, {"base": 1.0}, {"base": 0.0, "learned": "x"}, 3])
def test_without_a_measured_loss_there_is_no_verdict(loss):
    assert format_verdict(info(loss)) is None
