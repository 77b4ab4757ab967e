"""Arithmetic over named numbers, as a customer writes it: `0.7 * style + 0.3 * max(a, b)`.

Read by Python's parser and computed by hand: only numbers, given names, + - * / ^ (or **) and a
few functions exist, and every number is a float, so nothing can grow without bound.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Collection, Mapping

from data.errors import InvalidInput

MAX_LENGTH = 1000
OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,
}
FUNCTIONS: dict[str, tuple[Callable[..., float], int | None]] = {  # number of arguments
    "min": (min, None),
    "max": (max, None),
    "abs": (abs, 1),
    "floor": (math.floor, 1),
    "ceil": (math.ceil, 1),
    "exp": (math.exp, 1),
    "sqrt": (math.sqrt, 1),
    "log": (math.log, 1),
}


class Formula:
    """A formula that was read and can be computed.

    Raises:
        InvalidInput: It is no formula, or names something that is not given.
    """

    def __init__(self, text: str, names: Collection[str]):
        if len(text) > MAX_LENGTH:
            raise InvalidInput(f"The formula is longer than {MAX_LENGTH} characters.")
        try:
            self._tree = ast.parse(text.strip().replace("^", "**"), mode="eval").body
            self._check(self._tree, names)
        except (SyntaxError, RecursionError, ValueError, OverflowError, MemoryError) as error:
            if isinstance(error, InvalidInput):
                raise
            raise InvalidInput(f"The formula `{text}` cannot be read: {error}") from error

    def compute(self, values: Mapping[str, float]) -> float:
        """Return the formula's value.

        Raises:
            ArithmeticError: It has none: a division by zero, or a number too large.
        """
        try:
            result = self._value(self._tree, values)
        except ValueError as error:  # the logarithm or root of a negative number
            raise ArithmeticError(str(error)) from error
        if not math.isfinite(result):
            raise ArithmeticError("the result is not finite")
        return result

    def _check(self, node: ast.expr, names: Collection[str]) -> None:
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                float(number)  # an integer that no float holds is refused
            case ast.Name(id=name):
                if name not in names:
                    known = ", ".join(sorted(names))
                    raise InvalidInput(f"The formula names `{name}`; known are: {known}.")
            case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
                self._check(operand, names)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                self._check(left, names)
                self._check(right, names)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
                count = FUNCTIONS[name][1]
                if not args or (count is not None and len(args) != count):
                    raise InvalidInput(f"The formula gives `{name}` {len(args)} arguments.")
                for argument in args:
                    self._check(argument, names)
            case _:
                raise InvalidInput(
                    "The formula may hold numbers, the graders' names, + - * / ^, parentheses, "
                    f"and {', '.join(FUNCTIONS)}; not `{ast.unparse(node)}`."
                )

    def _value(self, node: ast.expr, values: Mapping[str, float]) -> float:
        match node:
            case ast.Constant(value=int() | float() as number):
                return float(number)
            case ast.Name(id=name):
                return float(values[name])
            case ast.UnaryOp(op=op, operand=operand):
                value = self._value(operand, values)
                return -value if isinstance(op, ast.USub) else value
            case ast.BinOp(left=left, op=op, right=right):
                return OPERATORS[type(op)](self._value(left, values), self._value(right, values))
            case ast.Call(func=ast.Name(id=name), args=args):
                return float(FUNCTIONS[name][0](*(self._value(item, values) for item in args)))
        raise TypeError(f"unchecked node {ast.dump(node)}")
