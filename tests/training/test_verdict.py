import pytest

from customize.concepts.concept_info import ConceptInfo
from customize.training.verdict import IdentityResult, format_verdict


def info(loss):
    return ConceptInfo.model_construct(name="rex", training={"fixed_loss": loss})


@pytest.mark.parametrize(
    ("learned", "says", "advice"),
    [
        (0.5, "rex: learned: ", "(-50%)"),
        (0.99, "hardly anything learned", "try more steps, or higher learning rates"),
        (1.2, "worse than the base", "try lower learning rates"),
    ],
)
def test_one_line_that_judges(learned, says, advice):
    told = format_verdict(info({"base": 1.0, "learned": learned}))
    assert says in told and advice in told and "\n" not in told
    assert f"from 1.0000 to {learned:.4f}" in told


def test_a_judge_counts_more_than_the_loss():
    bad = IdentityResult(False, "the last sample does not show rex (distance 0.90)", "a class word")
    told = format_verdict(info({"base": 1.0, "learned": 0.5}), bad)
    assert told.startswith("rex: the pictures' subject is not learned: ")
    assert told.endswith("does not show rex (distance 0.90). Next: a class word.")
    too_little = format_verdict(info({"base": 1.0, "learned": 0.99}), bad)
    assert too_little.endswith("Next: a class word; try more steps, or higher learning rates.")
    known = IdentityResult(False, "the last sample does not show rex")
    for learned in (0.5, 0.99):
        told = format_verdict(info({"base": 1.0, "learned": learned}), known)
        assert told.endswith("rex. Next: try more steps, or higher learning rates.")
    worse = format_verdict(info({"base": 1.0, "learned": 1.2}), known)
    assert worse.endswith("Next: try lower learning rates.")
    good = IdentityResult(True, "the last sample shows rex", "nothing")
    assert format_verdict(info({"base": 1.0, "learned": 0.5}), good).endswith("sample shows rex.")


@pytest.mark.parametrize("loss", [None, {}, {"base": 1.0}, {"base": 0.0, "learned": "x"}, 3])
def test_nothing_is_said_where_nothing_was_measured(loss):
    assert format_verdict(info(loss)) is None
