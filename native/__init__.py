"""The production kernel's sources (CUDA C++), and, in a wheel, the library built from them."""
