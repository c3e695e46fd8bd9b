"""Which arguments the op takes, and what is wrong with those it does not: every message names the argument, what it must be, what came."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from .plan import VECTOR_BYTES, Plan
from .reference.order import VECTOR_SIZE

DTYPES = (torch.float16, torch.bfloat16)
ALIGNMENT = VECTOR_BYTES  # of what the native kernel's bulk copies read


def check_plan_type(plan: object) -> None:
    """Raise TypeError unless ``plan`` is a plan."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a mlpdown.Plan or None, got {type(plan).__name__}")


def check_arguments(
    hidden_states: torch.Tensor,
    attn_output: torch.Tensor | None,
    mlp_intermediate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
) -> None:
    """Raise TypeError or ValueError unless these are arguments of the op, whatever the backend."""
    check_product(mlp_intermediate, weight)
    hidden_dim, intermediate_dim = weight.shape
    num_tokens = mlp_intermediate.numel() // intermediate_dim
    _check_like("hidden_states", hidden_states, weight)
    _check_last_dim("hidden_states", hidden_states, "hidden_dim", hidden_dim)
    if hidden_states.numel() != num_tokens * hidden_dim:
        raise ValueError(
            f"hidden_states must have as many tokens as mlp_intermediate {list(mlp_intermediate.shape)}, that is {num_tokens}, "
            f"got {list(hidden_states.shape)}"
        )
    if attn_output is not None:
        _check_like("attn_output", attn_output, weight)
        if attn_output.shape != hidden_states.shape:
            raise ValueError(
                f"attn_output must have the shape of hidden_states, {list(hidden_states.shape)}, got {list(attn_output.shape)}"
            )
    if bias is not None:
        _check_like("bias", bias, weight)
        if bias.shape != (hidden_dim,):
            raise ValueError(f"bias must be [hidden_dim] = [{hidden_dim}], got {list(bias.shape)}")
    if out is not None:
        _check_like("out", out, weight)
        if out.shape != hidden_states.shape:
            raise ValueError(
                f"out must have the shape of hidden_states, {list(hidden_states.shape)}, got {list(out.shape)}"
            )
        if not out.is_contiguous():
            raise ValueError(f"out must be contiguous, got strides {list(out.stride())}")
        inputs = {
            "hidden_states": hidden_states,
            "attn_output": attn_output,
            "mlp_intermediate": mlp_intermediate,
            "weight": weight,
            "bias": bias,
        }
        for name, tensor in inputs.items():
            if tensor is not None and _share_memory(out, tensor):
                raise ValueError(f"out must not share memory with an input, but it does with {name}")


def check_product(mlp_intermediate: torch.Tensor, weight: torch.Tensor) -> None:
    """The part of :func:`check_arguments` that concerns ``weight @ mlp_intermediate``."""
    for name, tensor in (("weight", weight), ("mlp_intermediate", mlp_intermediate)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if weight.dim() != 2:
        raise ValueError(f"weight must be a matrix [hidden_dim, intermediate_dim], got {list(weight.shape)}")
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight must be float16 or bfloat16, got {weight.dtype}")
    hidden_dim, intermediate_dim = weight.shape
    if hidden_dim == 0 or intermediate_dim == 0 or intermediate_dim % VECTOR_SIZE != 0:
        raise ValueError(
            f"weight must be [hidden_dim, intermediate_dim] with hidden_dim >= 1 and intermediate_dim a "
            f"positive multiple of {VECTOR_SIZE}, got {list(weight.shape)}"
        )
    _check_like("mlp_intermediate", mlp_intermediate, weight)
    if mlp_intermediate.dim() > 0 and mlp_intermediate.shape[-1] == hidden_dim != intermediate_dim:
        raise ValueError(
            f"weight must be [hidden_dim, intermediate_dim] with intermediate_dim that of mlp_intermediate, {mlp_intermediate.shape[-1]}, "
            f"got {list(weight.shape)} (transposed, or another tensor for mlp_intermediate?)"
        )
    _check_last_dim("mlp_intermediate", mlp_intermediate, "intermediate_dim", intermediate_dim)


def check_no_grad(backend: str, *tensors: torch.Tensor | None) -> None:
    """Raise ValueError if autograd would have to differentiate through a backend that has no derivative."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # not any(), whose generator takes as long as the tensors' answers
            if getattr(tensor, "requires_grad", False):
                raise ValueError(
                    f"backend {backend!r} has no derivative, and an argument has requires_grad=True while grad mode is on: call under "
                    "torch.no_grad() or torch.inference_mode(), or take backend='torch'"
                )
    if forward_ad_is_on() and any(map(_has_tangent, tensors)):
        raise ValueError(
            f"backend {backend!r} has no derivative, and an argument has a tangent (forward-mode AD): take backend='torch'"
        )


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd would record an operation on these tensors, or carry tangents through it."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if getattr(tensor, "requires_grad", False):
                return True
    return forward_ad_is_on() and any(map(_has_tangent, tensors))


def forward_ad_is_on() -> bool:
    """Whether tensors may have tangents, which grad mode does not tell."""
    return forward_ad._current_level >= 0


def _has_tangent(tensor: torch.Tensor | None) -> bool:
    return isinstance(tensor, torch.Tensor) and forward_ad.unpack_dual(tensor).tangent is not None


def overrides_torch(*tensors: torch.Tensor | None) -> bool:
    """Whether one of them is of a class that gives torch's functions a meaning of its own: its data alone may not be its value."""
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and type(tensor) not in PLAIN_CLASSES:
            function: Any = type(tensor).__torch_function__
            if function is torch._C._disabled_torch_function_impl:
                continue
            if getattr(function, "__func__", None) is not _PLAIN_FUNCTION:
                return True
    return False


def own_protocol(tensor: torch.Tensor) -> str | None:
    """The protocol by which the class of a tensor gives torch's functions a meaning of its own, or None."""
    if type(tensor) in PLAIN_CLASSES:
        return None
    if overrides_torch(tensor):
        return "__torch_function__"
    function: Any = type(tensor).__torch_dispatch__
    return None if function is torch._C._disabled_torch_dispatch_impl else "__torch_dispatch__"


def beyond_an_op() -> str | None:
    """What is under way that an op without rules for it cannot answer to, or None: transforms other than ``functionalize``, which needs
    none, and modes that give torch's functions another meaning."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    if interpreter is not None and interpreter.key() != torch._C._functorch.TransformType.Functionalize:
        return "a torch.func transform is under way"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit traces"
    if torch._C._len_torch_dispatch_stack() == 0:  # a tracer has function modes of its own
        for position in range(torch._C._len_torch_function_stack()):
            mode = torch._C._get_function_stack_at(position)
            if not isinstance(mode, DeviceContext):  # torch.device("cuda") as a context: where tensors are made
                return f"the TorchFunctionMode {type(mode).__name__} is on"
    return None


PLAIN_CLASSES = (torch.Tensor, torch.nn.Parameter)
_PLAIN_FUNCTION = torch.Tensor.__torch_function__.__func__  # type: ignore[attr-defined]


def native_refusal(
    hidden_states: torch.Tensor,
    attn_output: torch.Tensor | None,
    mlp_intermediate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> Exception | None:
    """Why the native kernel cannot take arguments that :func:`check_arguments` accepts; None if it can."""
    refusal = native_product_refusal(mlp_intermediate, weight)
    if refusal is None:
        for name, tensor in (("hidden_states", hidden_states), ("attn_output", attn_output), ("bias", bias)):
            if tensor is not None and not tensor.is_contiguous():
                return ValueError(
                    f"{name} must be contiguous for backend 'native', got strides {list(tensor.stride())}"
                )
    return refusal


def native_product_refusal(mlp_intermediate: torch.Tensor, weight: torch.Tensor) -> Exception | None:
    """The part of :func:`native_refusal` that concerns ``weight @ mlp_intermediate``."""
    if not weight.is_cuda:
        here = f"; torch {torch.__version__} is built without CUDA" if torch.version.cuda is None else ""
        return ValueError(f"weight must be on a CUDA device for backend 'native', got {weight.device}{here}")
    num_tokens = mlp_intermediate.numel() // weight.shape[1]
    if num_tokens > 1:
        return ValueError(
            f"mlp_intermediate must be one token for backend 'native', got {num_tokens} tokens: {list(mlp_intermediate.shape)}"
        )
    for name, tensor in (("weight", weight), ("mlp_intermediate", mlp_intermediate)):
        if not tensor.is_contiguous():
            return ValueError(f"{name} must be contiguous for backend 'native', got strides {list(tensor.stride())}")
        if not torch.compiler.is_compiling() and tensor.data_ptr() % ALIGNMENT != 0:
            return ValueError(
                f"{name} must be {ALIGNMENT}-byte aligned for backend 'native' ({name}.clone() is), got address {tensor.data_ptr():#x}"
            )
    return None


def _check_like(name: str, tensor: torch.Tensor, weight: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype != weight.dtype:
        raise TypeError(f"{name} must have the dtype of weight, {weight.dtype}, got {tensor.dtype}")
    if tensor.device != weight.device:
        raise ValueError(f"{name} must be on the device of weight, {weight.device}, got {tensor.device}")


def _check_last_dim(name: str, tensor: torch.Tensor, axis: str, size: int) -> None:
    if tensor.dim() == 0 or tensor.shape[-1] != size:
        raise ValueError(f"{name} must be [..., {axis}] = [..., {size}] as weight has it, got {list(tensor.shape)}")


def _has_address(tensor: torch.Tensor) -> bool:
    if tensor.is_meta or isinstance(tensor, FakeTensor) or tensor.layout is not torch.strided:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() or not one.numel() or not other.numel():
        return False
    if not (_has_address(one) and _has_address(other)):
        return one is other
    # Extents from the first to the last element: exact for contiguous tensors, on the safe side for others.
    begins = [t.data_ptr() for t in (one, other)]
    ends = [
        begin
        + t.element_size() * (1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)))
        for begin, t in zip(begins, (one, other), strict=True)
    ]
    return begins[0] < ends[1] and begins[1] < ends[0]
