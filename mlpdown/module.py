"""The op as a module: an ``nn.Linear`` that also takes the residuals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mlpdown import ops

if TYPE_CHECKING:
    from mlpdown.plan import Plan


class MLPDown(nn.Module):
    """``hidden_states + attn_output + weight @ mlp_intermediate + bias`` with the parameters of an ``nn.Linear``.

    ``state_dict`` has the keys of the linear, ``weight`` ``[hidden_dim, intermediate_dim]`` and ``bias`` ``[hidden_dim]``.

    Where a gradient is needed, plain differentiable PyTorch computes the same sum (with PyTorch's roundings), whatever the backend.

    Args:
        intermediate_dim, hidden_dim, bias, device, dtype: as in ``nn.Linear(in_features, out_features, bias, device, dtype)``.
        backend, plan, weight_prefetch: as in ``mlpdown.run``.
    """

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
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__module__}.{type(linear).__qualname__}")
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
        if torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad
            for tensor in (hidden_states, attn_output, mlp_intermediate, self.weight, self.bias)
        ):
            total = nn.functional.linear(mlp_intermediate, self.weight, self.bias)
            if attn_output is not None:
                total = total + attn_output
            return total + hidden_states
        return fused_mlp_down(
            hidden_states,
            attn_output,
            mlp_intermediate,
            self.weight,
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
    return torch.empty_like(hidden_states)
