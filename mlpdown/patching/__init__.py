"""One line that lets a Hugging Face model use the op, and its exact inverse. Importing this does not import transformers."""

from .handle import Patch, PatchReport, patch, unpatch

__all__ = ["Patch", "PatchReport", "patch", "unpatch"]
