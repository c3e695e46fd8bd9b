"""The code that is known: what each form of a layer, of an MLP and of a linear does, and how to do it in other words.

A form is a line: its code, and the names by which it goes. To add one, print ``digits(SomeLayer.forward)`` and say how it differs from
the forms that are here. Where versions of transformers differ in a place of the code alone, the place has an alternative for each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any, NamedTuple, TypeVar

import torch

from .code import UnknownCode, Unwrapped, fingerprint, unwrap, verify

Answer = Callable[[torch.Tensor, Any, dict[str, Any]], Any]


def pair(hidden_states: torch.Tensor, attention_weights: Any, keywords: dict[str, Any]) -> Any:
    return hidden_states, attention_weights


def on_demand(hidden_states: torch.Tensor, attention_weights: Any, keywords: dict[str, Any]) -> Any:
    return (hidden_states, attention_weights) if keywords["output_attentions"] else (hidden_states,)


@dataclass(frozen=True)
class LayerForm:
    """A decoder layer: what stands around its attention and its MLP."""

    name: str
    code: str
    norm: str = "input_layernorm"
    attention: str = "self_attn"
    mlp_norm: str | None = "post_attention_layernorm"
    """None where the MLP takes what the attention takes."""
    parallel: bool | str = False
    """Whether the MLP takes the layer's input, not that with the attention's output added; or the attribute that says so."""
    one_norm_if_parallel: bool = False
    attention_dropout: str | None = None
    mlp_dropout: str | None = None
    by_name: bool = True
    """Whether the attention is given the hidden states by their name."""
    passes_rest: bool = True
    """Whether the attention is given the keywords that the layer does not name."""
    answer: Answer | None = None
    """What the layer answers; None for the hidden states alone."""
    modules: frozenset[str] = field(init=False)
    """The names by which its code takes modules."""

    def __post_init__(self) -> None:
        names = ("mlp", self.norm, self.attention, self.mlp_norm, self.attention_dropout, self.mlp_dropout)
        object.__setattr__(self, "modules", frozenset(each for each in names if each is not None))


@dataclass(frozen=True)
class MLPForm:
    """An MLP: the names of its modules as ``intermediate`` takes them, with the linear at its end as the last."""

    name: str
    code: str
    modules: tuple[str, ...]
    intermediate: Callable[[torch.Tensor, dict[str, Any], tuple[str, ...]], torch.Tensor]
    dropout: str | None = None
    """Behind the linear."""


def gated(x: torch.Tensor, modules: dict[str, Any], names: tuple[str, ...]) -> torch.Tensor:
    activation, gate, up, _ = names
    return modules[activation](modules[gate](x)) * modules[up](x)


def gated_in_one(x: torch.Tensor, modules: dict[str, Any], names: tuple[str, ...]) -> torch.Tensor:
    activation, gate_and_up, _ = names
    gate, up = modules[gate_and_up](x).chunk(2, dim=-1)
    return up * modules[activation](gate)


def plain(x: torch.Tensor, modules: dict[str, Any], names: tuple[str, ...]) -> torch.Tensor:
    activation, up, _ = names
    return modules[activation](modules[up](x))


# Places that several forms share. Signature and call of the attention: transformers 4.57 to 5.3, 5.4 to 5.23, from 5.24.
_SIGNATURE, _LATER_SIGNATURE, _OLD_SIGNATURE = "bcbd7656|7a4b1fc8|fac981cd", "7a4b1fc8|fac981cd", "12814152"
_NORM, _MLP, _BARE, _ON_DEMAND = (
    "4372fe53 a0f6f229",
    "4372fe53 ab84815a e8eabce0",
    "b7e6c004",
    "bdac5252 89687f8b af915624",
)
_NEOX_NAMES: dict[str, Any] = dict(
    attention="attention",
    parallel="use_parallel_residual",
    attention_dropout="post_attention_dropout",
    mlp_dropout="post_mlp_dropout",
    by_name=False,
)
_PHI_NAMES: dict[str, Any] = dict(
    mlp_norm=None, parallel=True, attention_dropout="resid_dropout", mlp_dropout="resid_dropout"
)
_PHI_3_NAMES: dict[str, Any] = dict(attention_dropout="resid_attn_dropout", mlp_dropout="resid_mlp_dropout")
_STABLELM_NAMES: dict[str, Any] = dict(
    parallel="use_parallel_residual", one_norm_if_parallel=True, mlp_dropout="dropout", passes_rest=False
)
_COHERE_NAMES: dict[str, Any] = dict(mlp_norm=None, parallel=True)
_GPT_J_NAMES: dict[str, Any] = dict(norm="ln_1", attention="attn", mlp_norm=None, parallel=True)

LAYERS = (
    LayerForm("Llama", f"{_SIGNATURE} {_NORM} 44e9721b|56e8bab1|17ec05da d6ae8fb3 {_MLP} d6ae8fb3 {_BARE}"),
    LayerForm(
        "Qwen2-VL (transformers 4.57)",
        f"{_OLD_SIGNATURE} {_NORM} 7284e9d5 d6ae8fb3 {_MLP} d6ae8fb3 {_ON_DEMAND}",
        answer=on_demand,
    ),
    LayerForm(
        "Nemotron",
        f"{_LATER_SIGNATURE} {_NORM} 859c0e75|06cf433e d6ae8fb3 {_MLP} d6ae8fb3 {_BARE}",
        passes_rest=False,
    ),
    LayerForm(
        "Persimmon",
        f"{_LATER_SIGNATURE} {_NORM} 56e8bab1|17ec05da d6ae8fb3 {_MLP} 5c623cd9 dca2c61e {_BARE}",
        mlp_dropout="dropout",
    ),
    LayerForm(
        "Persimmon (transformers 4.57)",
        f"{_OLD_SIGNATURE} {_NORM} 7284e9d5 d6ae8fb3 {_MLP} 5c623cd9 dca2c61e {_ON_DEMAND}",
        mlp_dropout="dropout",
        answer=on_demand,
    ),
    LayerForm(
        "Phi-3",
        f"{_SIGNATURE} {_NORM} 834396f1|64a7fbf3|e1944566 90614579 {_MLP} 69ac5369 {_BARE}",
        **_PHI_3_NAMES,
    ),
    LayerForm("GPT-NeoX", f"9d8c32a5 36d1d5fd 8ea6a431 80b929ab {_BARE}", **_NEOX_NAMES),
    LayerForm(
        "GPT-NeoX (transformers 4.57)",
        "d6d9ffbc|e26395aa 2bcfe4cc|f8cfe5ca 8ea6a431 80b929ab bdac5252 bd1ebbe1 af915624",
        answer=on_demand,
        **_NEOX_NAMES,
    ),
    LayerForm("StableLM", f"{_LATER_SIGNATURE} {_NORM} a77a8467|6a882592 fba6ecb7 {_BARE}", **_STABLELM_NAMES),
    LayerForm(
        "StableLM (transformers 4.57)",
        f"7c55f3d9 {_NORM} 6d8f32b8 fba6ecb7 {_ON_DEMAND}",
        answer=on_demand,
        **_STABLELM_NAMES,
    ),
    LayerForm("Phi", f"{_LATER_SIGNATURE} {_NORM} 41cc482b|3165e942 da401346 d7d3b5c2 e654c703 {_BARE}", **_PHI_NAMES),
    LayerForm(
        "Phi (transformers 4.57)",
        f"{_OLD_SIGNATURE} {_NORM} 938b20cd da401346 d7d3b5c2 e654c703 {_ON_DEMAND}",
        answer=on_demand,
        **_PHI_NAMES,
    ),
    LayerForm("Cohere", f"{_SIGNATURE} {_NORM} 93b6dc42|28557d36|b1ca9c1e 79cd7f8c 477ecda7 {_BARE}", **_COHERE_NAMES),
    LayerForm(
        "Cohere 2",
        f"996cffa9|f64d6725|cb82788a|a68c2548 {_NORM} 33bbc800|33bbc800|fcdaff14|b4e5edbe 79cd7f8c 477ecda7 {_BARE}",
        **_COHERE_NAMES,
    ),
    LayerForm("GPT-J", "fac981cd 4372fe53 442ddb52 ba3aa416 5a954d4a cc538f3b", **_GPT_J_NAMES),
    LayerForm(
        "GPT-J (before transformers 5.24)",
        "804abcf1|9c87426d|a01cc402 4372fe53 442ddb52 fe1d5805|e3b5df63|7acd939b 5a954d4a e654c703 dbb61ca6",
        passes_rest=False,
        answer=pair,
        **_GPT_J_NAMES,
    ),
)

_GATED = ("act_fn", "gate_proj", "up_proj", "down_proj")

MLPS = (
    MLPForm("Llama", "02398308 5da03882 35a31d2c", _GATED, gated),
    MLPForm("Qwen2.5-Omni", "059bd141 8e586a5f", _GATED, gated),
    MLPForm("Seed-OSS", "02398308 5da03882 49b921bb 35a31d2c", _GATED, gated),
    MLPForm(
        "GLM",
        "08bb89cc 73328103 a9151851 6edcdb7c 7837b53c",
        ("activation_fn", "gate_up_proj", "down_proj"),
        gated_in_one,
    ),
    MLPForm(
        "GPT-NeoX", "08bb89cc 9a9a5b39 f3eed738 6492398a b7e6c004", ("act", "dense_h_to_4h", "dense_4h_to_h"), plain
    ),
    MLPForm("CLIP", "08bb89cc 0fb32d17 f5d5b835 92fedb8b b7e6c004", ("activation_fn", "fc1", "fc2"), plain),
    MLPForm("Arcee", "02398308 b34b5aa0", ("act_fn", "up_proj", "down_proj"), plain),
    MLPForm("Starcoder2", "08bb89cc 674f51ad f3eed738 237ac693 84aaf3bc b7e6c004", ("act", "c_fc", "c_proj"), plain),
    MLPForm(
        "GPT-J", "08bb89cc 5a9995e1 f3eed738 1af8c25f 5c623cd9 b7e6c004", ("act", "fc_in", "fc_out"), plain, "dropout"
    ),
)


class LeafForm(NamedTuple):
    """A module of torch that is stepped over."""

    name: str
    code: str


LINEARS = (LeafForm("torch.nn.Linear", "9cf120a0 f78adad1"),)
DROPOUTS = (LeafForm("torch.nn.Dropout", "9cf120a0 7448cb1e"),)

Form = TypeVar("Form", LayerForm, MLPForm, LeafForm)

_known: dict[FunctionType, tuple[CodeType, LayerForm | MLPForm | LeafForm]] = {}
"""The form of each method that has been recognised, so that none is read twice, and the code that it had: code may be replaced in place."""


def recognise(cls: type, forms: tuple[Form, ...]) -> tuple[Form, Unwrapped]:
    """The form that the forward of a class has.

    Raises:
        UnknownCode: it has none of ``forms``; the message says what differs from the nearest.
    """
    unwrapped = unwrap(getattr(cls, "forward", None))
    function = unwrapped.function
    # Only of a plain function is it sure that it equals no other.
    code, known = _known.get(function, (None, None)) if type(function) is FunctionType else (None, None)
    for form in forms:
        if form is known and code is function.__code__:
            return form, unwrapped
    try:
        form = _match(function, forms)
        verify(function)
    except UnknownCode as error:
        raise UnknownCode(f"{cls.__module__}.{cls.__qualname__}.forward is not known: {error}") from None
    _known[function] = function.__code__, form
    return form, unwrapped


def digits(function: Any) -> str:
    """The code of a method, as a form has it."""
    return " ".join(each for _, each in fingerprint(unwrap(function).function))


def _match(function: Any, forms: tuple[Form, ...]) -> Form:
    statements = fingerprint(function)
    own = [each for _, each in statements]
    nearest, most = forms[0], -1
    code: list[str] = []
    for form in forms:
        for version in versions(form.code):
            if version == own:
                return form
            shared = len(set(version) & set(own))
            if shared > most:
                nearest, most, code = form, shared, version
    differing = [text for text, each in statements if each not in code]
    if most == 0:
        raise UnknownCode("no code like it is known")
    what = repr(differing[0].splitlines()[0]) if differing else "the order or number of its statements"
    raise UnknownCode(f"it differs from {nearest.name}'s in {what}")


def versions(code: str) -> list[list[str]]:
    """The codes that a form stands for, by version of transformers."""
    places = [place.split("|") for place in code.split()]
    return [
        [place[min(number, len(place) - 1)] for place in places]
        for number in range(max(len(place) for place in places))
    ]
