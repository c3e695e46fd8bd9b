"""As much of the syntax of C++ as it takes to find places in the kernels' sources: tokens, brackets, statements, functions."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
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
    """The tokens of a file, and which statement and function each belongs to."""

    def __init__(self, path: Path) -> None:
        self.file = path.name
        self.text = path.read_text()
        self.code = blank(self.text)
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
            if token in limits and (token not in INEQUALITIES or self.is_spaced(i + step)):
                break
            i = self.match.get(i + step, i + step)
        return i

    def call(self, i: int) -> int | None:
        """The opening bracket, if the token names a function that is called here, not declared."""
        previous = self.tokens[i - 1]
        bracket = (self.tokens.index(">", i) if self.is_template(i) else i) + 1
        is_declared = previous[0].isalpha() and previous not in ("return", "else")
        return bracket if self.tokens[bracket] == "(" and not is_declared else None
