"""The order in which a module calls its parts, read from its own source.

Conditions on the module's own flags (OPT's `do_layer_norm_before`, torch's `norm_first`) are looked up, and only the
branch that this module takes is walked; where a condition depends on the call, both are.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any

from torch import nn

#: stands for a sum of tensors, and for a product that goes into one
SUM, SCALED = "+", "*"


def calls(module: nn.Module, path: str, stops: set[str]) -> list[str]:
    """Paths of `stops` in the order in which `module` calls them, `SUM` for sums of tensors, `SCALED` before one of
    products."""
    walk = _Calls(module, path, stops)
    walk.function(getattr(module, "_plain", type(module)).forward)
    return walk.found


def one_input(module: nn.Module) -> list[tuple[str, ...]]:
    """Names of children that `module` calls, in this order, with one and the same local variable as their input."""
    groups = _one_input(getattr(module, "_plain", type(module)).forward)
    return [names for names in groups if all(module._modules.get(name) is not None for name in names)]


@functools.cache
def _one_input(function: Any) -> list[tuple[str, ...]]:
    tree = _source(function)
    walk = _Inputs()
    if tree is not None:
        walk.visit(tree)
    return [tuple(names) for names in walk.found.values() if len(names) > 1]


class _Inputs(ast.NodeVisitor):
    """Collects `self.child(x)` by the variable x and how often it had been assigned."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, int], list[str]] = {}
        self.assigned: dict[str, int] = {}

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for name in (n for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)):
            self.assigned[name.id] = self.assigned.get(name.id, 0) + 1

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        func, one = node.func, len(node.args) == 1 and not node.keywords
        if one and isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id == "self":
            x = node.args[0]
            if isinstance(x, ast.Name):
                names = self.found.setdefault((x.id, self.assigned.get(x.id, 0)), [])
                if func.attr not in names:
                    names.append(func.attr)


@functools.cache
def _source(function: Any) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return None


class _Returned(Exception):  # noqa: N818  (it is no error)
    """The rest of a function does not run."""


class _Calls(ast.NodeVisitor):
    """Walks the source of a module's forward in the order of evaluation."""

    def __init__(self, module: nn.Module, path: str, stops: set[str], depth: int = 0) -> None:
        self.module, self.path, self.stops, self.depth = module, path, stops, depth
        self.found: list[str] = []
        #: more than 0 where it depends on the call whether this part runs
        self.unsure = 0

    def function(self, function: Any) -> None:
        tree = _source(function)
        if tree is None or self.depth >= 12:
            return
        outside, self.unsure = self.unsure, 0
        self.depth += 1
        whole = tree.body[0] if isinstance(tree, ast.Module) else tree
        with contextlib.suppress(_Returned):
            for part in whole.body if isinstance(whole, ast.FunctionDef) else [whole]:
                self.visit(part)
        self.depth -= 1
        self.unsure = outside

    def enter(self, path: str, module: nn.Module) -> None:
        full = f"{self.path}.{path}"
        if full in self.stops:
            self.found.append(full)
            return
        below = _Calls(module, full, self.stops, self.depth + 1)
        below.function(getattr(module, "_plain", type(module)).forward)
        self.found += below.found

    def resolve(self, node: ast.AST) -> tuple[str, Any]:
        """(path, value) of `self.a.b[0]`; ("", None) for anything else."""
        if isinstance(node, ast.Name) and node.id == "self":
            return "", self.module
        if isinstance(node, ast.Attribute):
            path, owner = self.resolve(node.value)
            value = getattr(owner, node.attr, None) if owner is not None else None
            return (f"{path}.{node.attr}".lstrip("."), value) if value is not None else ("", None)
        if isinstance(node, ast.Subscript):
            path, owner = self.resolve(node.value)
            if isinstance(owner, (nn.ModuleList, nn.Sequential)):
                try:
                    i = int(ast.literal_eval(node.slice)) % len(owner)
                except (ValueError, TypeError, SyntaxError):
                    return "", None
                return f"{path}.{i}", owner[i]
        return "", None

    def visit_Call(self, node: ast.Call) -> None:
        for part in (*node.args, *node.keywords):
            self.visit(part)
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if "add" in name.lower().split("_"):
            self.found.append(SUM)
        path, value = self.resolve(node.func)
        if isinstance(value, nn.Module):
            self.enter(path, value)
        elif inspect.ismethod(value):
            self._method(value)
        else:
            self.visit(node.func)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        _, value = self.resolve(node)  # a method that is handed on, to be called in parts
        if inspect.ismethod(value):
            self._method(value)
        else:
            self.generic_visit(node)

    def _method(self, method: Any) -> None:
        if method.__self__ is self.module and not hasattr(nn.Module, method.__name__):
            self.function(method.__func__)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self.generic_visit(node)
        sides = (node.left, node.right)
        if isinstance(node.op, ast.Add) and not any(map(_is_plain, sides)):
            scaled = any(isinstance(side, ast.BinOp) and isinstance(side.op, ast.Mult) for side in sides)
            self.found += [SCALED, SUM] if scaled else [SUM]

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.generic_visit(node)
        if isinstance(node.op, ast.Add) and not _is_plain(node.value):
            self.found.append(SUM)

    def visit_Return(self, node: ast.Return) -> None:
        self.generic_visit(node)
        if not self.unsure:
            raise _Returned

    def generic_visit(self, node: ast.AST) -> None:
        maybe = isinstance(node, (ast.For, ast.While, ast.Try, ast.FunctionDef, ast.Lambda))
        self.unsure += maybe
        super().generic_visit(node)
        self.unsure -= maybe

    def visit_If(self, node: ast.If) -> None:
        self._branches(node.test, node.body, node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._branches(node.test, [node.body], [node.orelse])

    def _branches(self, test: ast.expr, yes: Sequence[ast.AST], no: Sequence[ast.AST]) -> None:
        known = self._flag(test)
        if known is None:
            self.visit(test)
        self.unsure += known is None
        for body, when in ((yes, True), (no, False)):
            if known in (None, when):
                for part in body:
                    self.visit(part)
        self.unsure -= known is None

    def _flag(self, test: ast.expr) -> bool | None:
        """The value of a condition that is made of the module's own attributes; None if it is not."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            value = self._flag(test.operand)
            return None if value is None else not value
        if isinstance(test, ast.BoolOp):
            values = [self._flag(v) for v in test.values]
            decisive = isinstance(test.op, ast.Or)
            return decisive if decisive in values else None if None in values else not decisive
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
            _, left = self.resolve(test.left)
            right = test.comparators[0]
            return left == right.value if left is not None and isinstance(right, ast.Constant) else None
        _, value = self.resolve(test)
        return value if isinstance(value, bool) else None


def _is_plain(node: ast.AST) -> bool:
    """Whether a summand is no tensor: a number, a tuple, the tuple of outputs that older code keeps."""
    named = isinstance(node, ast.Name) and "outputs" in node.id
    return named or isinstance(node, (ast.Constant, ast.Tuple))
