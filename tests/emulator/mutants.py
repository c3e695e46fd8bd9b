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
extern "C" {
inline uint32_t emulator_mutant = ~0u;
inline bool emulator_reached[%d] = {};
inline uint32_t emulator_visits = 0;
}
inline bool is_mutant(uint32_t idx) {
  emulator_reached[idx] = true;
  if (idx != emulator_mutant) return false;
  if (++emulator_visits > %d) _exit(%d);
  return true;
}
constexpr bool mutant(uint32_t idx) { return !std::is_constant_evaluated() && is_mutant(idx); }
"""


# The tokens around which something is put, before and after, with the switch at {}; and the tokens that name the mutant, as changed.
_Edit = tuple[tuple[int, int], str, str, tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Mutant:
    """``before`` and ``after`` go around the text from ``start`` to ``end`` of ``file``, with the switch at ``{}``."""

    operator: str
    function: str
    code: str
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


def _deletions(source: Source) -> Iterator[_Edit]:
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
            yield (first, end), "{{ if (!{}) ", " }}", (first, end)


def _conditions(source: Source) -> Iterator[_Edit]:
    for i, token in enumerate(source.tokens):
        if token == "if" and source.tokens[i + 1] == "(":
            last = source.match[i + 1] - 1
            if source.reach(i + 1, 1, ("&&", "||")) == last:
                yield (i + 2, last), "({} || (", "))", (i + 2, last)
        elif token in ("&&", "||") and source.is_spaced(i) and not source.is_unrolled(i):
            limits = tuple(limit for limit in _LIMITS if limit not in ("&&", "||"))
            left, right = source.reach_both(i, _LIMITS)
            operands = [(i + 1, right)]
            if source.tokens[left - 1] not in ("&&", "||"):
                operands.append((left, i - 1))
            for operand in operands:
                yield operand, "({} || (" if token == "&&" else "(!{} && (", "))", source.reach_both(i, limits)


def _comparisons(source: Source) -> Iterator[_Edit]:
    for i, token in enumerate(source.tokens):
        if token in INEQUALITIES and source.is_spaced(i):
            yield (i, i), "+ {} ", "", source.reach_both(i, _LIMITS)
            if not source.is_unrolled(i):
                yield (i, i), "", " {} +", source.reach_both(i, _LIMITS)


def _addends(source: Source) -> Iterator[_Edit]:
    for i, token in enumerate(source.tokens):
        if token in ("+", "-") and source.is_spaced(i) and not source.is_unrolled(i):
            yield (i, i), "", " !{} *", source.reach_both(i, (*_LIMITS, *INEQUALITIES))


def _arguments(source: Source) -> Iterator[_Edit]:
    for i, name in enumerate(source.tokens):
        bracket = source.behind_name(i) if source.is_word(i) else i
        is_declared = source.is_word(i - 1) and source.tokens[i - 1] not in ("return", "else")
        if source.tokens[bracket] != "(" or bracket == i or is_declared:
            continue
        arguments = source.items(bracket)
        parameters = _parameters(source.path.parent).get((name, len(arguments)), [])
        for parameter, around in zip(parameters, arguments, strict=False):
            for change in _ARGUMENTS.get(parameter, ()):
                yield around, "((", f") {change})", (i, source.match[bracket])


@functools.cache
def _parameters(native: Path) -> dict[tuple[str, int], list[str]]:
    """The names of the parameters of every function, by its name and their number."""
    code = "".join(blank(header.read_text()) for header in (HERE / "ptx.cuh", *native.glob("*.cuh")))
    code = code.replace(", Where where = Where::current()", "")
    listed = [(name, re.findall(r"(\w+)(?:,|$)", names)) for name, names in re.findall(r"\w (\w+)\(([^()]*)\)", code)]
    return {(name, len(names)): names for name, names in listed}


_OPERATORS = {
    "delete": _deletions,
    "condition": _conditions,
    "comparison": _comparisons,
    "addend": _addends,
    "argument": _arguments,
}


def find_mutants(native: Path) -> list[Mutant]:
    """All mutants of the sources in ``native``, each with a key of its own."""
    found: list[tuple[Mutant, str]] = []  # with the code that follows
    for path in sorted({*native.glob("*.cuh"), *native.glob("*.h")} - {native / "ptx.cuh"}):
        source = Source(path)
        for operator, find_edits in _OPERATORS.items():
            edits = (edit for edit in find_edits(source) if not source.is_compile_time(edit[0][0]))
            for (first, last), before, after, shown in edits:
                start, end = source.spans[first][0], source.spans[last][1]
                begin, stop = source.spans[shown[0]][0], source.spans[shown[1]][1]
                name = source.code[begin:stop]
                if operator != "delete":
                    changed = before.format(1) + source.code[start:end] + after.format(1)
                    name = source.code[begin:start] + changed + source.code[end:stop]
                following = source.code[stop : source.code.find(";", stop + 1) + 1]
                line = source.code.count("\n", 0, start) + 1
                place = (path.name, line, start, end, before, after)
                found.append((Mutant(operator, source.function(first), " ".join(name.split()), *place), following))
    # What is alike is told apart by what follows, or else counted.
    alike, seen, mutants = Counter(mutant.key for mutant, _ in found), Counter[str](), []
    for mutant, following in found:
        if alike[mutant.key] > 1:
            mutant = dataclasses.replace(mutant, code=f"{mutant.code} ... {' '.join(following.split())}")
        seen[mutant.key] += 1
        count = f" ({seen[mutant.key]})" if seen[mutant.key] > 1 else ""
        mutants.append(dataclasses.replace(mutant, code=mutant.code + count))
    return mutants


def write_switch(folder: Path, num_mutants: int) -> None:
    """The header that says which mutant it is to be, included first by all sources in ``folder``."""
    (folder / "mutant.h").write_text(_SWITCH % (num_mutants, _MOST_VISITS, ENDLESS_STATUS))
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
