"""Kinds of command line arguments that several commands take: what cannot be served is refused before anything is measured."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def output_file(text: str) -> Path:
    """A path at which a file can be written. What is there is kept until then."""
    path = Path(text)
    if path.exists() and not path.is_file() and not path.is_dir():
        return path  # a pipe, say, whose reader would take the first end for the end
    is_new = not os.path.lexists(path)  # a link that leads nowhere is there
    try:
        path.open("ab").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot be written: {error}") from None
    if is_new:
        path.unlink()
    return path


def device(text: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:1``, if this machine has it; of several GPUs, ``cuda`` is the current one."""
    import torch

    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or like cuda:1, got {text}")
    if text != "cpu":
        if not torch.cuda.is_available():
            raise argparse.ArgumentTypeError(f"torch {torch.__version__} finds no CUDA GPU here, got {text}")
        # Before torch sees it, whose indices wrap around.
        if int(match[1] or 0) >= torch.cuda.device_count():
            raise argparse.ArgumentTypeError(f"there are {torch.cuda.device_count()} GPUs, counted from 0, got {text}")
    return torch.device(text)


def natural_number(text: str) -> int:
    """A whole number that is not negative."""
    if re.fullmatch(r"[0-9]{1,18}", text) is None:
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, got {text}")
    return int(text)
