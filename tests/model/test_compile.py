"""torch.compile and torch.export of patched models: whole graphs, one op a layer, nothing around it, and no stale code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from transformers import StaticCache

import mlpdown

from .conftest import NUM_LAYERS, layers_of, make_model, step

TRANSFORMERS_MAJOR = int(transformers.__version__.split(".")[0])
NUMBA_OP = torch.ops.mlpdown.numba_mlp_down.default


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A compiler backend that runs graphs as they are and keeps them."""

    def __init__(self) -> None:
        self.kept: list[torch.fx.GraphModule] = []
        self.backend: Callable[..., Any] = aot_autograd(fw_compiler=self._keep)

    def _keep(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.kept.append(graph)
        return graph.forward

    def ops(self) -> list[torch.fx.Node]:
        """The calls of the op in the newest graph."""
        return [node for node in self.kept[-1].graph.nodes if node.target is NUMBA_OP]


def decode(model: Callable[..., Any], config: Any, prompt: torch.Tensor, num_tokens: int = 4) -> list[torch.Tensor]:
    """Logits of each decoded token after a prefill, over a static cache."""
    cache = StaticCache(config=config, max_cache_len=16)
    # transformers 5 has no such argument: its static cache counts.
    takes_cache_position = TRANSFORMERS_MAJOR < 5
    logits = []
    tokens, position = prompt, 0
    for _ in range(num_tokens):
        cache_position = torch.arange(position, position + tokens.shape[1])
        with torch.no_grad():
            output = model(
                tokens,
                past_key_values=cache,
                position_ids=cache_position[None],
                use_cache=True,
                **({"cache_position": cache_position} if takes_cache_position else {}),
            )
        position += tokens.shape[1]
        logits.append(output.logits[:, -1])
        tokens = logits[-1].argmax(-1, keepdim=True)
    return logits


# The forms of the residual and of the MLP that there are; the other families differ from these in nothing that a compiler sees.
DISTINCT_FAMILIES = ("gpt_neox_parallel", "llama")


@pytest.mark.parametrize(("family", "backend"), [("gpt_neox_parallel", "numba"), ("llama", "auto")])
def test_full_graph_over_a_static_cache(family: str, backend: str, prompt: torch.Tensor) -> None:
    assert_compiles(family, backend, prompt, dynamic=False)


def test_full_graph_with_dynamic_shapes(prompt: torch.Tensor) -> None:
    assert_compiles("gpt_neox_parallel", "numba", prompt, dynamic=True)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static shapes", "dynamic shapes"])
@pytest.mark.parametrize("backend", ["auto", "numba", "torch"])
def test_full_graph_of_every_family(family: str, backend: str, dynamic: bool, prompt: torch.Tensor) -> None:
    assert_compiles(family, backend, prompt, dynamic)


def assert_compiles(family: str, backend: str, prompt: torch.Tensor, dynamic: bool) -> None:
    model = make_model(family)
    mlpdown.patch(model, backend=backend)
    expected = decode(model, model.config, prompt)
    graphs = Graphs()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=graphs.backend)
    for one, other in zip(decode(compiled, model.config, prompt), expected, strict=True):
        assert torch.equal(one, other)
    assert len(graphs.ops()) == (NUM_LAYERS if backend == "numba" else 0)


def test_prefill_compiles_to_the_models_own_graph(prompt: torch.Tensor) -> None:
    model = make_model("gpt_neox_parallel")
    mlpdown.patch(model, backend="numba")
    graphs = Graphs()
    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=graphs.backend)(prompt, use_cache=False)
    assert graphs.ops() == []


@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
def test_patch_reaches_a_compiled_model_and_adds_no_copy(family: str) -> None:
    model = make_model(family)
    graphs = Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs.backend)
    step(compiled)
    assert graphs.ops() == []
    with mlpdown.patch(compiled, backend="numba"):
        assert torch.equal(step(compiled), step(model))
        assert len(graphs.ops()) == NUM_LAYERS
    assert torch.equal(step(compiled), step(model))
    assert len(graphs.kept) == 2, "unpatched, the model is what it was when it was first compiled"
    own, patched = (sum(is_copy(node) for node in graph.graph.nodes) for graph in graphs.kept)
    assert patched <= own


def is_copy(node: torch.fx.Node) -> bool:
    return str(node.target).removeprefix("aten.").split(".")[0] in ("clone", "contiguous", "_to_copy", "copy", "copy_")


def test_hook_added_after_compiling_is_heard_once_compiled_anew() -> None:
    model = make_model("llama")
    mlpdown.patch(model, backend="numba")
    compiled = torch.compile(model, backend="aot_eager")
    step(compiled)
    heard: list[nn.Module] = []
    layers_of(model)[0].mlp.register_forward_hook(lambda module, inputs, output: heard.append(module))
    # torch.compile does not guard on hooks unless told to.
    torch._dynamo.reset()
    step(torch.compile(model, backend="eager"))
    assert len(heard) == 1


def arguments(attn_output: bool, bias: bool) -> tuple[torch.Tensor | None, ...]:
    generator = torch.Generator().manual_seed(8)
    draw = lambda *shape: torch.randn(*shape, generator=generator).half()  # noqa: E731
    return (
        draw(1, 1, 16),
        draw(1, 1, 16) if attn_output else None,
        draw(1, 1, 32),
        draw(16, 32),
        draw(16) if bias else None,
    )


@pytest.mark.parametrize("attn_output", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_in_full(attn_output: bool, bias: bool) -> None:
    torch.library.opcheck(NUMBA_OP, arguments(attn_output, bias))


def test_opaque_op_is_the_numba_backend() -> None:
    hidden_states, attn_output, mlp_intermediate, weight, bias = arguments(True, True)
    assert hidden_states is not None and mlp_intermediate is not None and weight is not None
    expected = mlpdown.run(hidden_states, attn_output, mlp_intermediate, weight, bias, backend="numba")
    settings: dict[str, Any] = dict(backend="numba", plan=None, weight_prefetch=False)
    compiled = torch.compile(mlpdown.run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden_states, attn_output, mlp_intermediate, weight, bias, **settings), expected)


@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
def test_export_of_a_patched_model_keeps_the_op(family: str) -> None:
    model = make_model(family)
    mlpdown.patch(model, backend="numba")
    expected = step(model)
    with torch.no_grad():
        exported = torch.export.export(model, (torch.tensor([[3]]),), {"use_cache": False})
    assert [node.target for node in exported.graph.nodes].count(NUMBA_OP) == NUM_LAYERS
    assert torch.equal(exported.module()(torch.tensor([[3]]), use_cache=False).logits, expected)


@pytest.mark.slow
def test_inductor(model: Any, prompt: torch.Tensor) -> None:
    for backend in ("auto", "numba"):
        with mlpdown.patch(model, backend=backend):
            torch._dynamo.reset()
            expected = decode(model, model.config, prompt)
            actual = decode(torch.compile(model, fullgraph=True), model.config, prompt)
            for one, other in zip(actual, expected, strict=True):
                # Inductor keeps float32 between fused operations where eager rounds.
                torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-5)


@pytest.mark.slow
def test_ahead_of_time_inductor(tmp_path: Path) -> None:
    module = mlpdown.MLPDown(32, 16, dtype=torch.float16).eval()
    hidden_states, attn_output, mlp_intermediate, _, _ = arguments(True, True)
    inputs = (mlp_intermediate, hidden_states, attn_output)
    with torch.no_grad():
        exported = torch.export.export(module, inputs)
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "module.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        torch.testing.assert_close(loaded(*inputs), module(*inputs), rtol=2**-9, atol=2**-9)
