"""Deterministic context-free tasks: a stack solves them."""

import random

from ..draws import below, bits
from .task import TERMINATOR, FormalTask

MODULUS = 5
POP, PUSH_0, PUSH_1 = 2, 3, 4
# Two alphabets: the released code has no * in equations, so their later symbols are one lower.
_EXPRESSION = {**{str(i): i for i in range(MODULUS)}, "+": 5, "-": 6, "*": 7, "(": 8, ")": 9}
_EQUATION = {**{str(i): i for i in range(MODULUS)}, "+": 5, "-": 6, "(": 7, ")": 8, "x": 9, "=": 10}


def stack_manipulation(rng: random.Random, length: int) -> tuple[list[int], list[int]]:
    """A stack from bottom to top, then actions on it; the stack in the end from top to bottom, 2, zeros: n + 1."""
    size = 1 if length == 1 else 1 + below(rng, length - 1)
    start = bits(rng, size)
    actions = [POP + below(rng, 3) for _ in range(length - size)]
    stack = list(start)
    for action in actions:
        if action != POP:
            stack.append(action - PUSH_0)
        elif stack:
            stack.pop()
    y = [*reversed(stack), TERMINATOR]
    return start + actions, y + [0] * (length + 1 - len(y))


def reverse_string(rng: random.Random, length: int) -> tuple[list[int], list[int]]:
    x = bits(rng, length)
    return x, x[::-1]


def expression(rng: random.Random, length: int, operators: str) -> tuple[str, int]:
    """An expression of exactly `length` characters, and its value modulo 5."""
    if length < 5:
        digit = below(rng, MODULUS)
        text = (f"{digit}", f"-{digit}", f"({digit})", f"(-{digit})")[length - 1]
        return text, digit if length % 2 else -digit % MODULUS
    size = 1 + below(rng, length - 4)
    left, a = expression(rng, size, operators)
    right, b = expression(rng, length - 3 - size, operators)
    operator = operators[below(rng, len(operators))]
    value = a + b if operator == "+" else a - b if operator == "-" else a * b
    return f"({left}{operator}{right})", value % MODULUS


def modular_arithmetic_brackets(rng: random.Random, length: int) -> tuple[list[int], list[int]]:
    """The value modulo 5 of an expression with brackets."""
    text, value = expression(rng, length, "+-*")
    return [_EXPRESSION[c] for c in text], [value]


def solve_equation(rng: random.Random, length: int) -> tuple[list[int], list[int]]:
    """An expression with one digit replaced by x, "=" and its value; which digit was it? Zeros where n < 3."""
    if length < 3:
        return [0] * length, [0]
    text, value = expression(rng, length - 2, "+-")
    at = below(rng, len(text))
    while not text[at].isdigit():
        at = (at + 1) % len(text)
    equation = f"{text[:at]}x{text[at + 1 :]}={value}"
    return [_EQUATION[c] for c in equation], [int(text[at])]


TASKS = (
    FormalTask("stack_manipulation", "context-free", 5, 3, stack_manipulation, terminated=True),
    FormalTask("reverse_string", "context-free", 2, 2, reverse_string),
    FormalTask("modular_arithmetic_brackets", "context-free", 11, MODULUS, modular_arithmetic_brackets),
    FormalTask("solve_equation", "context-free", 11, MODULUS, solve_equation),
)
