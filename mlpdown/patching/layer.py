"""A patched layer: a class in the place of the model's own, whose forward steps over the end of the MLP where the op may do that."""

from __future__ import annotations

import copyreg
import functools
import inspect
import logging
from collections import defaultdict
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.compiler import is_compiling
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mlpdown import ops
from mlpdown.module import LINEAR_NAMES, full_name, linear_obstacle, module_obstacle, only_pytorch
from mlpdown.validate import DTYPES, VECTOR_SIZE

from .code import UnknownCode, Unwrapped, unwrap
from .forms import DROPOUTS, LAYERS, LINEARS, MLPS, LayerForm, LeafForm, MLPForm, recognise

if TYPE_CHECKING:
    import weakref

    from mlpdown.plan import Plan

ATTRIBUTE = "_mlpdown"
"""Of a layer that is patched: the records of the patches that hold it, the newest last. The only attribute that a patch adds."""

LINEAR = torch._C._nn.linear
_CALL = frozenset(("forward", "_call_impl", "_compiled_call_impl"))
"""Attributes of a module that take the place of its class' own in a call."""

logger = logging.getLogger(__name__)
_said: set[str] = set()


@dataclass(frozen=True)
class Settings:
    """How a patched layer calls the op; the arguments are those of ``mlpdown.run``."""

    backend: str = "auto"
    weight_prefetch: bool = False
    plan: Plan | None = None


class Known(NamedTuple):
    """What a class of modules was when it was recognised."""

    form: MLPForm | LeafForm
    forward: Any
    function: Any
    """Its forward without decorators."""
    code: CodeType
    call: Any
    call_impl: Any
    hidden: frozenset[str]
    """The attributes that no module of the class may have in its dictionary."""


class Record:
    """What a layer keeps of one ``patch``: its settings, and a count of what became of the calls. All layers of that patch share it."""

    def __init__(self, settings: Settings, handle: weakref.ref[Any] | None = None) -> None:
        self.settings, self.handle = settings, handle
        self.calls: defaultdict[str, int] = defaultdict(int)
        # The classes that were recognised for these layers. One dictionary for all patches would make every compiled model compile anew
        # whenever another model is patched.
        self.known: dict[type, Known] = {}

    def __reduce__(self) -> Any:
        return Record, (self.settings,)  # a copy of the layer is no longer the handle's


class PatchedLayer:
    """Mixed into a layer's own class; :func:`patched_class` makes the rest. Copies and pickles name the own class alone."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        make, _, *rest = reduced
        own = own_class(type(self))
        if own is None or make is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        return (_new_layer, (own,), *rest)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        for record in self.__dict__.get(ATTRIBUTE, ()):
            _recognise_parts(self, record.known)


def own_class(patched: type) -> type[nn.Module] | None:
    """The class in whose place ``patched`` is; None for a class that :func:`patched_class` did not make."""
    return patched.__dict__.get("_mlpdown_own")


def patched_class(own: type[nn.Module]) -> type[nn.Module]:
    """The class to put in the place of ``own``, a class of layers.

    Raises:
        UnknownCode: its forward has code that is not known.
    """
    own = own_class(own) or own
    replaced: Any = own.forward
    form, unwrapped = recognise(own, LAYERS)
    code = unwrapped.function.__code__
    for cls in own.__subclasses__():
        if own_class(cls) is own and is_whole(cls):
            return cls
    forward = _make_forward(own, replaced, form, unwrapped)
    content = {
        "__module__": __name__,
        "__qualname__": own.__qualname__,
        "forward": forward,
        "_mlpdown_own": own,
        "_mlpdown_made": (forward, own, replaced, unwrapped.function, code),
        "_mlpdown_form": form,
    }
    metaclass: Any = type(own)
    return metaclass(own.__name__, (PatchedLayer, own), content)


def is_whole(cls: Any) -> bool:
    """Whether a class made by :func:`patched_class`, or of one, still has the forward that it was given, and its own class the code."""
    forward, own, replaced, function, code = cls._mlpdown_made
    return unwrap(cls.forward).function is forward and own.forward is replaced and function.__code__ is code


def layer_obstacle(layer: Any, patched: Any, record: Record) -> str | None:
    """Why the op cannot stand in for the end of this layer's MLP once the layer is of class ``patched``, or None."""
    reason = _class_obstacle(patched, patched._mlpdown_form.modules) or _recognise_parts(layer, record.known)
    if reason is None:
        found = _end_of_mlp(layer, patched._mlpdown_form, record.known)
        reason = found if isinstance(found, str) else None
    return reason


def _new_layer(own: type[nn.Module]) -> nn.Module:
    try:
        cls = patched_class(own)
    except UnknownCode as error:
        logger.warning("a layer that was patched when it was pickled is not patched now: %s", error)
        cls = own
    return cls.__new__(cls)


def _recognise_parts(layer: Any, known: dict[type, Known]) -> str | None:
    parts: Any = ((type(layer._modules.get("mlp")), MLPS), (nn.Linear, LINEARS), (nn.Dropout, DROPOUTS))
    for cls, forms in parts:
        try:
            form, unwrapped = recognise(cls, forms)
        except UnknownCode as error:
            return f"mlp: {error}"
        names = LINEAR_NAMES if cls is nn.Linear else frozenset()
        if type(form) is MLPForm:
            names = frozenset((*form.modules, *((form.dropout,) if form.dropout else ())))
        reason = _class_obstacle(cls, names)
        if reason is not None:
            return f"mlp {reason}" if forms is MLPS else f"{full_name(cls)} {reason}"
        function = unwrapped.function
        known[cls] = Known(form, cls.forward, function, function.__code__, cls.__call__, cls._call_impl, names | _CALL)
    return None


def _class_obstacle(cls: Any, names: frozenset[str]) -> str | None:
    """Why a module of this class may be called, or may find these parts of itself, in another way than a ``torch.nn.Module``; or None."""
    # Those of nn.Module are not taken for granted either: they may have been replaced before this package was there.
    for function in (cls.__call__, cls._call_impl):
        if (
            type(function) is not FunctionType
            or function.__globals__ is not vars(module_hooks)
            or function.__code__.co_name not in ("_wrapped_call_impl", "_call_impl")
        ):
            return "is called in another way than a torch.nn.Module"
    if cls.__getattr__ is not nn.Module.__getattr__ or cls.__getattribute__ is not object.__getattribute__:
        return "looks up its attributes in another way than a torch.nn.Module"
    for each in cls.__mro__:
        for name in names.intersection(vars(each)):
            return f"has a class with an attribute {name}, which hides its own"
    return None


def _make_forward(own: Any, replaced: Any, form: LayerForm, unwrapped: Unwrapped) -> Any:
    """The forward of a layer of this form. It lives on where somebody has wrapped it: then it may find the layer no longer patched."""
    own_forward, renamed = unwrapped.uncheckpointed, unwrapped.renamed
    function, code = unwrapped.function, unwrapped.function.__code__
    parameters = list(inspect.signature(function, follow_wrapped=False).parameters.values())[2:]
    named = [each for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    names = frozenset(each.name for each in named)
    defaults = {each.name: each.default for each in named if each.default is not each.empty}

    @functools.wraps(unwrapped.function)
    def forward(self: Any, hidden_states: torch.Tensor, *positional: Any, **keywords: Any) -> Any:
        attributes = self.__dict__
        records = attributes[ATTRIBUTE] if ATTRIBUTE in attributes else None  # noqa: SIM401 a call less
        if records is None or own.forward is not replaced or function.__code__ is not code:
            return own.forward(self, hidden_states, *positional, **keywords)
        record, compiling = records[-1], is_compiling()
        found: Any = _refusal(self, hidden_states, compiling)
        if found is None:
            found = _end_of_mlp(self, form, record.known, hidden_states, compiling)
        if type(found) is tuple and (
            positional
            or (renamed and not renamed.isdisjoint(keywords))
            or not (form.passes_rest or names.issuperset(keywords))
        ):
            found = "arguments are not given as the model gives them"
        if type(found) is str:
            if not compiling:
                record.calls[found] += 1
                if found not in _said:
                    _said.add(found)
                    logger.info("a patched layer runs the model's own code: %s", found)
            return own_forward(self, hidden_states, *positional, **keywords)
        settings = record.settings
        if not compiling:
            record.calls[settings.backend] += 1

        mlp_form, mlp_modules, weight, bias = found
        modules = attributes["_modules"]
        keywords = {**defaults, **keywords}
        normed = modules[form.norm](hidden_states)
        attention = modules[form.attention]
        if form.by_name:
            attn_output, attn_weights = attention(hidden_states=normed, **keywords)
        else:
            attn_output, attn_weights = attention(normed, **keywords)
        if form.attention_dropout is not None:
            attn_output = modules[form.attention_dropout](attn_output)
        parallel = form.parallel if type(form.parallel) is bool else getattr(self, form.parallel)
        if not parallel:
            hidden_states, attn_output = hidden_states + attn_output, None
        if form.mlp_norm is not None and not (parallel and form.one_norm_if_parallel):
            normed = modules[form.mlp_norm](hidden_states)
        out = ops.run(
            hidden_states,
            attn_output,
            mlp_form.intermediate(normed, mlp_modules, mlp_form.modules),
            weight,
            bias,
            backend=settings.backend,
            plan=settings.plan,
            weight_prefetch=settings.weight_prefetch,
        )
        return out if form.answer is None else form.answer(out, attn_weights, keywords)

    return forward


def _refusal(layer: Any, hidden_states: Any, compiling: bool) -> str | None:
    """Why the op may not compute a call in the state that torch is in, or None. The first questions turn most calls away."""
    if type(hidden_states) is not torch.Tensor and not (compiling and _is_plain(hidden_states)):
        return "hidden_states is not a plain tensor"
    num_elements: Any = hidden_states.numel()
    if compiling:
        # A graph for many lengths must stay one: nothing is asked of a length that is not known.
        one_token = all(statically_known_true(size == 1) for size in hidden_states.shape[:-1])
    elif type(num_elements) is not int:
        return "torch.jit traces"
    else:
        one_token = num_elements == hidden_states.shape[-1]
    if not one_token:
        return "there is more than one token"
    if torch.is_grad_enabled():
        # Any input of the layer may need a gradient (a prefix in the cache, an adapter), so none is looked at.
        return "grad mode is on"
    if layer.__dict__["training"]:
        return "the layer is in train mode"
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        return "there are hooks for all modules, which would not see those that are stepped over"
    if F.linear is not LINEAR:
        return "torch.nn.functional.linear has been replaced"
    if not hidden_states.is_contiguous():
        return "hidden_states is not contiguous"
    return only_pytorch()


def _end_of_mlp(
    layer: Any,
    form: LayerForm,
    known: dict[type, Known],
    hidden_states: torch.Tensor | None = None,
    compiling: bool = False,
) -> tuple[MLPForm, dict[str, Any], torch.Tensor, torch.Tensor | None] | str:
    """The layer's MLP, as form, modules, weight and bias; or why the op cannot stand in for its end: in the call with ``hidden_states``,
    or, without, at all.

    Every call asks this, since hooks, modules and weights change unnoticed. So it reads dictionaries: ``nn.Module.__getattr__`` takes ten
    times as long.
    """
    attributes = layer.__dict__
    modules, names = attributes["_modules"], form.modules
    if form.one_norm_if_parallel and getattr(layer, form.parallel):  # type: ignore[arg-type]
        names = names - {form.mlp_norm}
    for name in names:
        if name not in modules or modules[name] is None:
            return f"{name} is not a module"
    if not names.isdisjoint(attributes):
        return "the layer has an attribute that hides one of its modules"
    mlp = modules["mlp"]
    mlp_form: Any = known[type(mlp)].form if type(mlp) in known else None
    if type(mlp_form) is not MLPForm:
        return "mlp has other code than when the model was patched"
    mlp_modules = mlp.__dict__["_modules"]
    for name in mlp_form.modules if mlp_form.dropout is None else (mlp_form.dropout, *mlp_form.modules):
        if name not in mlp_modules or mlp_modules[name] is None:
            return f"mlp.{name} is not a module"
    linear = mlp_modules[name]
    stepped_over: tuple[tuple[str, str, Any, Any], ...] = (("", "mlp", mlp, None), ("mlp.", name, linear, nn.Linear))
    if form.mlp_dropout is not None:
        stepped_over += (("", form.mlp_dropout, modules[form.mlp_dropout], nn.Dropout),)
    if mlp_form.dropout is not None:
        stepped_over += (("mlp.", mlp_form.dropout, mlp_modules[mlp_form.dropout], nn.Dropout),)
    for prefix, name, module, cls in stepped_over:
        if cls is not None and (type(module) is not cls or cls not in known):
            return f"{prefix}{name} is a {full_name(type(module))}, not a {full_name(cls)} (quantised, adapted or replaced)"
        cls = type(module)
        was = known[cls]
        if cls.forward is not was.forward or was.function.__code__ is not was.code:
            return f"{prefix}{name} has other code than when the model was patched"
        # Export replaces the call of every module.
        if not compiling and (cls.__call__ is not was.call or cls._call_impl is not was.call_impl):
            return f"{prefix}{name} is called in another way than a torch.nn.Module"
        attributes = module.__dict__
        if attributes["_forward_hooks"] or attributes["_forward_pre_hooks"] or not was.hidden.isdisjoint(attributes):
            return f"{prefix}{name} {module_obstacle(module, was.hidden)}"
        if hidden_states is not None and attributes["training"]:
            return f"{prefix}{name} is in train mode"
    name = mlp_form.modules[-1]
    parameters = linear.__dict__["_parameters"]
    if "weight" not in parameters or "bias" not in parameters:
        return f"mlp.{name} {linear_obstacle(linear)}"
    weight, bias = parameters["weight"], parameters["bias"]
    for parameter in (weight, bias):
        if parameter is not None and type(parameter) is not nn.Parameter and not (compiling and _is_plain(parameter)):
            return (
                f"mlp.{name} has a {full_name(type(parameter))}, not a plain parameter (quantised or tensor-parallel)"
            )
    dtype, shape = weight.dtype, weight.shape
    if dtype not in DTYPES:
        return f"mlp.{name}.weight is {dtype}; the op takes torch.float16 and torch.bfloat16"
    if weight.ndim != 2 or 0 in shape or shape[1] % VECTOR_SIZE:
        return f"mlp.{name}.weight is {list(shape)}; the op takes a matrix with a multiple of {VECTOR_SIZE} columns"
    if not weight.is_contiguous():
        return f"mlp.{name}.weight is not contiguous, strides {weight.stride()}"
    if hidden_states is not None and hidden_states.dtype is not dtype:
        return f"hidden_states is {hidden_states.dtype}, the weight {dtype}"
    return mlp_form, mlp_modules, weight, bias


def _is_plain(tensor: Any) -> bool:
    """Whether a tensor is its data and nothing more, in a graph: while one is made for export, tensors have another type."""
    return isinstance(tensor, torch.Tensor) and not is_traceable_wrapper_subclass(tensor)
