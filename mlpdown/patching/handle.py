"""``patch`` and its exact inverse: layers change their class, and nothing else about the model changes."""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

import mlpdown
from mlpdown.module import check_settings

from .code import UnknownCode
from .layer import ATTRIBUTE, PatchedLayer, Record, Settings, is_whole, layer_obstacle, own_class, patched_class

if TYPE_CHECKING:
    from types import TracebackType

    from mlpdown.plan import Plan

logger = logging.getLogger(__name__)
_changing = threading.RLock()


@dataclass(frozen=True)
class PatchReport:
    """What became of a model's layers; ``str`` begins with ``32 of 32 layers patched``."""

    num_layers: int
    """Layers that were found, known or not."""
    num_patched: int
    """Layers that run the op now, whether this call or an earlier one patched them."""
    backend: str | None = None
    """The backend that one token takes now, where the weights are; None if no layer is patched."""
    passed_over: str | None = None
    """Why it is not a better one; None if it is the best, or was asked for by name."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Reason by layer name."""

    def __str__(self) -> str:
        lines = [f"{self.num_patched} of {self.num_layers} layers patched"]
        if self.backend is not None:
            why = "" if self.passed_over is None else f" ({self.passed_over})"
            lines.append(f"  one token takes backend {self.backend!r}{why}")
        for reason, group in itertools.groupby(self.skipped, self.skipped.__getitem__):
            first, *rest = group
            lines.append(f"  {first}{f' to {rest[-1]} ({1 + len(rest)})' if rest else ''} skipped: {reason}")
        if any("not known" in reason for reason in self.skipped.values()):
            lines.append(
                "  A line in mlpdown/patching/forms.py makes code known: send the project this report, or the line."
            )
        return "\n".join(lines)


class Patch:
    """What ``patch`` did to a model, and the way back: ``unpatch()``, or the end of a ``with`` block.

    It takes back what its own call did, in whatever order handles end: a layer stays patched as long as another patch holds it, with the
    settings of the newest.
    """

    def __init__(self, settings: Settings) -> None:
        self.report = PatchReport(0, 0)
        self._record = Record(settings, weakref.ref(self))
        self._layers: list[tuple[str, nn.Module]] = []

    @property
    def calls(self) -> dict[str, int]:
        """What became of the calls of these layers: under a backend's name those that the op took, under a reason those it did not.

        Calls within a graph are not counted. Where threads share a model, a count may fall short.
        """
        return dict(self._record.calls)

    def unpatch(self) -> int:
        """Undo this patch; a second call finds nothing to undo. Returns the number of layers that run the model's own code again."""
        with _changing:
            layers, self._layers = self._layers, []
            return sum(_release(name, layer, self._record) for name, layer in layers)

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

    A layer is known by the code of its forward and of its MLP's, not by its name. ``mlpdown/patching/forms.py`` has the forms, for
    transformers 4.57 and 5.x: Llama's (with Qwen 2 and 3, Mistral, Gemma, SmolLM3, GLM, Starcoder2 and others), GPT-NeoX's and Pythia's,
    Phi's, Phi-3's, GPT-J's and CodeGen's, Cohere's, StableLM's, Persimmon's and Nemotron's. Layers are found anywhere within ``model``.

    A patched layer changes its class to a subclass of the same name and gets one attribute; parameters, state_dict, hooks, gradient
    checkpointing and training stay as they were, and so do pickling and copying (a copy of a patched model is patched; to unpickle one,
    this package must be there). It computes a call itself only under ``torch.no_grad`` or ``torch.inference_mode`` (as ``generate`` does),
    in eval mode, for one token of one sequence, in float16 or bfloat16; any other call runs the model's own code. Results differ from the
    model's own by rounding: once here, up to three times there.

    A layer is skipped, and the report says why, when its code is not known, or its MLP is quantised, adapted (PEFT), offloaded, hooked,
    tensor-parallel or of another dtype. What changes afterwards is noticed at the next call; of what changes on a class, only its
    ``forward``, ``__call__`` and ``_call_impl``. A patch that raises patches nothing.

    Args:
        model: the model, or any module that contains its layers.
        backend: as in ``mlpdown.run``. A named backend runs or raises.
        weight_prefetch: ``True`` promises that every write to a weight has completed before a layer that reads it is called: no
            ``weight.copy_``, no merge of an adapter and no optimizer step is still under way on the device, in any stream. Writes are
            not detected; a broken promise can give a result of the old weights. Only ``native`` makes use of it.
        plan: as in ``mlpdown.run``; for all layers.

    Returns:
        A handle with the ``report``, that is also a context manager. ``print(mlpdown.patch(model))`` begins with
        ``32 of 32 layers patched``.

    Raises:
        TypeError: ``model`` is not a module, ``plan`` not a plan, or ``weight_prefetch`` not a bool.
        ValueError: the model contains no layers, or ``backend`` is not a backend.
        RuntimeError: the named backend cannot run here.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_settings(backend, plan, weight_prefetch)
    if backend != "auto":
        status = mlpdown.backends()[backend]
        if not status.available:
            raise RuntimeError(f"backend {backend!r} cannot run here: {status.reason}")
    handle = Patch(Settings(backend, weight_prefetch, plan))
    with _changing:
        layers: list[tuple[str, nn.Module, type[nn.Module]]] = []
        skipped: dict[str, str] = {}
        for name, layer, found in _find_layers(model):
            if isinstance(found, str):
                skipped[name] = found
            elif (reason := _obstacle(layer, found, handle._record)) is not None:
                skipped[name] = reason
            else:
                layers.append((name, layer, found))
        if not layers and not skipped:
            raise ValueError(
                f"model must contain the layers of a transformer, as items of a torch.nn.ModuleList, got {type(model).__name__} without any"
            )
        # Asked before any layer changes, since it may build the library.
        chosen, passed_over = _backend_of_one_token(backend, [layer for _, layer, _ in layers])
        num_layers = len(layers) + len(skipped)
        handle.report = PatchReport(num_layers, len(layers), chosen, passed_over, skipped)
        try:
            for name, layer, cls in layers:
                handle._layers.append((name, layer))
                _hold(layer, cls, handle._record)
            if skipped:
                logger.warning(
                    "%d of %d layers are not patched: print the handle for the reasons", len(skipped), num_layers
                )
            logger.info("%s", handle.report)
        except BaseException:
            handle.unpatch()
            raise
    return handle


def unpatch(model: nn.Module) -> int:
    """End every patch of the layers within ``model``, whoever made it.

    A layer gets its own class back. Where somebody has made another class or another forward out of the patched one since, that stays, the
    log says so, and it runs the model's own code.

    Returns:
        The number of layers that run the model's own code again; 0 for a model that is not patched.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    with _changing:
        return sum(_release(name, layer, None) for name, layer in model.named_modules())


def _find_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, type[nn.Module] | str]]:
    """Every layer of known code, with the class that takes the place of its own; then every item of a list of modules that could be a
    layer, with what differs from known code: one that has modules with matrices, and is neither within a layer nor around one.
    """
    classes: dict[type, type[nn.Module] | None] = {}
    names: list[str] = []
    for name, module in model.named_modules():
        cls = type(module)
        if "mlp" not in module._modules or (names and _is_within(name, names[-1])):
            continue
        if cls not in classes:
            try:
                classes[cls] = patched_class(cls)
            except UnknownCode:
                classes[cls] = None
        patched = classes[cls]
        is_theirs = isinstance(module, PatchedLayer) and own_class(cls) is None
        if is_theirs and ATTRIBUTE in module.__dict__ and is_whole(cls):
            patched = cls  # somebody has made it of a patched one, and it still runs the op
        if patched is not None:
            names.append(name)
            yield name, module, patched
    items = {id(item) for each in model.modules() if isinstance(each, nn.ModuleList) for item in each}
    for name, module in model.named_modules():
        if id(module) not in items or any(_is_within(name, each) or _is_within(each, name) for each in names):
            continue
        if any(parameter.dim() == 2 for child in module.children() for parameter in child.parameters()):
            names.append(name)
            try:
                patched_class(type(module))
            except UnknownCode as error:
                yield name, module, str(error)


def _is_within(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def _obstacle(layer: Any, cls: Any, record: Record) -> str | None:
    """Why this layer cannot be patched, or None."""
    forward = layer.__dict__.get("forward")
    if forward is not None and not _is_bound(forward, layer, type(layer)):
        return "it has a forward of its own (offloaded, dispatched or wrapped)"
    return layer_obstacle(layer, cls, record)


def _backend_of_one_token(backend: str, layers: list[nn.Module]) -> tuple[str | None, str | None]:
    if not layers:
        return None, None
    if backend != "auto":
        return backend, None
    devices = {parameter.device.type for layer in layers for parameter in layer.parameters()}
    if devices != {"cuda"}:
        return "torch", f"native needs CUDA tensors, the weights are on {', '.join(sorted(devices))}"
    native = mlpdown.backends()["native"]
    return ("native", None) if native.available else ("torch", native.reason)


def _hold(layer: nn.Module, cls: type, record: Record) -> None:
    records = layer.__dict__.get(ATTRIBUTE, ())
    # A record whose handle is gone can end only with all others, so a later one of that kind hides it for good.
    last = max((number for number, each in enumerate(records) if not _has_handle(each)), default=0)
    records = tuple(each for number, each in enumerate(records) if number >= last or _has_handle(each))
    layer.__dict__[ATTRIBUTE] = (*records, record)
    if type(layer) is not cls:
        _swap_class(layer, cls)


def _has_handle(record: Record) -> bool:
    return record.handle is not None and record.handle() is not None


def _release(name: str, layer: nn.Module, record: Record | None) -> bool:
    """Take one record, or all, from a layer. Returns whether it was patched and no longer is."""
    records = layer.__dict__.get(ATTRIBUTE, ())
    left = () if record is None else tuple(each for each in records if each is not record)
    if left == records:
        return False
    if left:
        layer.__dict__[ATTRIBUTE] = left
        return False
    del layer.__dict__[ATTRIBUTE]
    own = own_class(type(layer))
    if own is not None:
        _swap_class(layer, own)
    elif isinstance(layer, PatchedLayer):
        logger.warning(
            "%s keeps its class %s, made of a patched one; it runs the model's own code", name, type(layer).__name__
        )
    if own is not None and "forward" in layer.__dict__ and not _is_bound(layer.__dict__["forward"], layer, own):
        logger.warning("%s keeps the forward that it was given while patched; that runs the model's own code", name)
    return True


def _swap_class(layer: nn.Module, new_class: type) -> None:
    """Change the class of ``layer``, and of its own ``forward`` wherever somebody left it in the instance.

    transformers 4.57 leaves it in ``layer.forward`` after it has recorded hidden states, accelerate in ``layer._old_forward``.
    """
    old_class = type(layer)
    layer.__class__ = new_class
    for name, value in list(layer.__dict__.items()):
        if _is_bound(value, layer, old_class):
            layer.__dict__[name] = MethodType(new_class.forward, layer)  # type: ignore[attr-defined]


def _is_bound(value: object, layer: nn.Module, cls: type) -> bool:
    return isinstance(value, MethodType) and value.__self__ is layer and value.__func__ is cls.forward  # type: ignore[attr-defined]
