"""Tables of rewriting, with and without their results."""

from __future__ import annotations

from scripts.bench_tables import rewriting
from scripts.bench_tables.rewriting import _KINDS
from tests.scripts.test_reference_tables import folder, write  # noqa: F401


def test_without_a_result_its_file_is_named(folder):  # noqa: F811
    expected = "There is no `results/rewriting.json` yet."
    assert rewriting.rewriting_table() == rewriting.rewriting_kinds_table() == expected
    assert rewriting.rewrite_cost_table() == "There is no `results/rewrite_cost.json` yet."


def test_rows_of_models_have_more_columns_than_that_of_the_user(folder):  # noqa: F811
    user = {"drawn from": "user", "shown": 0.81234, "shown_se": 0.0123, "whole": 0.5, "reward": 9.5}
    user |= {"kept": 1.0, "added": 0.0, "words": 9.26, **dict.fromkeys(_KINDS, 0.75)}
    model = user | {"drawn from": "model", "kept_by_the_model": 0.9, "own": 0.1, "seconds": 0.25}
    write(folder, "rewriting", user, model)
    lines = rewriting.rewriting_table().splitlines()
    row = "| user | 0.812 ± 0.012 | 50 % | 9.50 | 100 % |  |  | 0.000 | 9.3 |  |"
    assert lines[2] == row
    assert lines[3] == row.replace("user", "model").replace("|  |  |", "| 90 % | 10 % |").replace(
        "9.3 |  |", "9.3 | 0.25 |"
    )
    assert rewriting.rewriting_kinds_table().splitlines()[2].count("75 %") == len(_KINDS)


def test_costs_are_milliseconds_and_shares_of_a_picture(folder):  # noqa: F811
    row = {"model": "m", "prompts": 1, "seconds_added": 0.25, "of_a_picture": 0.0834}
    write(folder, "rewrite_cost", row | {"cache": "cold"}, row | {"cache": "warm"})
    lines = rewriting.rewrite_cost_table().splitlines()
    assert lines[2] == "| m | cold | 1 | 250 | 8 % |"
    assert lines[3] == "| m | warm | 1 | 250 | 8.3 % |"
