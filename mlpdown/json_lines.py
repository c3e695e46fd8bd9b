"""Results as JSON: a line for each candidate's samples, and for each object that is small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LINE_CHARACTERS = 700
SIGNIFICANT_DIGITS = 6


def to_json(value: Any, margin: str = "") -> str:
    """JSON text with a line for each part that is small, or a list that holds no object."""
    text = json.dumps(value)
    if not isinstance(value, (dict, list)) or len(text) <= LINE_CHARACTERS or (isinstance(value, list) and "{" not in text):
        return text
    inner = margin + " "
    is_object = isinstance(value, dict)
    parts = [f"{json.dumps(key)}: {to_json(value[key], inner)}" if is_object else to_json(key, inner) for key in value]
    opening, closing = "{}" if is_object else "[]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(parts) + f"\n{margin}{closing}"


def write_json(path: Path, content: Any) -> None:
    """Write a value; floats in no more digits than mean something."""
    path.write_text(to_json(_rounded(content)) + "\n")


def read_json(path: Path, benchmark: str, schema_version: int) -> dict[str, Any]:
    """The members of a benchmark's result but for the two that name it. Raises ValueError if it is none, OSError if it cannot be read."""
    try:
        content = json.loads(path.read_text())
        named = content.pop("benchmark", None), content.pop("schema_version", None)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a result of mlpdown bench {benchmark}: {error}") from error
    if named != (benchmark, schema_version):
        expected = f"benchmark must be {benchmark!r} and schema_version {schema_version}"
        raise ValueError(f"{path} is not a result of mlpdown bench {benchmark}: {expected}, got {named[0]!r} and {named[1]!r}")
    return content


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
