"""The op as a module: an ``nn.Linear`` that also takes the residuals."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from mlpdown import ops
from mlpdown.backends import say_once
from mlpdown.validate import DTYPES, needs_grad

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
            ValueError: ``linear`` has hooks or a forward of its own, or its weight is derived from other parameters (pruned, normed).
        """
        if type(linear) is not nn.Linear:
            raise TypeError(f"linear must be a torch.nn.Linear, got {full_name(type(linear))}")
        reason = linear_obstacle(linear)
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
        elif type(weight) is not nn.Parameter and not torch.compiler.is_compiling():
            if _is_sharded(weight):
                return self._run_sharded(mlp_intermediate, hidden_states, attn_output)
            reason = f"weight is a {full_name(type(weight))}"
        if reason is not None and self.backend in ("auto", "torch"):
            if self.backend == "auto":
                say_once(f"MLPDown is computed by PyTorch: {reason}", level=logging.INFO)
            # Not by backend 'torch', which takes what the op takes.
            result = F.linear(mlp_intermediate, weight, bias).reshape(hidden_states.shape)
            return (result if attn_output is None else result + attn_output) + hidden_states
        if reason is not None and reason != AUTOCAST and weight.dtype in DTYPES:
            raise RuntimeError(f"backend {self.backend!r} cannot be used while {reason}: take backend='torch'")
        return fused_mlp_down(
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


def module_obstacle(module: nn.Module) -> str | None:
    """Why a call of ``module`` is more than its class' forward, or None."""
    attributes = module.__dict__
    if "forward" in attributes:
        return "has a forward of its own (offloaded, dispatched or wrapped)"
    if attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]:
        return "has forward hooks (tensor-parallel, or somebody listens)"
    if "_compiled_call_impl" in attributes:
        return "has been compiled by itself"
    return None


def linear_obstacle(linear: nn.Linear) -> str | None:
    """Why the parameters of ``linear`` do not say all that it computes, or None."""
    for name in ("weight", "bias"):
        if name not in linear._parameters:
            return f"derives its {name} from other parameters (pruned or normed)"
        parameter = linear._parameters[name]
        if parameter is not None and type(parameter) is not nn.Parameter and not _is_sharded(parameter):
            return f"has a {name} that is a {full_name(type(parameter))}, not a torch.nn.Parameter"
    return module_obstacle(linear)


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def fused_mlp_down(
    hidden_states: torch.Tensor,
    attn_output: torch.Tensor | None,
    mlp_intermediate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    backend: str,
    plan: Plan | None,
    weight_prefetch: bool,
) -> torch.Tensor:
    """``mlpdown.run``, also where ``torch.compile`` traces the call: the ``numba`` backend is host code, so it goes in as one opaque op."""
    if backend == "numba" and torch.compiler.is_compiling():
        return _numba_mlp_down(hidden_states, attn_output, mlp_intermediate, weight, bias)
    return ops.run(
        hidden_states,
        attn_output,
        mlp_intermediate,
        weight,
        bias,
        backend=backend,
        plan=plan,
        weight_prefetch=weight_prefetch,
    )


@torch.library.custom_op("mlpdown::numba_mlp_down", mutates_args=())
def _numba_mlp_down(
    hidden_states: torch.Tensor,
    attn_output: torch.Tensor | None,
    mlp_intermediate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return ops.run(hidden_states, attn_output, mlp_intermediate, weight, bias, backend="numba")


@_numba_mlp_down.register_fake
def _(hidden_states: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
