"""The wheel's tag, decided when setuptools builds it: for any machine, or, when it carries the compiled library, for this platform.

setuptools loads this file alone, from the source tree, without the rest of the package.
"""

from __future__ import annotations

from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel

PREBUILT_LIBRARY = Path("native") / "prebuilt" / "libmlpdown.so"


class PlatformWheel(bdist_wheel):
    """``py3-none-any``, or ``py3-none-<platform>`` with a library: it depends on the platform, on no Python and on no torch."""

    def finalize_options(self) -> None:
        self.has_library = PREBUILT_LIBRARY.is_file()
        if self.has_library:
            # What decides between Python's folders for pure and for compiled packages.
            self.distribution.has_ext_modules = lambda: True
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if self.has_library else tag
