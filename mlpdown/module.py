"""The op as a module: an ``nn.Linear`` that also takes the residuals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

from mlpdown import ops
from mlpdown.validate import needs_grad

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from mlpdown.plan import Plan


class MLPDown(nn.Module):
    """``hidden_states + attn_output + weight @ mlp_intermediate + bias`` with the parameters of an ``nn.Linear``.

    ``state_dict`` has the keys of the linear, ``weight`` ``[hidden_dim, intermediate_dim]`` and ``bias`` ``[hidden_dim]``.

    A weight that is a DTensor sharded along ``intermediate_dim`` makes the module row-parallel: ``forward`` then takes this process' slice
    of ``mlp_intermediate`` (``mlpdown.parallel.run_sharded``).

    Where a gradient is needed, the ``torch`` backend computes the sum, whatever ``backend`` says: the others have no derivative.

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
        """
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"linear must be a torch.nn.Linear, got {type(linear).__module__}.{type(linear).__qualname__}"
            )
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

    def forward(
        self, mlp_intermediate: torch.Tensor, hidden_states: torch.Tensor, attn_output: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The op on ``mlp_intermediate`` ``[..., intermediate_dim]``, ``hidden_states`` and ``attn_output`` ``[..., hidden_dim]``.

        Returns a tensor of the shape and dtype of ``hidden_states``. Errors are those of ``mlpdown.run``.
        """
        # A sharded weight is a DTensor, which is not an nn.Parameter to `type`.
        if type(self.weight) is not nn.Parameter and _is_sharded(self.weight):
            if needs_grad(hidden_states, attn_output, mlp_intermediate, self.weight, self.bias):
                raise RuntimeError(
                    "MLPDown has no derivative for a sharded weight: call under torch.no_grad() or torch.inference_mode()"
                )
            from mlpdown.parallel import run_sharded

            return run_sharded(
                hidden_states,
                attn_output,
                mlp_intermediate,
                self.weight,
                self.bias,
                backend=self.backend,
                plan=self.plan,
                weight_prefetch=self.weight_prefetch,
            )
        backend = self.backend
        if needs_grad(hidden_states, attn_output, mlp_intermediate, self.weight, self.bias):
            backend = "torch"
        return fused_mlp_down(
            hidden_states,
            attn_output,
            mlp_intermediate,
            self.weight,
            self.bias,
            backend=backend,
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
