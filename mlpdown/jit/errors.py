"""What goes wrong when the native library is looked for or built."""

from __future__ import annotations


class BuildError(RuntimeError):
    """There is no native library for this source and machine, and none could be built.

    The message says what was tried, what went wrong first, and what to do about it; it is meant to be read without a traceback.
    """
