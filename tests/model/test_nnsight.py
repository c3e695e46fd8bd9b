"""nnsight, which takes the place of every module's forward for good: traces of a model patched before, patched after, and unpatched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Without torch and transformers, which are here: a plain install would change them.
NNSIGHT = "nnsight>=0.8,<0.9"
DEPENDENCIES = (
    *(
        "greenlet",
        "pydantic",
        "pydantic-core",
        "annotated-types",
        "typing-inspection",
        "typing-extensions",
        "cloudpickle",
    ),
    *("websocket-client", "zstandard", "httpx", "httpcore", "h11", "anyio", "idna", "certifi", "tqdm", "pyyaml"),
)

PROGRAM = '''
import json, sys
sys.path.insert(0, sys.argv[1])
import torch, nnsight, mlpdown
from model.conftest import NUM_LAYERS, layers_of, make_model, step

TOKEN = torch.tensor([[3]])
PROMPT = torch.tensor([[3, 4, 5]])

def trace(wrapped, tokens):
    """The MLP's output and the layer's, with the first layer's output doubled on its way."""
    with torch.no_grad(), wrapped.trace(tokens, use_cache=False):
        layer = wrapped.gpt_neox.layers[0]
        mlp = layer.mlp.output.save()
        layer.output = layer.output * 2
        last = wrapped.gpt_neox.layers[1].output.save()
        logits = wrapped.output.logits.save()
    return [mlp.clone(), last.clone(), logits.clone()]

def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

stock = make_model("gpt_neox_parallel")
expected = {name: trace(nnsight.NNsight(make_model("gpt_neox_parallel")), tokens)
            for name, tokens in (("token", TOKEN), ("prompt", PROMPT))}
own = step(stock)
answers = {"the trace changes the logits": not torch.equal(expected["token"][2], own)}

first = make_model("gpt_neox_parallel")
handle = mlpdown.patch(first, backend="torch")
answers["patched before"] = handle.report.num_patched == NUM_LAYERS
wrapped = nnsight.NNsight(first)
for name, tokens in (("token", TOKEN), ("prompt", PROMPT)):
    answers[f"trace while patched, {name}"] = same(trace(wrapped, tokens), expected[name])
answers["call while patched"] = torch.equal(step(first), own)
answers["reasons"] = sorted(handle.calls)
answers["unpatched layers"] = handle.unpatch()
for name, tokens in (("token", TOKEN), ("prompt", PROMPT)):
    answers[f"trace once unpatched, {name}"] = same(trace(wrapped, tokens), expected[name])
answers["call once unpatched"] = torch.equal(step(first), own)
answers["class"] = all(type(layer).__module__.startswith("transformers.") for layer in layers_of(first))

second = make_model("gpt_neox_parallel")
wrapped = nnsight.NNsight(second)
report = mlpdown.patch(second, backend="torch").report
answers["patched after"] = report.num_patched
answers["reasons after"] = sorted(set(report.skipped.values()))
answers["trace when patched after"] = same(trace(wrapped, TOKEN), expected["token"])
print(json.dumps(answers))
'''


@pytest.mark.slow
def test_traces_are_those_of_the_stock_model(tmp_path: Path) -> None:
    target = tmp_path / "packages"
    installed = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(target),
            NNSIGHT,
            *DEPENDENCIES,
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    if installed.returncode != 0:
        pytest.skip(f"nnsight cannot be installed: {installed.stderr.strip().splitlines()[-1]}")
    # A file, since nnsight reads the source of the block; a process, since it puts an attribute on every object.
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    tests = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, str(program), str(tests)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert ran.returncode == 0, ran.stderr
    answers = json.loads(ran.stdout.splitlines()[-1])
    assert answers.pop("reasons") == [
        "mlp has a forward of its own (offloaded, dispatched or wrapped)",
        "there is more than one token",
    ]
    assert answers.pop("reasons after") == ["it has a forward of its own (offloaded, dispatched or wrapped)"]
    assert answers.pop("unpatched layers") == 2 and answers.pop("patched after") == 0
    assert answers == dict.fromkeys(answers, True)
