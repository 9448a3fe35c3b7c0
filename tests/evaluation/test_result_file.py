"""Result files: machine, versions and formatted figures."""

from __future__ import annotations

import json

import torch

from customize.evaluation import result_file


def test_mean_and_spread() -> None:
    assert result_file.mean_and_spread([0.5]) == (0.5, None)
    assert result_file.mean_and_spread([1.0, 2.0, 3.0]) == (2.0, 1.0)


def test_shares_are_formatted_in_percent() -> None:
    assert result_file.format_percent(0.861, 0.07) == "86% ±7"
    assert result_file.format_percent(1.0) == "100%"


def test_results_contain_machine_and_versions() -> None:
    result = result_file.make_result("bench", "python bench.py", [{"a": 1}], {"figure": 0.5})
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["rows"] == [{"a": 1}] and result["figures"] == {"figure": 0.5}
    assert result["versions"]["torch"] == torch.__version__
    assert result["machine"]
