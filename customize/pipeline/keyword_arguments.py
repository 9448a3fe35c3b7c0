"""Keyword arguments of a call that nothing reads.

Many pipelines take ``**kwargs``, of which they read two deprecated names and drop the rest without
a word. So a misspelt keyword would be ignored.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from customize.errors import ConfigError

# How alike two names are for one to be taken for a slip of the other, from 0 to 1.
_ALIKE = 0.75

# Arguments of `load_custom`, which some will give to the call.
_OF_LOADING = ("library", "weights", "fuse", "merge", "memory", "attention", "names", "concepts")


def check_keywords(
    pipe: Any,
    call: Any,
    signature: inspect.Signature,
    given: Mapping[str, Any],
    stages: Iterable[str],
) -> None:
    """Refuse a keyword that nothing reads and that is nearly the name of one that something does.

    Other unknown keywords stay with the pipeline, which ignores or refuses them as it always does.

    Args:
        call: the pipeline's ``__call__``.
        given: the keyword arguments, without those of stages.
        stages: the names that stages read.

    Raises:
        ConfigError: naming the keyword and the near names.
    """
    named = [
        name for name, each in signature.parameters.items() if each.kind is not each.VAR_KEYWORD
    ]
    unknown = [name for name in given if name not in named]
    if not unknown:
        return
    blocks = vars(pipe).get("_blocks")  # of which `pipe.blocks` is a copy
    if blocks is not None:
        inputs = [each for own in blocks.inputs for each in (own.name, own.kwargs_type)]
        read: frozenset[str] | None = frozenset(name for name in inputs if name)
    else:
        read = keywords_read(call)
    if read is None:  # they are handed on, to whom cannot be known
        return
    for name in unknown:
        if name in read:
            continue
        known = [*stages, *(each for each in (*named, *read) if each != "self")]
        near = [each for each in known if each.lower() == name.lower()]
        near = near or difflib.get_close_matches(name.lower(), known, n=3, cutoff=_ALIKE)
        if near:
            raise ConfigError(
                f"{type(pipe).__name__} reads no argument {name}",
                where=name,
                fix=f"write {' or '.join(near)}, or leave it out",
            )
        if name in _OF_LOADING and len(named) < len(signature.parameters):
            raise ConfigError(
                f"{name} is an argument of load_custom, not of the pipeline's call",
                where=name,
                fix=f"give it before: pipe.load_custom(..., {name}=...)",
            )


@functools.cache
def keywords_read(call: Any) -> frozenset[str] | None:
    """The names that a function reads of its ``**kwargs``; None where that cannot be told, since it
    hands them on or has no source."""
    function = inspect.unwrap(call)
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    if not code.co_flags & inspect.CO_VARKEYWORDS:
        return frozenset()
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, SyntaxError, TypeError, ValueError):
        return None
    rest = tree.args.kwarg.arg if isinstance(tree, ast.FunctionDef) and tree.args.kwarg else None
    if rest is None:
        return None
    found: set[str] = set()
    reads = 0
    for node in ast.walk(tree):
        name = _read_name(node, rest)
        if name is not None:
            found.add(name)
            reads += 1
    uses = sum(isinstance(node, ast.Name) and node.id == rest for node in ast.walk(tree))
    return frozenset(found) if uses == reads else None


def _read_name(node: ast.AST, rest: str) -> str | None:
    """The name in ``rest.pop("name")``, ``rest.get("name")``, ``rest["name"]`` or ``"name" in
    rest``; None of anything else."""
    owner, name = None, None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
        if node.func.attr in ("pop", "get"):
            owner, name = node.func.value, node.args[0]
    elif isinstance(node, ast.Subscript):
        owner, name = node.value, node.slice
    elif isinstance(node, ast.Compare) and len(node.comparators) == 1:
        owner, name = node.comparators[0], node.left
    if isinstance(owner, ast.Name) and owner.id == rest and isinstance(name, ast.Constant):
        return str(name.value)
    return None
