"""The README is executed: its commands run, its examples run, its paths exist, its messages are the program's."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mlpdown import checkpoint, cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CHECKPOINT = "path/to/checkpoint"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


COMMANDS = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines() if line.strip()]
PYTHON = blocks("python")


def test_readme_leads_with_the_two_commands() -> None:
    assert COMMANDS[:2] == ["make demo", "make test"]
    assert README.index("make test") < 1500


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


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake (\w+)", README))))
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
    process = subprocess.run(
        [sys.executable, "-c", PYTHON[0] + check], capture_output=True, text=True, timeout=300, check=False
    )
    assert process.returncode == 0, process.stderr
    assert [line.split()[0] for line in process.stdout.splitlines()] == ["native", "numba", "torch"]


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
    assert capsys.readouterr().out.splitlines()[0] == expected


def test_every_path_exists() -> None:
    linked = re.findall(r"\]\(([^)#]+)\)", README)
    named = re.findall(r"`((?:mlpdown|native|reference|tests)/[\w./]*)`", README)
    assert len(linked) >= 5
    assert [path for path in linked + named if not (ROOT / path).exists()] == []


def test_every_name_exists() -> None:
    import mlpdown

    names = sorted(set(re.findall(r"\bmlpdown\.(\w+)", README)))
    assert len(names) >= 5
    assert [name for name in names if not hasattr(mlpdown, name)] == []


def test_remedies_are_for_messages_that_exist() -> None:
    table = README[README.index("| it says |") :].split("\n\n")[0]
    messages = [row.split("`")[1] for row in table.splitlines()[2:]]
    assert len(messages) >= 8
    # Braces of f-strings stand for whatever the README's example puts there.
    source = "\n".join(path.read_text() for path in sorted((ROOT / "mlpdown").rglob("*.py")))
    missing = []
    for message in messages:
        pieces = [piece for piece in re.split(r"\d+(?:\.\d+)?", message) if len(piece.strip("-. ")) > 3]
        if not all(piece in source for piece in pieces):
            missing.append(message)
    assert missing == []


def test_environment_variables_are_all_there_are() -> None:
    in_readme = set(re.findall(r"MLPDOWN_[A-Z_]+", README))
    in_source: set[str] = set()
    for path in sorted((ROOT / "mlpdown").rglob("*.py")):
        in_source |= set(re.findall(r"[\"']MLPDOWN_[A-Z_]+[\"']", path.read_text()))
    assert in_readme == {name.strip("\"'") for name in in_source}
    assert len(in_readme) <= 3


def test_figures_have_their_place() -> None:
    assert README.count("<!-- figures:begin -->") == README.count("<!-- figures:end -->") == 1
    assert README.index("<!-- figures:begin -->") < README.index("<!-- figures:end -->")
