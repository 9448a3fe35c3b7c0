"""Mutation testing: which changes to a line of code make no test fail?

mutmut changes one operator, number, argument or assignment at a time and runs the tests that call
the changed function. A mutant that all of them pass has survived: a test is missing, or the change
makes no difference. Results are kept in `.mutants/`, so a run that was stopped continues, and later
runs test only functions that have changed since, and survivors where tests were added (`--again`).

Texts and arguments of raised errors are not mutated: most are error messages and letters of einsum.
Decorators are applied by an assignment behind the function, because mutmut leaves decorated
functions out.

    python scripts/mutants.py                                  # all groups
    python scripts/mutants.py customize/core/lowrank.py        # one module
    python scripts/mutants.py --report                         # survivors so far
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".mutants"

#: Group -> the modules that are mutated, and the tests that run against them.
GROUPS: dict[str, tuple[list[str], list[str]]] = {
    "core": (["customize/core/*.py"], ["tests/core"]),
    "state": (
        [
            "customize/concepts/merge/*.py",
            "customize/pipeline/attach.py",
            "customize/pipeline/merge_plan.py",
            "customize/pipeline/set_tokens.py",
            "customize/pipeline/state.py",
            "customize/pipeline/transaction.py",
        ],
        [
            "tests/concepts/formats/test_merged_lora.py",
            "tests/concepts/formats/test_write_kohya.py",
            "tests/concepts/merge",
            "tests/pipeline/test_attach.py",
            "tests/pipeline/test_fusion.py",
            "tests/pipeline/test_merging.py",
            "tests/stages/test_library_routing.py",
        ],
    ),
}

PYTEST_ARGUMENTS = ["--hypothesis-profile=mutants", "--timeout=120", "-p", "no:cacheprovider"]
KILLED = ("killed", "timeout")
#: Regular expressions of lines: raised errors and warnings.
NOT_MUTATED = [r"\braise \w+\(", r"\bwarn(_user)?\("]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", help="files to mutate (default: all groups)")
    parser.add_argument("--jobs", type=int, default=1, help="mutants tested at once (default: 1)")
    parser.add_argument("--again", action="store_true", help="test survivors and timeouts again")
    parser.add_argument("--report", action="store_true", help="print the results so far and stop")
    parser.add_argument("--group", choices=GROUPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.group:
        return run_group(args.group, args)
    failed = 0
    for group, (patterns, _) in GROUPS.items():
        modules = [m for m in args.modules if any(fnmatch(m, p) for p in patterns)]
        if modules or not args.modules:
            # In a process of its own: mutmut imports the tests, and works in the current folder.
            command = [sys.executable, __file__, "--group", group, f"--jobs={args.jobs}", *modules]
            command += [f"--{flag}" for flag in ("again", "report") if getattr(args, flag)]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
            failed |= subprocess.run(command, env=environment, check=False).returncode
    return failed


def run_group(group: str, args: argparse.Namespace) -> int:
    """Mutate the modules of one group in its work folder and print the survivors."""
    os.chdir(prepare_folder(group))
    from mutmut import __main__ as mutmut
    from mutmut.mutation import file_mutation, mutators

    mutate, collect = mutmut.mutate_file_contents, mutmut.collect_source_file_mutation_data

    def mutate_decorated(filename: str, code: str, *rest: Any) -> Any:
        return mutate(filename, apply_decorators_by_assignment(code), *rest)

    def collect_selected(**arguments: Any) -> Any:
        mutants, data = collect(**arguments)
        return [m for m in mutants if not args.modules or str(m[0].path) in args.modules], data

    operators = [
        o for o in file_mutation.mutation_operators if o[1] is not mutators.operator_string
    ]
    file_mutation.mutation_operators = operators
    mutmut.mutate_file_contents = mutate_decorated
    mutmut.collect_source_file_mutation_data = collect_selected
    if args.again:
        forget_survivors(collect_selected(mutant_names=())[0])
    os.register_at_fork(after_in_child=clear_caches)
    if not args.report:
        mutmut._run((), args.jobs)
    return print_report(collect_selected(mutant_names=())[0])


def clear_caches() -> None:
    """Forget what cached functions returned before: tests of a mutant run in a fork."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "customize":
            for value in vars(module).values():
                if hasattr(type(value), "cache_clear"):
                    value.cache_clear()


def forget_survivors(mutants: Sequence[tuple[Any, str, int | None]]) -> None:
    """Mark mutants that no test killed as untested, and collect anew which tests call what."""
    from mutmut.stats import status_by_exit_code

    for data, name, exit_code in mutants:
        if status_by_exit_code[exit_code] != "killed":
            data.exit_code_by_key[name] = None
    for data in {id(data): data for data, _, _ in mutants}.values():
        data.save()
    Path("mutants/mutmut-stats.json").unlink(missing_ok=True)


def prepare_folder(group: str) -> Path:
    """Make the work folder of a group: links to the tree, and a configuration for mutmut."""
    folder = WORK / group
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("customize", "tests", "assets", "scripts"):
        link = folder / name
        if not link.is_symlink():
            link.symlink_to(ROOT / name, target_is_directory=True)
    patterns, tests = GROUPS[group]
    settings = {
        "source_paths": ["customize"],
        "only_mutate": patterns,
        "do_not_mutate_patterns": NOT_MUTATED,
        "also_copy": ["assets"] if group != "core" else [],
        "pytest_add_cli_args": PYTEST_ARGUMENTS,
        "pytest_add_cli_args_test_selection": tests,
        "use_git_change_detection": False,
        "on_dependency_change": "ignore",
        "timeout_multiplier": 4.0,
        "timeout_constant": 10.0,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    project = (ROOT / "pyproject.toml").read_text()
    text = "\n".join([project, "[tool.mutmut]", *lines, ""])
    target = folder / "pyproject.toml"
    if not target.exists() or target.read_text() != text:
        target.write_text(text)
    return folder


def apply_decorators_by_assignment(code: str) -> str:
    """Replace ``@d`` above ``def f`` by ``f = d(f)`` behind it, in modules and classes."""
    lines = code.split("\n")
    tree = ast.parse(code)
    functions: list[ast.FunctionDef] = []
    for node in [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))]:
        functions += [n for n in node.body if isinstance(n, ast.FunctionDef) and n.decorator_list]
    for function in sorted(functions, key=lambda f: f.lineno, reverse=True):
        wrapped = function.name
        for decorator in reversed(function.decorator_list):
            wrapped = f"{ast.unparse(decorator)}({wrapped})"
        indent = " " * function.col_offset
        lines.insert(function.end_lineno or 0, f"{indent}{function.name} = {wrapped}")
        first = function.decorator_list[0].lineno - 1
        del lines[first : function.lineno - 1]
    return "\n".join(lines)


def print_report(mutants: Sequence[tuple[Any, str, int | None]]) -> int:
    """Print the survivors' differences and each module's score; 1 where any has survived."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.stats import status_by_exit_code

    counts: dict[str, Counter[str]] = {}
    for data, name, _ in mutants:
        status = status_by_exit_code[data.exit_code_by_key[name]]
        counts.setdefault(str(data.path), Counter())[status] += 1
        if status not in (*KILLED, "not checked"):
            print(f"\n{name}: {status}")
            difference = get_diff_for_mutant(name, path=data.path).split("\n")
            print("\n".join(line for line in difference[2:] if line[:1] in ("+", "-")))
    print()
    total: Counter[str] = Counter()
    for path, count in [*counts.items(), ("all", total)]:
        total += count if path != "all" else Counter()
        checked = count.total() - count["not checked"]
        killed = sum(count[status] for status in KILLED)
        share = f"{killed / checked:6.1%}" if checked else "     -"
        others = [f"{checked - killed} survived"]
        # On a busy machine a timeout may be no endless loop: test those again.
        others += [f"{count[s]} {s}" for s in ("timeout", "not checked") if count[s]]
        print(f"{path:45} {share} of {checked:4} killed, {', '.join(others)}")
    return int(any(count["survived"] for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
