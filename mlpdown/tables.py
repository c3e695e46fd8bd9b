"""Tables of results, as commands print them."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

LOG_COLUMNS = 180


def new_console() -> Console:
    """A console of the terminal's width; wide where there is none: a file has no edge, and a table cut to 80 columns no names."""
    console = Console()
    return console if console.is_terminal else Console(width=LOG_COLUMNS)


def new_table(title: str, *headings: str, **options: Any) -> Table:
    """A table whose first column is text and whose others are numbers; nothing is cut off."""
    table = Table(title=title, title_justify="left", **{"box": SIMPLE_HEAD, "show_edge": False, "pad_edge": False, **options})
    for position, heading in enumerate(headings):
        table.add_column(heading, justify="right" if position else "left", overflow="fold")
    return table
