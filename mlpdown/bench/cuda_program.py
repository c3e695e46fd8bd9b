"""The compiler of small CUDA sources, under the name that benchmarks and test kernels import it by."""

from ..jit.program import compile_cuda

__all__ = ["compile_cuda"]
