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

import dataclasses
import functools
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .build import HERE
from .tokens import ASSIGNMENTS, INEQUALITIES, Source, blank

_LIMITS = (";", ",", "?", ":", "=", "return", "&&", "||", "{", "}")  # of an expression that is compared or added up
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


def _mutant(
    source: Source, operator: str, around: tuple[int, int], before: str, after: str, shown: tuple[int, int]
) -> Mutant:
    """With ``before`` and ``after`` about the tokens ``around``. Its name is the changed code of the tokens ``shown``."""
    (start, _), (_, end) = (source.spans[i] for i in around)
    (first, _), (_, last) = (source.spans[i] for i in shown)
    code = source.code
    changed = code[first:start] + before.format(1) + code[start:end] + after.format(1) + code[end:last]
    return Mutant(
        operator,
        source.function(around[0]),
        " ".join((code[first:last] if operator == "delete" else changed).split()),
        " ".join(code[last : code.find(";", last + 1) + 1].split()),
        source.file,
        code.count("\n", 0, start) + 1,
        start,
        end,
        before,
        after,
    )


def _deletions(source: Source) -> Iterator[Mutant]:
    for end, token in enumerate(source.tokens):
        if token != ";" or (source.around[end] >= 0 and source.tokens[source.around[end]] != "{"):
            continue
        first = source.statement_start(end)
        while (head := source.tokens[first]) in ("if", "for", "while", "else"):
            first += 1
            if head != "else":
                first = source.match[first + (source.tokens[first] == "constexpr")] + 1
        i = first  # of a name with what may follow it, up to an assignment or the end
        while i < end and source.tokens[i] not in ASSIGNMENTS:
            behind = source.match.get(i, source.behind_name(i) - 1) + 1
            if source.is_word(i) and source.is_word(behind):
                break  # a type and a name
            i = behind
        is_call = i == end and source.tokens[end - 1] == ")" and head != "return"
        is_jump = i == end == first + 1 and head in ("return", "continue", "break")
        is_assignment = source.tokens[i] in ASSIGNMENTS and i > first
        if is_call or is_jump or is_assignment:
            yield _mutant(source, "delete", (first, end), "{{ if (!{}) ", " }}", (first, end))


def _conditions(source: Source) -> Iterator[Mutant]:
    for i, token in enumerate(source.tokens):
        if token == "if" and source.tokens[i + 1] == "(":
            last = source.match[i + 1] - 1
            if source.reach(i + 1, 1, ("&&", "||")) == last:
                yield _mutant(source, "condition", (i + 2, last), "({} || (", "))", (i + 2, last))
        elif token in ("&&", "||") and source.is_spaced(i) and not source.is_unrolled(i):
            limits = tuple(limit for limit in _LIMITS if limit not in ("&&", "||"))
            shown = source.reach(i, -1, limits), source.reach(i, 1, limits)
            operands = [(i + 1, source.reach(i, 1, _LIMITS)), (source.reach(i, -1, _LIMITS), i - 1)]
            for operand in operands[: 1 if source.tokens[operands[1][0] - 1] in ("&&", "||") else 2]:
                yield _mutant(source, "condition", operand, "({} || (" if token == "&&" else "(!{} && (", "))", shown)


def _comparisons(source: Source) -> Iterator[Mutant]:
    for i, token in enumerate(source.tokens):
        if token in INEQUALITIES and source.is_spaced(i):
            shown = source.reach(i, -1, _LIMITS), source.reach(i, 1, _LIMITS)
            yield _mutant(source, "comparison", (i, i), "+ {} ", "", shown)
            if not source.is_unrolled(i):
                yield _mutant(source, "comparison", (i, i), "", " {} +", shown)


def _addends(source: Source) -> Iterator[Mutant]:
    for i, token in enumerate(source.tokens):
        if token in ("+", "-") and source.is_spaced(i) and not source.is_unrolled(i):
            shown = source.reach(i, -1, (*_LIMITS, *INEQUALITIES)), source.reach(i, 1, (*_LIMITS, *INEQUALITIES))
            yield _mutant(source, "addend", (i, i), "", " !{} *", shown)


def _arguments(source: Source, parameters: dict[tuple[str, int], list[str]]) -> Iterator[Mutant]:
    for i, name in enumerate(source.tokens):
        bracket = source.behind_name(i) if source.is_word(i) else i
        is_declared = source.is_word(i - 1) and source.tokens[i - 1] not in ("return", "else")
        if source.tokens[bracket] != "(" or bracket == i or is_declared:
            continue
        arguments = source.items(bracket)
        for parameter, around in zip(parameters.get((name, len(arguments)), ()), arguments, strict=False):
            for change in _ARGUMENTS.get(parameter, ()):
                yield _mutant(source, "argument", around, "((", f") {change})", (i, source.match[bracket]))


def _parameters(native: Path) -> dict[tuple[str, int], list[str]]:
    """The names of the parameters of every function, by its name and their number."""
    code = "".join(blank(header.read_text()) for header in (HERE / "ptx.cuh", *native.glob("*.cuh")))
    code = code.replace(", Where where = Where::current()", "")
    listed = [(name, re.findall(r"(\w+)(?:,|$)", names)) for name, names in re.findall(r"\w (\w+)\(([^()]*)\)", code)]
    return {(name, len(names)): names for name, names in listed}


def find_mutants(native: Path) -> list[Mutant]:
    """All mutants of the sources in ``native``, each with a key of its own."""
    parameters = _parameters(native)
    found: list[Mutant] = []
    for path in sorted([*native.glob("*.cuh"), *native.glob("*.h")]):
        if path.name == "ptx.cuh":
            continue
        source = Source(path)
        operators = (
            _deletions,
            _conditions,
            _comparisons,
            _addends,
            functools.partial(_arguments, parameters=parameters),
        )
        at = {start: i for i, (start, _) in enumerate(source.spans)}
        mutants = (mutant for operator in operators for mutant in operator(source))
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
