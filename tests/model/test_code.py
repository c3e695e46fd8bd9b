"""Layers are known by their code: whatever takes the place of known code is left alone and named, also when it comes after the patch."""

from __future__ import annotations

import functools
import glob
import importlib.util
import json
import linecache
import os
import py_compile
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama import modeling_llama

import mlpdown
from mlpdown.patching import code
from mlpdown.patching.forms import LAYERS, MLPS, digits, recognise, versions

from .conftest import NUM_LAYERS, layers_of, make_model, step


class SwiGLU(nn.Module):
    """What Liger puts in the place of LlamaMLP: the same parameters, no ``act_fn``."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x) * 2)


OWN_LAYER, OWN_MLP = modeling_llama.LlamaDecoderLayer.forward, modeling_llama.LlamaMLP.forward


def scaled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A replacement that wears everything of the original but its code."""

    @functools.wraps(function)
    def forward(self: Any, *positional: Any, **keywords: Any) -> Any:
        return function(self, *positional, **keywords) * 2

    return forward


def made_by_exec(function: Callable[..., Any]) -> Callable[..., Any]:
    names: dict[str, Any] = {"own": function}
    exec("def forward(self, *positional, **keywords):\n    return own(self, *positional, **keywords) * 2", names)
    return names["forward"]


def names_a_file(function: Callable[..., Any]) -> Callable[..., Any]:
    """Made by exec, and compiled to name the file and the line of the original."""
    own = code.unwrap(function).function
    start = "\n" * (own.__code__.co_firstlineno - 1)
    text = f"{start}def forward(self, *positional, **keywords): return own(self, *positional, **keywords) * 2"
    names: dict[str, Any] = {"own": function}
    exec(compile(text, own.__code__.co_filename, "exec"), names)
    return names["forward"]


REPLACEMENTS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "functools.wraps": scaled,
    "lambda": lambda own: lambda self, *positional, **keywords: own(self, *positional, **keywords) * 2,
    "exec": made_by_exec,
    "exec with the file of the original": names_a_file,
    "partial": lambda own: functools.partialmethod(scaled(own)),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("replacement", REPLACEMENTS)
@pytest.mark.parametrize("place", ["layer", "mlp"])
def test_replaced_forward(place: str, replacement: str, when: str, monkeypatch: pytest.MonkeyPatch, calls: Any) -> None:
    owner = modeling_llama.LlamaDecoderLayer if place == "layer" else modeling_llama.LlamaMLP
    model = make_model("llama")
    unchanged = step(model)
    if when == "after":
        handle = mlpdown.patch(model, backend="torch")
    monkeypatch.setattr(owner, "forward", REPLACEMENTS[replacement](owner.forward))
    if when == "before":
        handle = mlpdown.patch(model, backend="torch")
        assert handle.report.num_patched == 0
        assert all("not known" in reason for reason in handle.report.skipped.values()), handle.report
    actual = step(model)
    assert calls.take() == 0
    mlpdown.unpatch(model)
    assert torch.equal(actual, step(model)) and not torch.equal(actual, unchanged)


def test_replaced_class_of_the_mlp(monkeypatch: pytest.MonkeyPatch, calls: Any) -> None:
    monkeypatch.setattr(modeling_llama, "LlamaMLP", SwiGLU)
    model = make_model("llama")
    expected = step(model)
    report = mlpdown.patch(model, backend="torch").report
    assert report.num_patched == 0
    assert set(report.skipped.values()) == {
        f"mlp: {__name__}.SwiGLU.forward is not known: it differs from Llama's in "
        "'return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x) * 2)'"
    }
    assert "mlpdown/patching/forms.py" in str(report), "the way on"
    assert torch.equal(step(model), expected)


def kernelize(module: nn.Module, forward: Callable[..., Any]) -> None:
    """What ``kernels.kernelize`` does to a layer: another forward, bound to the instance."""
    module.forward = forward.__get__(module)  # type: ignore[method-assign]


@pytest.mark.parametrize("when", ["before", "after"])
def test_forward_bound_to_an_instance(when: str, calls: Any) -> None:
    model = make_model("llama")
    if when == "after":
        mlpdown.patch(model, backend="torch")
    kernelize(layers_of(model)[0].mlp, scaled(OWN_MLP))
    if when == "before":
        report = mlpdown.patch(model, backend="torch").report
        assert list(report.skipped) == ["model.layers.0"]
    actual = step(model)
    assert calls.take() == NUM_LAYERS - 1
    mlpdown.unpatch(model)
    assert torch.equal(actual, step(model))


@pytest.mark.parametrize("owner", [nn.Linear, nn.Dropout])
def test_replaced_forward_of_torchs_own_modules(
    owner: type[nn.Module], monkeypatch: pytest.MonkeyPatch, calls: Any
) -> None:
    model = make_model("gpt_neox_parallel")
    mlpdown.patch(model, backend="torch")
    own = owner.forward
    monkeypatch.setattr(owner, "forward", lambda self, input: own(self, input) * 2)
    actual = step(model)
    assert calls.take() == 0
    mlpdown.unpatch(model)
    assert torch.equal(actual, step(model))
    report = mlpdown.patch(model).report
    assert report.num_patched == 0 and owner.__name__ in str(report)


def test_replaced_function_of_torch(monkeypatch: pytest.MonkeyPatch, calls: Any) -> None:
    model = make_model("llama")
    mlpdown.patch(model, backend="torch")
    own = F.linear
    heard: list[torch.Size] = []
    monkeypatch.setattr(F, "linear", lambda x, weight, bias=None: heard.append(weight.shape) or own(x, weight, bias))
    step(model)
    assert calls.take() == 0 and len(heard) == NUM_LAYERS * 7 + 1


def test_layer_that_is_compiled_by_itself_is_patched(calls: Any) -> None:
    torch._dynamo.reset()
    model = make_model("llama")
    expected = step(model)
    for layer in layers_of(model):
        layer.compile(backend="eager")
    with mlpdown.patch(model, backend="torch") as handle:
        assert handle.report.num_patched == NUM_LAYERS
        assert torch.equal(step(model), expected)
    assert torch.equal(step(model), expected)
    layers_of(model)[0].mlp.compile(backend="eager")
    report = mlpdown.patch(model).report
    assert report.skipped == {"model.layers.0": "mlp has been compiled by itself"}


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.name.partition(".")[0], path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SOURCE = '''
from torch import nn
import torch

class MLP(nn.Module):
    # A comment, other names of the class, and a docstring do not count.
    def forward(self, x: torch.Tensor) -> "torch.Tensor":
        """Of a model of one's own."""
        down_proj = self.down_proj(
            self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        )
        return down_proj
'''


def test_code_of_ones_own_is_known_where_it_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "own_model.py"
    path.write_text(SOURCE)
    assert recognise(load(path).MLP, MLPS)[0].name == "Llama"
    path.write_text(SOURCE.replace("* self.up_proj(x)", "+ self.up_proj(x)"))
    other = load(path).MLP
    linecache.checkcache()
    with pytest.raises(code.UnknownCode, match="it differs from Llama's in 'down_proj = self.down_proj"):
        recognise(other, MLPS)


def test_code_whose_file_has_changed_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "changed_model.py"
    path.write_text(SOURCE.replace("* self.up_proj(x)", "+ self.up_proj(x)"))
    changed = load(path).MLP
    path.write_text(SOURCE)
    os.utime(path, (0, 0))
    linecache.checkcache()
    with pytest.raises(code.UnknownCode, match="it was not made from the source in its file"):
        recognise(changed, MLPS)


def test_code_without_source_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "compiled_model.py"
    path.write_text(SOURCE)
    py_compile.compile(str(path), cfile=str(tmp_path / "compiled_model.pyc"))
    path.unlink()
    with pytest.raises(code.UnknownCode, match="it has no source"):
        recognise(load(tmp_path / "compiled_model.pyc").MLP, MLPS)


@pytest.mark.parametrize("line", ["", "nn = types.ModuleType('nn')"])
def test_names_must_stand_for_torchs_modules(line: str, tmp_path: Path) -> None:
    path = tmp_path / "named_model.py"
    path.write_text(
        "import types\n"
        "from torch import nn\n"
        "class MLP(nn.Module):\n"
        "    def forward(self, x):\n"
        "        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))\n"
        "        down_proj = nn.functional.dropout(down_proj, p=self.residual_dropout, training=self.training)\n"
        "        return down_proj\n" + line
    )
    own = load(path).MLP
    if not line:
        assert recognise(own, MLPS)[0].name == "Seed-OSS"
    else:
        with pytest.raises(code.UnknownCode, match="its name 'nn' stands for something else"):
            recognise(own, MLPS)


def test_decorators_of_transformers_only_are_looked_through() -> None:
    forward = modeling_llama.LlamaDecoderLayer.forward
    assert recognise(modeling_llama.LlamaDecoderLayer, LAYERS)[0].name == "Llama"
    assert code.unwrap(forward).renamed, "an old name of the cache"
    assert code.unwrap(scaled(forward)).function.__code__ is scaled(forward).__code__


def test_old_name_of_a_keyword_still_works(calls: Any) -> None:
    model = make_model("llama")
    layer = layers_of(model)[0]
    old_name = next(iter(code.unwrap(type(layer).forward).renamed))
    states = torch.randn(1, 1, 64).half()
    position_embeddings = model.model.rotary_emb(states, torch.tensor([[0]]))
    with torch.no_grad(), pytest.warns(FutureWarning, match=old_name):
        expected = layer(states, position_embeddings=position_embeddings, **{old_name: None})
    mlpdown.patch(model, backend="torch")
    with torch.no_grad(), pytest.warns(FutureWarning, match=old_name):
        actual = layer(states, position_embeddings=position_embeddings, **{old_name: None})
    assert calls.take() == 0 and torch.equal(actual, expected)


def other_pythons() -> list[str]:
    found = [shutil.which(f"python3.{minor}") for minor in range(10, 16)]
    found += sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.1*/bin/python")))
    is_usable = "import sys; sys.exit(sys.version_info < (3, 10))"
    return [
        each
        for each in dict.fromkeys(found)
        if each is not None and subprocess.run([each, "-c", is_usable], capture_output=True, timeout=60).returncode == 0
    ]


PROGRAM = """
import importlib.util, json, sys, types
functional, nn, torch = (types.ModuleType(name) for name in ("functional", "nn", "torch"))
nn.functional, torch.nn, nn.Module = functional, nn, object
torch.Tensor = None
sys.modules.update({"torch": torch, "torch.nn": nn, "torch.nn.functional": functional})
def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
code, own = load("code_of_mlpdown", sys.argv[1]), load("own", sys.argv[2])
code.verify(own.MLP.forward)
print(json.dumps([digits for _, digits in code.fingerprint(own.MLP.forward) + code.fingerprint(own.Everything.forward)]))
"""

EVERYTHING = '''
class Everything:
    @staticmethod
    def forward(self, x, y=None, /, *rest, k: int = 3, **more) -> "A":
        """Doc
          string."""
        first = x[..., :2], x[0], x[1:, None]
        second = F.linear(first, self.weight, self.bias) if k else not torch.rsqrt(-first)
        for i, (a, *b) in enumerate(rest):
            with torch.no_grad() as c, open("a") as d:
                assert i < k != 3, f"{second!r:>{k}} b {i=}"
        try:
            del first[0]
        except (OSError, ValueError) as error:
            raise RuntimeError from error
        return [f"{k}", *rest, {"q": second, **more}, (lambda q: q + 1)(x), -0.5, 1j, b"x", ..., [j for j in b if j]]
'''


def test_every_python_agrees_about_a_fingerprint(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(SOURCE + EVERYTHING)
    answers = {}
    for python in (sys.executable, *other_pythons()):
        ran = subprocess.run(
            [python, "-I", "-c", PROGRAM, code.__file__, str(own)], capture_output=True, text=True, timeout=60
        )
        assert ran.returncode == 0, f"{python}: {ran.stderr}"
        answers[python] = json.loads(ran.stdout)
    llama = next(form for form in MLPS if form.name == "Llama")
    for python, answer in answers.items():
        assert answer == answers[sys.executable], python
        assert answer[:3] == llama.code.split(), python


def test_forms_are_told_apart() -> None:
    assert digits(OWN_MLP) == next(form for form in MLPS if form.name == "Llama").code
    for forms in (LAYERS, MLPS):
        every = [" ".join(version) for form in forms for version in versions(form.code)]  # type: ignore[attr-defined]
        assert len(set(every)) == len(every)
