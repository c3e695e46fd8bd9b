"""``patch`` and its exact inverse: layers change their class, and nothing else about the model changes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

import mlpdown

from .families import FAMILIES, own_class, patched_class
from .layer import PatchedLayer, Settings, obstacle

if TYPE_CHECKING:
    from types import TracebackType

    from mlpdown.plan import Plan

BACKENDS = ("auto", "native", "numba", "torch")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PatchReport:
    """What became of a model's layers; ``str`` gives ``32 of 32 layers patched`` and a line for each that was skipped."""

    num_layers: int
    """Layers of a known family."""
    num_patched: int
    """Layers that run the op now, whether this call or an earlier one patched them."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Reason by layer name."""

    def __str__(self) -> str:
        lines = [f"{self.num_patched} of {self.num_layers} layers patched"]
        lines += [f"  {name} skipped: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


class Patch:
    """What ``patch`` did to a model, and the way back: ``unpatch()``, or the end of a ``with`` block.

    It takes back what its own call changed. A layer that an earlier call had patched stays patched, with the earlier settings.
    """

    def __init__(self, report: PatchReport, changes: list[tuple[nn.Module, Settings | None]]) -> None:
        self.report = report
        self._changes = changes

    def unpatch(self) -> int:
        """Undo this patch; a second call finds nothing to undo. Returns the number of layers that got their own class back."""
        restored = 0
        for layer, earlier_settings in self._changes:
            if not isinstance(layer, PatchedLayer):
                continue  # another handle, or mlpdown.unpatch, was here first
            if earlier_settings is None:
                _restore(layer)
                restored += 1
            else:
                layer._mlpdown = earlier_settings
        self._changes = []
        return restored

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.unpatch()

    def __str__(self) -> str:
        return str(self.report)

    __repr__ = __str__


def patch(model: nn.Module, *, backend: str = "auto", weight_prefetch: bool = False, plan: Plan | None = None) -> Patch:
    """Let the layers of a Hugging Face model end in one op when they decode one token.

    Knows the layers of GPT-NeoX and Pythia (with and without parallel residual), Llama, Qwen2 and Mistral, in transformers 4.57 and
    5.x, anywhere within ``model``. A patched layer changes its class to a subclass of the same name and gets one attribute; parameters,
    state_dict, hooks, gradient checkpointing and training stay as they were, and so do pickling and copying (a copy of a patched model
    is patched; to unpickle one, this package must be there). It computes a call itself only under ``torch.no_grad`` or
    ``torch.inference_mode`` (as ``generate`` does), in eval mode, for one token of one sequence, in float16 or bfloat16; any other call
    falls through to the model's own code. Results differ from the model's own by rounding: once here, up to three times there.

    A layer is skipped, and the report says why, when its MLP is quantised, adapted (PEFT), offloaded, hooked, tensor-parallel or of
    another dtype. Patching twice does no more than once; other settings replace the earlier ones.

    Args:
        model: the model, or any module that contains its layers.
        backend: as in ``mlpdown.run``. A named backend runs or raises.
        weight_prefetch: ``True`` promises that every write to a weight has completed before a layer that reads it is called: no
            ``weight.copy_``, no merge of an adapter and no optimizer step is still under way on the device, in any stream. Writes are
            not detected; a broken promise can give a result of the old weights. Only ``native`` makes use of it.
        plan: as in ``mlpdown.run``; for all layers.

    Returns:
        A handle with the ``report``, that is also a context manager. ``print(mlpdown.patch(model))`` gives
        ``32 of 32 layers patched``.

    Raises:
        TypeError: ``model`` is not a module. ValueError: it contains no layer that is known, or ``backend`` is not a backend.
        RuntimeError: the named backend cannot run here, or transformers is older than 4.57.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend != "auto":
        status = mlpdown.backends()[backend]
        if not status.available:
            raise RuntimeError(f"backend {backend!r} cannot run here: {status.reason}")
    settings = Settings(backend, weight_prefetch, plan)
    changes: list[tuple[nn.Module, Settings | None]] = []
    skipped: dict[str, str] = {}
    num_layers = 0
    for name, layer in model.named_modules():
        own = own_class(layer)
        if own is None:
            continue
        num_layers += 1
        if isinstance(layer, PatchedLayer):
            if layer._mlpdown != settings:
                changes.append((layer, layer._mlpdown))  # type: ignore[arg-type]
                layer._mlpdown = settings
            continue
        patched = patched_class(own)
        reason = _layer_obstacle(layer, own) or obstacle(patched.stepped_over(layer))
        if reason is not None:
            skipped[name] = reason
            continue
        _swap_class(layer, patched)
        layer._mlpdown = settings
        changes.append((layer, None))
    if not num_layers:
        known = ", ".join(sorted(name.rpartition(".")[2] for name in FAMILIES))
        raise ValueError(
            f"model must contain layers of a known family ({known}), got {type(model).__name__} without any"
        )
    report = PatchReport(num_layers, num_layers - len(skipped), skipped)
    if skipped:
        logger.warning("%s", report)
    return Patch(report, changes)


def unpatch(model: nn.Module) -> int:
    """Give every patched layer within ``model`` its own class back, whoever patched it.

    Returns:
        The number of layers restored; 0 for a model that is not patched.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    patched_layers = [layer for layer in model.modules() if isinstance(layer, PatchedLayer)]
    for layer in patched_layers:
        _restore(layer)
    return len(patched_layers)


def _layer_obstacle(layer: nn.Module, own: type[nn.Module]) -> str | None:
    """Why this instance cannot change its class, or None."""
    if type(layer) is not own:
        return f"it is a {type(layer).__module__}.{type(layer).__qualname__}, a subclass of {own.__qualname__}"
    forward = layer.__dict__.get("forward")
    if forward is not None and not _is_bound(forward, layer, own):
        return "it has a forward of its own (offloaded, dispatched or wrapped)"
    return None


def _restore(layer: Any) -> None:
    own = own_class(layer)
    assert own is not None
    _swap_class(layer, own)
    del layer._mlpdown


def _swap_class(layer: nn.Module, new_class: type) -> None:
    """Change the class of ``layer``, and of its own ``forward`` wherever somebody left it in the instance.

    transformers 4.57 leaves it in ``layer.forward`` after it has recorded hidden states, accelerate in ``layer._old_forward``.
    """
    old_class = type(layer)
    layer.__class__ = new_class
    for name, value in layer.__dict__.items():
        if _is_bound(value, layer, old_class):
            layer.__dict__[name] = MethodType(new_class.forward, layer)  # type: ignore[attr-defined]


def _is_bound(value: object, layer: nn.Module, cls: type) -> bool:
    return isinstance(value, MethodType) and value.__self__ is layer and value.__func__ is cls.forward  # type: ignore[attr-defined]
