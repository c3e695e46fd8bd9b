"""What a build shows: a progress bar on a terminal, plain lines elsewhere. On standard error, so that output can be piped."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Display:
    """A context manager; nothing is shown before the first step or message."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._progress = Progress(
            TextColumn("mlpdown: {task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._progress.stop()

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(f"mlpdown: {text}", markup=False)

    def step(self, finished: int, total: int, what: str) -> None:
        """A step of a build is done, or has begun."""
        if not self._console.is_terminal:
            return
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("compiling", total=total)
        self._progress.update(self._task, completed=finished, total=total, description=what)
