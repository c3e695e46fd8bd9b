"""The native library: finding it, building it, keeping it.

Reading order: ``library.py`` (the ladder: prebuilt, cached, built), ``toolchain.py`` (which compilers), ``sources.py`` (what is
compiled, and its hash), ``compile.py`` (has ninja run the compilers), ``report.py`` (registers and spills), ``cache.py`` (where what they
make is kept); ``program.py`` compiles other CUDA sources in the same way. Importing this package imports none of them.
"""

from .errors import BuildError

__all__ = ["BuildError"]
