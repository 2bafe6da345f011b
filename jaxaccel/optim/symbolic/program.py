"""Programs as data: straight-line assignments, their text form, and the two that optax users know.

    def train(w, g, m, v, lr):
      name = function(arguments)          or          name = argument + argument
      ...
      return update, m, v

w: parameters, g: gradient, m and v: state that starts at zero, lr: the schedule's value. Training does w ← w − update.
An argument is a variable or a number. Text is read by a tokenizer of this module; nothing is ever evaluated as Python.
"""

import dataclasses
import math
import re

from jaxaccel.optim.symbolic.functions import FUNCTIONS, INFIX

INPUTS = ("w", "g", "m", "v", "lr")
"""Names of a program's inputs, in order."""

MAX_LITERAL = 1e10
"""Largest magnitude of a number in a program."""

Argument = str | float | int


_NAME = re.compile("[A-Za-z_][A-Za-z_0-9]*")


class ProgramError(ValueError):
    """A program is not well formed: the message names the statement and the reason."""


@dataclasses.dataclass(frozen=True)
class Statement:
    """One assignment, ``target = op(args)``.

    >>> Statement("u", "interpolate", ("g", "m", 0.9)).args
    ('g', 'm', 0.9)
    """

    target: str
    """The variable that is assigned; it may have been assigned before."""
    op: str
    """Name of a function in ``FUNCTIONS``."""
    args: tuple[Argument, ...]
    """Variables (str) and numbers, in the function's order."""

    def __post_init__(self) -> None:
        # Integers would be computed with as integers.
        args = tuple(float(a) if isinstance(a, int) and not isinstance(a, bool) else a for a in self.args)
        object.__setattr__(self, "args", args)


@dataclasses.dataclass(frozen=True)
class Program:
    """Statements, and the names of the three values returned: update, m, v.

    >>> Program((Statement("u", "*", ("g", "lr")),))  # plain gradient descent
    Program(statements=(Statement(target='u', op='*', args=('g', 'lr')),), outputs=('u', 'm', 'v'))
    """

    statements: tuple[Statement, ...]
    """Executed in order."""
    outputs: tuple[str, str, str] = ("u", "m", "v")
    """Names of the update and of the new states."""

    def __len__(self) -> int:
        return len(self.statements)


def check_syntax(program: Program) -> None:
    """Raise `ProgramError` unless names exist, numbers are allowed and every function has its number of arguments.

    Shapes are checked by `jaxaccel.optim.symbolic.validate`.

    >>> check_syntax(Program((Statement("u", "+", ("g", "nope")),)))
    Traceback (most recent call last):
    jaxaccel.optim.symbolic.program.ProgramError: statement 0 (u = g + nope): unknown variable 'nope', ...
    """
    known = dict.fromkeys(INPUTS)
    for index, statement in enumerate(program.statements):
        where = f"statement {index} ({statement_text(statement)})"
        function = FUNCTIONS.get(statement.op)
        if function is None:
            raise ProgramError(f"{where}: unknown function {statement.op!r}, expected one of {', '.join(FUNCTIONS)}")
        if len(statement.args) != function.arity:
            raise ProgramError(
                f"{where}: {statement.op!r} takes {function.arity} argument(s), got {len(statement.args)}"
            )
        for arg in statement.args:
            if isinstance(arg, str):
                if arg not in known:
                    raise ProgramError(f"{where}: unknown variable {arg!r}, expected one of {', '.join(known)}")
            elif isinstance(arg, bool) or not isinstance(arg, (int, float)):
                raise ProgramError(f"{where}: an argument must be a variable or a number, got {arg!r}")
            elif not abs(arg) <= MAX_LITERAL:  # also refuses NaN
                raise ProgramError(f"{where}: a number must be finite and at most {MAX_LITERAL:g}, got {arg!r}")
        if not _NAME.fullmatch(statement.target):
            raise ProgramError(f"{where}: the target must be a name, got {statement.target!r}")
        known[statement.target] = None
    if len(program.outputs) != 3:
        raise ProgramError(f"a program returns three values, got {program.outputs!r}")
    for name in program.outputs:
        if name not in known:
            raise ProgramError(f"return: unknown variable {name!r}, expected one of {', '.join(known)}")


_TOKEN = re.compile(
    r"\s*(?:(?P<name>[A-Za-z_][A-Za-z_0-9]*)"
    r"|(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"|(?P<symbol>[-+*/=(),:]))"
)


def _tokens(line: str, number: int) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    position = 0
    while position < len(line):
        match = _TOKEN.match(line, position)
        if match is None:
            raise ProgramError(f"line {number}: cannot read {line[position:].strip()[:40]!r}")
        kind = match.lastgroup or ""
        found.append((kind, match.group(kind)))
        position = match.end()
    return found


def _arguments(tokens: list[tuple[str, str]], number: int) -> tuple[list[Argument], list[str]]:
    """Read ``argument separator argument ...``: the arguments, and the separators between them."""
    arguments: list[Argument] = []
    separators: list[str] = []
    queue = list(tokens)
    while queue:
        sign = 1.0
        kind, text = queue.pop(0)
        if text in ("-", "+") and queue and queue[0][0] == "number":
            sign = -1.0 if text == "-" else 1.0
            kind, text = queue.pop(0)
        if kind == "symbol":
            raise ProgramError(f"line {number}: expected a variable or a number, got {text!r}")
        arguments.append(text if kind == "name" else sign * float(text))
        if queue:
            kind, text = queue.pop(0)
            if kind != "symbol" or not queue:
                raise ProgramError(f"line {number}: expected one operation of variables and numbers, got {text!r}")
            separators.append(text)
    return arguments, separators


def _statement(tokens: list[tuple[str, str]], number: int) -> Statement:
    texts = [text for _, text in tokens]
    if len(tokens) < 3 or tokens[0][0] != "name" or texts[1] != "=":
        raise ProgramError(f"line {number}: expected 'name = function(arguments)', got {' '.join(texts)!r}")
    target, body = texts[0], tokens[2:]
    if len(body) >= 3 and body[0][0] == "name" and body[1][1] == "(" and body[-1][1] == ")":
        arguments, separators = _arguments(body[2:-1], number)
        if any(separator != "," for separator in separators):
            raise ProgramError(f"line {number}: arguments are separated by commas; one operation per statement")
        return Statement(target, body[0][1], tuple(arguments))
    arguments, separators = _arguments(body, number)
    if len(separators) != 1 or separators[0] not in INFIX:
        raise ProgramError(f"line {number}: expected one operation per statement, got {' '.join(texts[2:])!r}")
    return Statement(target, separators[0], tuple(arguments))


def parse(text: str) -> Program:
    """Read a program from its text.

    Source: the form of the programs in arXiv 2302.06675. When: programs written by hand or stored in files; the text
    may come from anyone, for it is only read, never executed. Blank lines and ``#`` comments are skipped.

    Args:
        text: a line ``def train(w, g, m, v, lr):``, statements, and a line ``return update, m, v``.

    Returns:
        The program, with known functions and variables; `validate` checks the shapes as well.

    Raises:
        ProgramError: (a ``ValueError``) naming the line or statement that cannot be read, the unknown function or
            variable, or the wrong number of arguments.

    >>> program = parse('''
    ... def train(w, g, m, v, lr):
    ...   m = interpolate(g, m, 0.9)  # momentum
    ...   u = sign(m)
    ...   u = u * lr
    ...   return u, m, v
    ... ''')
    >>> len(program), program.statements[2]
    (3, Statement(target='u', op='*', args=('u', 'lr')))
    """
    lines = [(i, _tokens(line.split("#")[0].strip(), i)) for i, line in enumerate(text.splitlines(), 1)]
    lines = [(i, tokens) for i, tokens in lines if tokens]
    header = ["def", "train", "(", *", ".join(INPUTS).replace(",", " ,").split(), ")", ":"]
    if not lines or [text for _, text in lines[0][1]] != header:
        raise ProgramError(f"the first line must be 'def train({', '.join(INPUTS)}):'")
    last, tokens = lines[-1]
    if len(lines) < 2 or tokens[0][1] != "return":
        raise ProgramError("the last line must be 'return update, m, v'")
    returned, separators = _arguments(tokens[1:], last)
    if len(returned) != 3 or separators != [",", ","] or not all(isinstance(name, str) for name in returned):
        raise ProgramError(f"line {last}: expected 'return' and three variables")
    update, m, v = map(str, returned)
    program = Program(tuple(_statement(tokens, i) for i, tokens in lines[1:-1]), (update, m, v))
    check_syntax(program)
    return program


def statement_text(statement: Statement) -> str:
    """One statement as a line of text.

    >>> statement_text(Statement("u", "*", ("g", -0.5)))
    'u = g * -0.5'
    """
    args = [arg if isinstance(arg, str) else repr(arg) for arg in statement.args]
    if statement.op in INFIX and len(args) == 2:
        return f"{statement.target} = {args[0]} {statement.op} {args[1]}"
    return f"{statement.target} = {statement.op}({', '.join(args)})"


def to_text(program: Program) -> str:
    """Write a program as text; ``parse(to_text(program)) == program``, numbers included.

    >>> print(to_text(Program((Statement("u", "*", ("g", "lr")),))))
    def train(w, g, m, v, lr):
      u = g * lr
      return u, m, v
    """
    body = "".join(f"  {statement_text(statement)}\n" for statement in program.statements)
    return f"def train({', '.join(INPUTS)}):\n{body}  return {', '.join(program.outputs)}"


def is_literal(arg: Argument) -> bool:
    """Whether an argument is a number."""
    return not isinstance(arg, str)


def clamp_literal(value: float) -> float:
    """The nearest allowed number.

    >>> clamp_literal(-1e12)
    -10000000000.0
    """
    return float(math.copysign(min(abs(value), MAX_LITERAL), value))


ADAMW_PROGRAM = parse("""
def train(w, g, m, v, lr):
  g2 = square(g)
  m = interpolate(g, m, 0.9)
  v = interpolate(g2, v, 0.999)
  d = sqrt(v)
  u = m / d
  decay = w * 0.01
  u = u + decay
  rate = lr * 0.001
  u = u * rate
  return u, m, v
""")
"""AdamW without bias correction, from which the search starts: rate 0.001·lr, weight decay 0.01."""

LION_PROGRAM = parse("""
def train(w, g, m, v, lr):
  u = interpolate(g, m, 0.9)
  u = sign(u)
  m = interpolate(g, m, 0.99)
  decay = w * 0.1
  u = u + decay
  u = u * lr
  return u, m, v
""")
"""Lion with weight decay 0.1: what ``optax.lion(lr, weight_decay=0.1)`` computes."""
