"""As much of the syntax of C++ as it takes to find places in the kernels' sources."""

from __future__ import annotations

import bisect
import re
from pathlib import Path

_TOKEN = re.compile(r"[A-Za-z_]\w*|\d[\w.']*|::|->|&&|\|\||\+\+|--|<<=|>>=|<<|>>|[-+*/%&|^<>=!]=|\S")
_NO_CODE = re.compile(r"//[^\n]*|^[ ]*#(?:[^\n]*\\\n)*[^\n]*", re.MULTILINE)
_CLOSING = {"(": ")", "[": "]", "{": "}"}
INEQUALITIES = ("<", "<=", ">", ">=")
ASSIGNMENTS = ("=", "+=", "-=", "*=", "/=", "%=", "^=", "|=", "&=")


def blank(text: str) -> str:
    """The text with comments and directives blanked out."""
    return _NO_CODE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


class Source:
    """A file's tokens. Methods take and give their positions in the list."""

    def __init__(self, path: Path) -> None:
        text = path.read_text()
        self.path = path
        self.code = blank(text)
        found = list(_TOKEN.finditer(self.code))
        self.tokens = [token[0] for token in found]
        self.spans = [token.span() for token in found]
        self.match: dict[int, int] = {}  # brackets
        self.around: list[int] = []  # for each token the innermost bracket that is open before it, or -1
        unclosed = [-1]
        for i, token in enumerate(self.tokens):
            if token in _CLOSING.values():
                self.match[i] = unclosed.pop()
                self.match[self.match[i]] = i
            self.around.append(unclosed[-1])
            if token in _CLOSING:
                unclosed.append(i)
        starts = [start for start, _ in self.spans]
        unrolled = re.finditer(r"#pragma unroll$", text, re.MULTILINE)
        self._unrolled = {bisect.bisect(starts, pragma.end()) for pragma in unrolled}

    def text(self, first: int, last: int) -> str:
        return self.code[self.spans[first][0] : self.spans[last][1]]

    def is_spaced(self, i: int) -> bool:
        """Whether there is a space on both sides: an operator with two operands, not a bracket of a template."""
        return self.spans[i - 1][1] < self.spans[i][0] and self.spans[i][1] < self.spans[i + 1][0]

    def is_word(self, i: int) -> bool:
        return self.tokens[i][0].isalpha() or self.tokens[i][0] == "_"

    def behind_name(self, i: int) -> int:
        """Behind a name and what it has of template arguments."""
        is_template = self.tokens[i + 1] == "<" and self.spans[i][1] == self.spans[i + 1][0]
        depth = 0
        while is_template:
            i += 1
            depth += self.tokens[i].count("<") - self.tokens[i].count(">")
            is_template = depth > 0
        return i + 1

    def reach(self, i: int, step: int, limits: tuple[str, ...]) -> int:
        """The last token, going from ``i`` in steps of 1 or -1, before one of ``limits`` or the bracket around all of it."""
        brackets = tuple(_CLOSING.values()) if step > 0 else tuple(_CLOSING)
        while 0 <= i + step < len(self.tokens) and (token := self.tokens[i + step]) not in brackets:
            if token in limits and (token not in INEQUALITIES or self.is_spaced(i + step)):
                break
            i = self.match.get(i + step, i + step)
        return i

    def items(self, bracket: int) -> list[tuple[int, int]]:
        """The first and the last token of each argument behind an opening bracket."""
        items, at = [], bracket
        while at + 1 < self.match[bracket]:
            items.append((at + 1, self.reach(at, 1, (",",))))
            at = items[-1][1] + 1
        return items

    def reach_both(self, i: int, limits: tuple[str, ...]) -> tuple[int, int]:
        return self.reach(i, -1, limits), self.reach(i, 1, limits)

    def statement_start(self, i: int) -> int:
        while self.around[i] >= 0 and self.tokens[self.around[i]] != "{":
            i = self.around[i]
        return self.reach(i, -1, (";", "}"))

    def is_unrolled(self, i: int) -> bool:
        """Whether the token stands in the head of an unrolled loop."""
        start = self.statement_start(i)
        return start in self._unrolled and i < self.match[start + 1]

    def is_compile_time(self, i: int) -> bool:
        start = self.statement_start(i)
        return not {"constexpr", "static_assert", "using", "template"}.isdisjoint(self.tokens[start : i + 1])

    def function(self, i: int) -> str:
        """The names of the structures, functions and lambdas around a token."""
        names: list[str] = []
        while (i := self.around[i]) >= 0:
            head = self.text(self.statement_start(i), i) if self.tokens[i] == "{" else ""
            head = re.sub(r"^(template <[^\n]*>)?\s*(MLPDOWN_\w+(\([^)]*\))?\s*)*", "", head)
            if head and not re.match(r"(if|for|while|switch|else|do)\b", head):
                found = re.search(r"(\w+) = \[|^(?:struct|class|namespace) (\w+)|(\w+)\(", head)
                names += filter(None, found.groups()) if found else []
        return "::".join(reversed(names))
