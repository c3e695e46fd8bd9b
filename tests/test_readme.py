"""The README is executed: its commands run, its examples run, its paths and names exist, its words are the program's.
Of CONTRIBUTING, paths and names exist."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mlpdown import check, checkpoint, cli
from mlpdown.golden import read_golden, shipped_goldens
from mlpdown.jit.toolchain import HOST_VARIABLES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
CHECKPOINT = "path/to/checkpoint"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


COMMANDS = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines() if line.strip()]
PYTHON = blocks("python")


def test_readme_leads_with_the_two_commands() -> None:
    assert COMMANDS[:2] == ["make demo", "make test"]
    assert README[: README.index("make test")].count("\n") < 25


def test_both_are_short() -> None:
    assert README.count("\n") <= 150
    assert CONTRIBUTING.count("\n") <= 70


def test_elements_recorded_are_those_of_the_goldens_and_the_lines_those_of_check() -> None:
    """The replay itself is tested with ``mlpdown check``."""
    goldens = [read_golden(file) for file in shipped_goldens()]
    results = [
        check.Result(golden.case.kind, "", golden.case.dtype, "numba", "cpu", True, 0, golden.case.hidden_dim, 0.0, 0.0, golden.gpu)
        for golden in goldens
    ]
    (shown,) = blocks("text")
    assert sorted(shown.splitlines()) == sorted(line.rstrip(".") for line in check.comparisons(results))


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("mlpdown ")])
def test_commands_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / CHECKPOINT
    folder.mkdir(parents=True)
    names = checkpoint.tensor_names(0)
    weight = torch.randn(64, 256, dtype=torch.float16)
    save_file(
        {names["weight"]: weight, names["bias"]: torch.zeros(64, dtype=torch.float16)}, folder / checkpoint.SINGLE_FILE
    )
    assert cli.main(shlex.split(command)[1:]) == 0


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?m)(?:^|`)make (\w+)", README + CONTRIBUTING))))
def test_make_targets_exist(target: str) -> None:
    process = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


def test_no_command_goes_unchecked() -> None:
    assert [command for command in COMMANDS if not command.startswith(("mlpdown ", "make "))] == []


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`(mlpdown [a-z][a-z 0-9]*)", README))))
def test_commands_in_the_text_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command.split()[1:], "--help"])
    assert stopped.value.code == 0
    assert "usage: mlpdown" in capsys.readouterr().out


def test_example_runs() -> None:
    """As a program of its own, to its end, and the two results agree to PyTorch's accuracy."""
    check = "\ntorch.testing.assert_close(out, specified, rtol=2**-8, atol=2**-5)\nassert out.shape == (1, hidden_dim)\n"
    check += "assert out.abs().mean() > 0.5\nprint('compared')\n"
    process = subprocess.run(
        [sys.executable, "-c", PYTHON[0] + check], capture_output=True, text=True, timeout=300, check=False
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == "compared\n"


def test_model_example_runs_on_a_tiny_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lines as they stand, with a small random model in place of the download."""
    transformers = pytest.importorskip("transformers")
    import mlpdown

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 32,
        "vocab_size": 64,
    }
    asked = []

    def from_pretrained(name: str, dtype: str) -> torch.nn.Module:
        asked.append((name, dtype))
        model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes)).to(getattr(torch, dtype))
        model.cuda = lambda: model
        return model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    exec(PYTHON[1], {"mlpdown": mlpdown})
    assert asked == [("EleutherAI/pythia-2.8b", "float16")]
    expected = next(line.split("#")[1].strip() for line in PYTHON[1].splitlines() if "#" in line)
    first, second = capsys.readouterr().out.splitlines()
    assert first == expected
    assert "one token takes backend 'torch'" in second


@pytest.mark.parametrize(("text", "at_least"), [(README, 15), (CONTRIBUTING, 30)], ids=["README", "CONTRIBUTING"])
def test_every_path_exists(text: str, at_least: int) -> None:
    paths = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r"`((?:mlpdown|native|reference|tests)/[\w./]*)`", text)
    assert len(paths) >= at_least
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_recipes_name_what_is_in_the_files_they_name() -> None:
    recipes = CONTRIBUTING[CONTRIBUTING.index("## A norm or an activation") :]
    source = "".join((ROOT / path).read_text() for path in re.findall(r"`([\w./]+/\w+\.\w+)`", recipes))
    names = re.findall(r"`(\w+)[`(]", recipes)
    assert len(names) >= 8
    assert [name for name in names if re.search(rf"\b{name}\b", source) is None] == []


def test_every_name_exists() -> None:
    import mlpdown
    import mlpdown.parallel

    names = sorted(set(re.findall(r"\bmlpdown\.(\w+)", README)))
    assert len(names) >= 5
    assert [name for name in names if not hasattr(mlpdown, name)] == []
    assert hasattr(mlpdown.parallel, "run_row_parallel") and "mlpdown.parallel.run_row_parallel" in README


# What stops a new user, and what to do about it. Neither the README nor doctor explains messages: they explain themselves.
REMEDIES = {
    "no CUDA compiler": "Install one",
    "no usable CUDA compiler": "brings one",
    "no C++ compiler": "apt install g++",
    "is not trusted: others can write": "chmod go-w",
    "this torch is built without CUDA": "install a CUDA build",
    "-byte aligned": "clone()",
    "has no derivative, and an argument has requires_grad": "torch.no_grad()",
}


@pytest.mark.parametrize("message", REMEDIES)
def test_a_message_says_what_to_do(message: str) -> None:
    found = [text for text in messages() if message in text]
    assert found, f"no message says {message!r}"
    assert [text for text in found if REMEDIES[message] not in text] == []


def messages() -> list[str]:
    """Every string of the package; of f-strings the constant parts."""
    strings = []
    for path in sorted((ROOT / "mlpdown").rglob("*.py")):
        tree = ast.parse(path.read_text())
        joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
        parts = {id(part) for node in joined for part in node.values}
        constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in parts]
        strings += ["".join(part.value for part in node.values if isinstance(part, ast.Constant)) for node in joined]
        strings += [node.value for node in constants if isinstance(node.value, str)]
    return strings


def test_environment_variables_are_all_there_are() -> None:
    in_readme = set(re.findall(r"MLPDOWN_[A-Z_]+", README))
    in_source: set[str] = set()
    for path in sorted((ROOT / "mlpdown").rglob("*.py")):
        in_source |= set(re.findall(r"[\"']MLPDOWN_[A-Z_]+[\"']", path.read_text()))
    assert in_readme == {name.strip("\"'") for name in in_source}
    assert len(in_readme) <= 3
    assert [name for name in HOST_VARIABLES if f"`{name}`" not in README] == []


def test_exit_statuses_are_the_command_lines() -> None:
    words = r"A command ends with 0, with (\d) if a promise is broken, (\d) if\s+anything else is wrong, (\d+) if interrupted"
    (sentence,) = re.findall(words, README)
    assert tuple(map(int, sentence)) == (cli.BROKEN, cli.NOT_SERVED, cli.INTERRUPTED)
