"""The op as a module: an ``nn.Linear`` that also takes the residuals."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mlpdown import ops, torch_backend
from mlpdown.backends import check_name, say_once
from mlpdown.validate import DTYPES, PLAIN_CLASSES, check_plan_type, needs_grad, overrides_torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from mlpdown.plan import Plan


class MLPDown(nn.Module):
    """``hidden_states + attn_output + weight @ mlp_intermediate + bias`` with the parameters of an ``nn.Linear``.

    ``state_dict`` has the keys of the linear, ``weight`` ``[hidden_dim, intermediate_dim]`` and ``bias`` ``[hidden_dim]``.

    A weight that is a DTensor sharded along ``intermediate_dim`` makes the module row-parallel: ``forward`` then takes this process' slice
    of ``mlp_intermediate`` (``mlpdown.parallel.run_sharded``).

    With ``backend="auto"``, and with ``"torch"``, PyTorch computes what only PyTorch can: gradients, tangents, ``torch.func`` transforms,
    autocast, and parameters of another dtype than float16 and bfloat16. ``"native"`` and ``"numba"`` run or raise.

    Args:
        intermediate_dim, hidden_dim, bias, device, dtype: as in ``nn.Linear(in_features, out_features, bias, device, dtype)``.
        backend, plan, weight_prefetch: as in ``mlpdown.run``.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        intermediate_dim: int,
        hidden_dim: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        plan: Plan | None = None,
        weight_prefetch: bool = False,
    ) -> None:
        check_settings(backend, plan, weight_prefetch)
        super().__init__()
        # The linear initialises the parameters; they are taken over, it is not kept.
        self._take_over(nn.Linear(intermediate_dim, hidden_dim, bias, device=device, dtype=dtype))
        self.backend, self.plan, self.weight_prefetch = backend, plan, weight_prefetch

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, backend: str = "auto", plan: Plan | None = None, weight_prefetch: bool = False
    ) -> MLPDown:
        """A module that shares the parameters of ``linear`` (training either trains both).

        Raises:
            TypeError: ``linear`` is not exactly an ``nn.Linear``: a subclass (quantised, adapted) computes something else.
            ValueError: ``linear`` has hooks or a forward of its own, or its weight is derived from other parameters (pruned, normed);
                or ``backend`` is not a backend.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(f"linear must be a torch.nn.Linear, got {full_name(type(linear))}")
        check_settings(backend, plan, weight_prefetch)
        reason = linear_obstacle(linear) or _obstacle_of_all_linears()
        if reason is not None:
            raise ValueError(f"linear must compute what its parameters say, but it {reason}")
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._take_over(linear)
        module.backend, module.plan, module.weight_prefetch = backend, plan, weight_prefetch
        module.training = linear.training
        return module

    def _take_over(self, linear: nn.Linear) -> None:
        self.intermediate_dim, self.hidden_dim = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)

    def reset_parameters(self) -> None:
        """Initialise the parameters as an ``nn.Linear`` does, also after ``to_empty``."""
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]

    def forward(
        self, mlp_intermediate: torch.Tensor, hidden_states: torch.Tensor, attn_output: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The op on ``mlp_intermediate`` ``[..., intermediate_dim]``, ``hidden_states`` and ``attn_output`` ``[..., hidden_dim]``.

        Returns a tensor of the shape and dtype of ``hidden_states``; under autocast, of the dtype that PyTorch gives the sum. Errors are
        those of ``mlpdown.run``.
        """
        weight, bias = self.weight, self.bias
        reason = only_pytorch()
        if weight.dtype not in DTYPES:
            reason = f"weight is {weight.dtype}"
        # While a module is traced for export its parameters have another type.
        elif type(weight) not in PLAIN_CLASSES and not torch.compiler.is_compiling():
            if _is_sharded(weight):
                return self._run_sharded(mlp_intermediate, hidden_states, attn_output)
            # A subclass that only adds to a tensor is still its data.
            if overrides_torch(weight) or is_traceable_wrapper_subclass(weight):
                reason = f"weight is a {full_name(type(weight))}"
        if reason is not None and self.backend in ("auto", "torch"):
            if self.backend == "auto":
                say_once(f"MLPDown is computed by PyTorch: {reason}", level=logging.INFO)
            return torch_backend.compute(hidden_states, attn_output, mlp_intermediate, weight, bias)
        if reason is not None and reason != AUTOCAST and weight.dtype in DTYPES:
            raise RuntimeError(f"backend {self.backend!r} cannot be used while {reason}: take backend='torch'")
        return ops.run(
            hidden_states,
            attn_output,
            mlp_intermediate,
            weight,
            bias,
            backend=self.backend,
            plan=self.plan,
            weight_prefetch=self.weight_prefetch,
        )

    def _run_sharded(
        self, mlp_intermediate: torch.Tensor, hidden_states: torch.Tensor, attn_output: torch.Tensor | None
    ) -> torch.Tensor:
        if needs_grad(hidden_states, attn_output, mlp_intermediate, self.weight, self.bias):
            raise RuntimeError(
                "MLPDown has no derivative for a sharded weight: call under torch.no_grad() or torch.inference_mode()"
            )
        from mlpdown.parallel import run_sharded

        return run_sharded(
            hidden_states,
            attn_output,
            mlp_intermediate,
            self.weight,  # type: ignore[arg-type]
            self.bias,
            backend=self.backend,
            plan=self.plan,
            weight_prefetch=self.weight_prefetch,
        )

    def extra_repr(self) -> str:
        return (
            f"intermediate_dim={self.intermediate_dim}, hidden_dim={self.hidden_dim}, bias={self.bias is not None}, "
            f"backend={self.backend!r}"
        )


def _is_sharded(weight: torch.Tensor) -> TypeGuard[DTensor]:
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)


AUTOCAST = "autocast is on"


def only_pytorch() -> str | None:
    """Why only PyTorch's own operations may compute a call now, or None. A gradient that is recorded is not among the reasons."""
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is on"
    if torch._C._functorch.maybe_current_level() is not None:
        return "a torch.func transform is under way"
    if torch._C._is_any_autocast_enabled():
        return AUTOCAST
    if torch._C._get_tracing_state() is not None:
        return "torch.jit traces"
    return None


def check_settings(backend: object, plan: object, weight_prefetch: object) -> None:
    """Raise TypeError or ValueError unless ``mlpdown.run`` takes these."""
    check_name(backend)
    if plan is not None:
        check_plan_type(plan)
    if type(weight_prefetch) is not bool:
        raise TypeError(f"weight_prefetch must be True or False, got {type(weight_prefetch).__name__}")


def module_obstacle(module: nn.Module, names: frozenset[str] = frozenset()) -> str | None:
    """Why a call of ``module`` is more than its class' forward on the parts that have these names, or None."""
    attributes = module.__dict__
    if "forward" in attributes:
        return "has a forward of its own (offloaded, dispatched or wrapped)"
    if attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]:
        return "has forward hooks (tensor-parallel, or somebody listens)"
    if "_compiled_call_impl" in attributes:
        return "has been compiled by itself"
    if "_call_impl" in attributes:
        return "is called in another way than a torch.nn.Module"
    for name in names.intersection(attributes):
        return f"has an attribute {name}, which hides its own"
    return None


def linear_obstacle(linear: nn.Linear) -> str | None:
    """Why the parameters of ``linear`` do not say all that it computes, or None."""
    for name in ("weight", "bias"):
        if name not in linear._parameters:
            return f"derives its {name} from other parameters (pruned or normed)"
        parameter = linear._parameters[name]
        if parameter is not None and type(parameter) is not nn.Parameter and not _is_sharded(parameter):
            return f"has a {name} that is a {full_name(type(parameter))}, not a torch.nn.Parameter"
    if linear._backward_hooks or linear._backward_pre_hooks:
        return "has backward hooks"
    return module_obstacle(linear, LINEAR_NAMES)


LINEAR_NAMES = frozenset(("weight", "bias"))


def _obstacle_of_all_linears() -> str | None:
    from mlpdown.patching.forms import LINEARS, UnknownCode, recognise

    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        return "has forward hooks (of all modules)"
    try:
        recognise(nn.Linear, LINEARS)
    except UnknownCode as error:
        return f"has other code than PyTorch's: {error}"
    return None


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
