"""Mutants: the kernels with one place changed by an operator, all in one library that is told which of them to be.

The operators find their places in whatever sources there are, by tokens, not by names of today's kernel:

    delete        a statement that calls or assigns; a return, continue or break
    condition     a condition of an ``if``, or an operand of ``&&`` or ``||``, that no longer decides anything
    comparison    either side of an inequality one larger: loops and guards end one early or one late
    addend        what is added or subtracted, left out
    argument      by the parameter's name: another parity, an arrival more or fewer, 16 bytes more or fewer

What is computed at compile time stays as it is, and the heads of unrolled loops do but for an early end: they run over arrays in registers.
"""

from __future__ import annotations

import bisect
import dataclasses
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .build import HERE

_TOKEN = re.compile(r"[A-Za-z_]\w*|\d[\w.']*|::|->|&&|\|\||\+\+|--|<<=|>>=|<<|>>|[-+*/%&|^<>=!]=|\S")
_NO_CODE = re.compile(r"//[^\n]*|^[ ]*#(?:[^\n]*\\\n)*[^\n]*", re.MULTILINE)
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_INEQUALITIES = ("<", "<=", ">", ">=")
_LIMITS = (";", ",", "?", ":", "=", "return", "&&", "||", "{", "}")  # of an expression that is compared or added up
_ASSIGNMENTS = ("=", "+=", "-=", "*=", "/=", "%=", "^=", "|=", "&=")
_ARGUMENTS = {
    "parity": ("^ {}",),
    "num_arrivals": ("+ {}", "- {}"),
    "num_bytes": ("+ 16 * {}", "- 16 * {}"),
    "tx_bytes": ("+ 16 * {}", "- 16 * {}"),
}
ENDLESS_STATUS = 75
_MOST_VISITS = 10**6  # of a mutant's place in a launch
_SWITCH = """
#pragma once
#include <unistd.h>
#include <cstdint>
#include <type_traits>
extern "C" {{
inline uint32_t emulator_mutant = ~0u;
inline bool emulator_reached[{num_mutants}] = {{}};
inline uint32_t emulator_visits = 0;
}}
inline bool is_mutant(uint32_t idx) {{
  emulator_reached[idx] = true;
  if (idx != emulator_mutant) return false;
  if (++emulator_visits > {most_visits}) _exit({endless_status});
  return true;
}}
constexpr bool mutant(uint32_t idx) {{ return !std::is_constant_evaluated() && is_mutant(idx); }}
"""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """``before`` and ``after`` go around the text from ``start`` to ``end`` of ``file``, with the switch at ``{}``."""

    operator: str
    function: str
    code: str
    following: str
    file: str
    line: int
    start: int
    end: int
    before: str
    after: str

    @property
    def key(self) -> str:
        """What the mutant is, wherever it stands."""
        return f"{self.operator} | {self.function} | {self.code}"

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.operator}, {self.code}, in {self.function}"


class _Source:
    """The tokens of a file, and which statement and function each belongs to."""

    def __init__(self, path: Path) -> None:
        self.file = path.name
        text = path.read_text()
        self.text = text
        self.code = _NO_CODE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
        tokens = list(_TOKEN.finditer(self.code))
        self.tokens = [token[0] for token in tokens]
        self.spans = [token.span() for token in tokens]
        self.match = self._match()
        starts = [start for start, _ in self.spans]
        self._unrolled = {
            bisect.bisect(starts, found.end()) for found in re.finditer(r"#pragma unroll$", self.text, re.MULTILINE)
        }
        self.statements = list(self._statements())
        self.owner = {
            i: statement for statement in reversed(self.statements) for i in range(statement[0], statement[1] + 1)
        }

    def _match(self) -> dict[int, int]:
        match, open_brackets = {}, []
        for i, token in enumerate(self.tokens):
            if token in _CLOSING:
                open_brackets.append(i)
            elif token in _CLOSING.values():
                match[i] = open_brackets.pop()
                match[match[i]] = i
        return match

    def _is_lambda(self, brace: int) -> bool:
        before = self.match.get(brace - 1, 0) if self.tokens[brace - 1] == ")" else brace
        return self.tokens[before - 1] == "]"

    def _is_block(self, brace: int) -> bool:
        previous = self.tokens[brace - 1]
        return previous in (")", "]", '"') or (previous[0].isalpha() and previous != "return" and self._gap(brace - 1))

    def _gap(self, i: int) -> bool:
        """Whether there is a space behind the token."""
        return self.spans[i][1] < self.spans[i + 1][0]

    def _statements(self) -> Iterator[tuple[int, int, str]]:
        """First and last token, and function, of what ends in a semicolon or is the head of a block."""
        names: list[str] = []
        blocks: list[tuple[int, int]] = []  # where the statement began that holds the block; the number of names
        start, depth, depths = 0, 0, []
        for i, token in enumerate(self.tokens):
            if token == "{" and self._is_block(i):
                yield start, i, "::".join(names)
                blocks.append((start if self._is_lambda(i) else i, len(names)))
                depths.append(depth)
                names += self._name(start, i)
                start, depth = i + 1, 0
            elif token == "}" and self._is_block(self.match[i]):
                begin, num_names = blocks.pop()
                depth = depths.pop()
                start = begin if self._is_lambda(self.match[i]) else i + 1
                del names[num_names:]
            elif token in _CLOSING:
                depth += 1
            elif token in _CLOSING.values():
                depth -= 1
            elif token == ";" and depth == 0:
                yield start, i, "::".join(names)
                start = i + 1

    def _name(self, start: int, brace: int) -> list[str]:
        """Of the function, lambda or structure whose block begins at ``brace``."""
        head = self.code[self.spans[start][0] : self.spans[brace][0]]
        head = re.sub(r"^(\s*template <[^\n]*>)?\s*(MLPDOWN_\w+(\([^)]*\))?\s*)*", "", head)
        if re.match(r"(if|for|while|switch|else|do)\b", head):
            return []
        found = (
            re.search(r"(\w+) = \[", head)
            or re.match(r"(?:struct|class|namespace) (\w+)", head)
            or re.search(r"(\w+)\(", head)
        )
        return [found[1]] if found else []

    def mutant(self, operator: str, around: tuple[int, int], before: str, after: str, shown: tuple[int, int]) -> Mutant:
        """With ``before`` and ``after`` about the tokens ``around``; the changed code from one to the other token of ``shown`` names it."""
        (start, end), (first, last) = ((self.spans[i][0], self.spans[j][1]) for i, j in (around, shown))
        code = self.code[first:start] + before.format(1) + self.code[start:end] + after.format(1) + self.code[end:last]
        code = self.code[first:last] if operator == "delete" else code
        following = self.code[last : self.code.find(";", last + 1) + 1]
        line = self.text.count("\n", 0, start) + 1
        function = self.owner[around[0]][2]
        return Mutant(
            operator,
            function,
            " ".join(code.split()),
            " ".join(following.split()),
            self.file,
            line,
            start,
            end,
            before,
            after,
        )

    def is_unrolled(self, i: int) -> bool:
        """Whether the token stands in the head of an unrolled loop."""
        start = self.owner[i][0]
        return start in self._unrolled and i < self.match[start + 1]

    def is_compile_time(self, i: int) -> bool:
        start, end, _ = self.owner.get(i, (0, -1, ""))
        head = self.tokens[start : end + 1]
        return end < 0 or head[0] == "template" or bool({"constexpr", "static_assert", "using"} & set(head))

    def is_spaced(self, i: int) -> bool:
        """Whether there is a space on both sides: an operator of two operands, not a bracket of a template."""
        return self._gap(i - 1) and self._gap(i)

    def is_template(self, i: int) -> bool:
        """Whether the token is followed by arguments of a template."""
        return self.tokens[i][0].isalpha() and self.tokens[i + 1] == "<" and not self._gap(i)

    def operand(self, i: int, step: int, limits: tuple[str, ...]) -> int:
        """The last token, going from ``i``, of what ends at one of ``limits`` or at the bracket around it."""
        brackets = tuple(_CLOSING.values()) if step > 0 else tuple(_CLOSING)
        while (token := self.tokens[i + step]) not in brackets:
            if token in limits and (token not in _INEQUALITIES or self.is_spaced(i + step)):
                break
            i = self.match.get(i + step, i + step)
        return i

    def call(self, i: int) -> int | None:
        """The opening bracket, if the token names a function that is called here, not declared."""
        previous = self.tokens[i - 1]
        bracket = (self.tokens.index(">", i) if self.is_template(i) else i) + 1
        is_declared = previous[0].isalpha() and previous not in ("return", "else")
        return bracket if self.tokens[bracket] == "(" and not is_declared else None


def _deletions(source: _Source) -> Iterator[Mutant]:
    for start, end, _ in source.statements:
        if source.tokens[end] != ";":
            continue
        first = start
        while (head := source.tokens[first]) in ("if", "for", "while", "else"):
            first += 1
            if head != "else":
                first = source.match[first + (source.tokens[first] == "constexpr")] + 1
        i = first
        while i < end and source.tokens[i] not in _ASSIGNMENTS:
            token, following = source.tokens[i], source.tokens[i + 1]
            if source.is_template(i):
                i = source.tokens.index(">", i) + 1
            elif token in ("(", "["):
                i = source.match[i] + 1
            elif token[0].isalpha() and following[0].isalpha():
                break  # a type and a name
            else:
                i += 1
        is_call = i == end and source.tokens[end - 1] == ")" and source.tokens[first] != "return"
        is_jump = i == end == first + 1 and source.tokens[first] in ("return", "continue", "break")
        is_assignment = source.tokens[i] in _ASSIGNMENTS and i > first
        if is_call or is_jump or is_assignment:
            yield source.mutant("delete", (first, end), "{{ if (!{}) ", " }}", (first, end))


def _conditions(source: _Source) -> Iterator[Mutant]:
    for i, token in enumerate(source.tokens):
        if token == "if" and source.tokens[i + 1] == "(":
            last = source.match[i + 1] - 1
            if source.operand(i + 1, 1, ("&&", "||")) == last:
                yield source.mutant("condition", (i + 2, last), "({} || (", "))", (i + 2, last))
        elif token in ("&&", "||") and source.is_spaced(i) and not source.is_unrolled(i):
            limits = tuple(limit for limit in _LIMITS if limit not in ("&&", "||"))
            shown = source.operand(i, -1, limits), source.operand(i, 1, limits)
            operands = [(i + 1, source.operand(i, 1, _LIMITS)), (source.operand(i, -1, _LIMITS), i - 1)]
            for operand in operands[: 1 if source.tokens[operands[1][0] - 1] in ("&&", "||") else 2]:
                yield source.mutant("condition", operand, "({} || (" if token == "&&" else "(!{} && (", "))", shown)


def _comparisons(source: _Source) -> Iterator[Mutant]:
    for i, token in enumerate(source.tokens):
        if token in _INEQUALITIES and source.is_spaced(i):
            shown = source.operand(i, -1, _LIMITS), source.operand(i, 1, _LIMITS)
            yield source.mutant("comparison", (i, i), "+ {} ", "", shown)
            if not source.is_unrolled(i):
                yield source.mutant("comparison", (i, i), "", " {} +", shown)


def _addends(source: _Source) -> Iterator[Mutant]:
    for i, token in enumerate(source.tokens):
        if token in ("+", "-") and source.is_spaced(i) and not source.is_unrolled(i):
            shown = source.operand(i, -1, (*_LIMITS, *_INEQUALITIES)), source.operand(i, 1, (*_LIMITS, *_INEQUALITIES))
            yield source.mutant("addend", (i, i), "", " !{} *", shown)


def _arguments(source: _Source, parameters: dict[str, list[str]]) -> Iterator[Mutant]:
    for i, token in enumerate(source.tokens):
        bracket = source.call(i) if token in parameters else None
        if bracket is None:
            continue
        first = bracket + 1
        for name in parameters[token]:
            last = source.operand(first - 1, 1, (",",))
            for change in _ARGUMENTS.get(name, ()):
                yield source.mutant("argument", (first, last), "((", f") {change})", (i, source.match[bracket]))
            first = last + 2


def _parameters(native: Path) -> dict[str, list[str]]:
    """The names of the parameters of every function."""
    parameters = {}
    for header in (HERE / "ptx.cuh", *native.glob("*.cuh")):
        for name, listed in re.findall(r"\w (\w+)\(([^()]*)", _NO_CODE.sub("", header.read_text())):
            names = [
                re.sub(r" = .*", "", parameter).split()[-1]
                for parameter in listed.split(",")
                if len(parameter.split()) > 1
            ]
            if set(names) & set(_ARGUMENTS):
                parameters[name] = names
    return parameters


def find_mutants(native: Path) -> list[Mutant]:
    """All mutants of the sources in ``native``, each with a key of its own."""
    parameters = _parameters(native)
    found: list[Mutant] = []
    for path in sorted([*native.glob("*.cuh"), *native.glob("*.h")]):
        if path.name == "ptx.cuh":
            continue
        source = _Source(path)
        operators = (_deletions, _conditions, _comparisons, _addends)
        mutants = [mutant for operator in operators for mutant in operator(source)] + list(
            _arguments(source, parameters)
        )
        at = {start: i for i, (start, _) in enumerate(source.spans)}
        found += (mutant for mutant in mutants if not source.is_compile_time(at[mutant.start]))
    # What is alike is told apart by what follows, or else counted.
    alike, seen = Counter(mutant.key for mutant in found), Counter[str]()
    for i, mutant in enumerate(found):
        if alike[mutant.key] > 1:
            mutant = dataclasses.replace(mutant, code=f"{mutant.code} ... {mutant.following}")
        seen[mutant.key] += 1
        found[i] = (
            dataclasses.replace(mutant, code=f"{mutant.code} ({seen[mutant.key]})") if seen[mutant.key] > 1 else mutant
        )
    return found


def write_switch(folder: Path, num_mutants: int) -> None:
    """The header that says which mutant it is to be, included first by all sources in ``folder``."""
    (folder / "mutant.h").write_text(
        _SWITCH.format(num_mutants=num_mutants, most_visits=_MOST_VISITS, endless_status=ENDLESS_STATUS)
    )
    for path in (*folder.glob("*.cuh"), *folder.glob("*.h")):
        if path.name not in ("mutant.h", "ptx.cuh"):
            path.write_text('#include "mutant.h"\n#line 1\n' + path.read_text())


def write_mutants(native: Path, mutants: list[Mutant], folder: Path) -> None:
    """The sources of ``native`` into the new ``folder``, with every mutant in place behind its switch."""
    shutil.copytree(native, folder)
    for file in {mutant.file for mutant in mutants}:
        insertions = []
        for idx, mutant in enumerate(mutants):
            if mutant.file == file:
                # What ends comes before what begins, an inner end before an outer one, an outer beginning before an inner one.
                insertions.append((mutant.end, 0, -mutant.start, mutant.after.format(f"mutant({idx})")))
                insertions.append((mutant.start, 1, -mutant.end, mutant.before.format(f"mutant({idx})")))
        text = (native / file).read_text()
        for position, _, _, inserted in sorted(insertions, reverse=True):
            text = text[:position] + inserted + text[position:]
        (folder / file).write_text(text)
    write_switch(folder, len(mutants))
