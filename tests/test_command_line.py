"""The command line as a shell sees it: exit statuses, one line on standard error, whatever becomes of its streams."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlpdown import cli, doctor
from mlpdown.jit import BuildError

MLPDOWN = [sys.executable, "-m", "mlpdown"]
SMALL_CHECK = ["check", "--hidden-dim", "64", "--intermediate-dim", "128", "--dtype", "float16"]

# A command that prints much, in letters of many kinds and with rich, and ends with the status that it is given.
_TALKER = """
import sys
from mlpdown import cli
class Talker:
    def add_arguments(parser): parser.add_argument("status", type=int)
    def main(arguments):
        from rich.console import Console
        Console(width=20).print("x" * 30, "ümlaut 漢字 😀", no_wrap=True, overflow="ellipsis")
        print(*["ümlaut 漢字 😀"] * 20000, sep="\\n")
        return arguments.status
sys.modules["talker"] = Talker
cli.COMMANDS["talk"] = ("talker", "talk")
sys.exit(cli.main())
"""


def talk(status: int, shell: str, **environment: str) -> tuple[int, bytes, str]:
    """The talker's exit status, and what came out of the shell's line: ``shell`` stands behind the command, e.g. ``| head -1``."""
    process = subprocess.run(
        ["bash", "-c", f'"$@" {shell}; exit ${{PIPESTATUS[0]}}', "bash", sys.executable, "-c", _TALKER, "talk", str(status)],
        capture_output=True,
        env={**os.environ, **environment},
        timeout=60,
        check=False,
    )
    return process.returncode, process.stdout, process.stderr.decode()


@pytest.mark.parametrize(("status", "shell"), [(0, "| head -1"), (1, "2>&1 | head -c 1"), (1, "| (exec <&-; sleep 0.1)")])
def test_reader_that_leaves_does_not_change_the_status(status: int, shell: str) -> None:
    assert talk(status, shell)[::2] == (status, "")


def test_closed_streams_do_not_change_the_status() -> None:
    assert talk(1, "<&- >&- 2>&-") == (1, b"", "")


def test_full_disk_is_status_2_and_one_line() -> None:
    assert talk(0, ">/dev/full") == (2, b"", "mlpdown talk: [Errno 28] No space left on device\n")
    process = subprocess.run(["bash", "-c", '"$@" >/dev/full', "bash", *MLPDOWN, "--version"], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (2, "mlpdown: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("encoding", ["ascii", "cp437"])
def test_every_character_can_be_printed_in_every_encoding(encoding: str) -> None:
    status, out, error = talk(0, "", PYTHONIOENCODING=encoding)
    assert (status, error) == (0, "")
    assert "ümlaut 漢字 😀".encode(encoding, errors="backslashreplace") in out


def test_check_into_head_is_status_0_and_alone_prints_the_help() -> None:
    process = subprocess.run(
        ["bash", "-c", '"$@" | head -3; exit ${PIPESTATUS[0]}', "bash", *MLPDOWN, *SMALL_CHECK], capture_output=True, text=True, check=False
    )
    assert (process.returncode, process.stderr, len(process.stdout.splitlines())) == (0, "", 3)
    process = subprocess.run(MLPDOWN, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (0, "")
    for command in cli.COMMANDS:
        assert f"\n    {command} " in process.stdout


def test_path_that_is_no_text_is_named() -> None:
    process = subprocess.run([*MLPDOWN, "check", "--model", b"/no\xff\xfe"], capture_output=True, check=False)
    assert process.returncode == 2
    assert process.stderr.startswith(b"mlpdown check: /no\\udcff\\udcfe is not there") and process.stderr.count(b"\n") == 1


def test_interrupt_is_status_130_at_once() -> None:
    process = subprocess.Popen(
        [*MLPDOWN, "check", "--hidden-dim", "8192", "--intermediate-dim", "8192"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while "llvmlite" not in maps.read_text():  # torch and the command are imported, numba is at work
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "mlpdown check: interrupted\n")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("library", ["libtorch_cpu", "libtorch_python"])
@pytest.mark.parametrize("command", [MLPDOWN, [str(Path(sys.executable).with_name("mlpdown"))]], ids=["module", "script"])
def test_interrupt_while_torch_is_imported_is_status_130_without_a_traceback(command: list[str], library: str) -> None:
    process = subprocess.Popen([*command, "check"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    while library not in maps.read_text():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=30)
    assert (process.returncode, out, said) == (130, "", "mlpdown: interrupted\n")


def test_interrupt_while_others_import_the_package_is_theirs() -> None:
    code = "import signal, mlpdown; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("words", [["nonsense"], ["--nonsense"], ["build", "--nonsense"], ["check", "--dtype", "float64"]])
def test_wrong_usage_is_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        cli.main(words)
    assert exit_status.value.code == 2
    assert capsys.readouterr().err.startswith("usage: mlpdown")


@pytest.mark.parametrize(("value", "status"), [("", 0), ("DEBUG", 0), ("info", 0), ("loud", 2), ("10", 2)])
def test_log_level_of_the_environment(
    value: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLPDOWN_LOG", value)
    assert cli.main([]) == status
    said = f"mlpdown: MLPDOWN_LOG must be one of debug, info, warning, error, critical, got '{value}'\n"
    assert capsys.readouterr().err == (said if status else "")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError("no room"), "mlpdown doctor: MemoryError: no room (MLPDOWN_LOG=debug shows where)\n"),
        (RuntimeError("first line\nsecond"), "mlpdown doctor: RuntimeError: first line (MLPDOWN_LOG=debug shows where)\n"),
        (KeyError(), "mlpdown doctor: KeyError:  (MLPDOWN_LOG=debug shows where)\n"),
        (BuildError("no compiler"), "mlpdown doctor: no compiler\n"),
        (PermissionError(13, "Permission denied", "/x"), "mlpdown doctor: [Errno 13] Permission denied: '/x'\n"),
    ],
)
def test_whatever_goes_wrong_is_status_2_and_one_line(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(doctor, "examine", fail)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == words
