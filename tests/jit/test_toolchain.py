"""What the environment says of compilers and folders: it never changes what is built, and what cannot be used says why."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
import zipfile
from pathlib import Path

import pytest

from mlpdown import backends, cli, native_backend, plan
from mlpdown.jit import BuildError, cache, compile, library, program, sources, toolchain

from .conftest import BUILD_IN_A_PROCESS, ONE_TARGET, FakeCompilers, start_python

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setattr(library, "_failure", None)


# Flags from the environment


@pytest.mark.parametrize("variable", toolchain.IGNORED_VARIABLES)
def test_flags_of_the_environment_reach_no_compiler(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    seen = tmp_path / "seen"
    look = f'echo "flags:$NVCC_APPEND_FLAGS$NVCC_PREPEND_FLAGS$CCC_OVERRIDE_OPTIONS" >> {seen}'
    fake_compilers.on_compile(look)
    fake_compilers.on_trial(look)
    plain = library.build(ONE_TARGET)
    monkeypatch.setenv(variable, "-use_fast_math")
    assert library.build(ONE_TARGET).path == plain.path  # the same key, and rightly
    again = library.build(ONE_TARGET, force=True)
    assert again.manifest.checksum == plain.manifest.checksum
    assert set(seen.read_text().splitlines()) == {"flags:"}


@pytest.mark.parametrize("variable", toolchain.IGNORED_VARIABLES)
def test_nvcc_itself_does_not_see_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str) -> None:
    monkeypatch.setenv("MLPDOWN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv(variable, "--no-such-flag")
    files = {"empty.cu": b"__global__ void kernel(float* x) { x[0] *= 2.0f; }\n"}
    assert program.compile_cuda("flags", files, ["empty.cu"], shared=True, built_targets=ONE_TARGET).is_file()


# Finding nvcc and its host compiler


def test_nvcc_behind_links_is_run_where_it_lies(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It looks for its headers beside the name that it is called by; the fake one for its version."""
    (tmp_path / "alternatives").mkdir()
    (tmp_path / "alternatives" / "nvcc").symlink_to(fake_compilers.nvcc)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(tmp_path / "alternatives" / "nvcc")
    monkeypatch.setenv("MLPDOWN_NVCC", str(tmp_path / "bin" / "nvcc"))
    assert toolchain.find_toolchain().nvcc == fake_compilers.nvcc
    assert library.build(ONE_TARGET).origin == "built"


def test_link_to_a_program_that_goes_by_its_name_stays_a_link(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launcher = tmp_path / "launcher"  # as ccache does
    launcher.write_text(f'#!/bin/sh\n[ "$(basename "$0")" = nvcc ] || exit 7\nexec {fake_compilers.nvcc} "$@"\n')
    launcher.chmod(0o755)
    (tmp_path / "nvcc").symlink_to(launcher)
    monkeypatch.setenv("MLPDOWN_NVCC", str(tmp_path / "nvcc"))
    assert toolchain.find_toolchain().nvcc == tmp_path / "nvcc"
    assert library.build(ONE_TARGET).origin == "built"


@pytest.mark.parametrize("damage", ["loop", "dangling", "relative"])
def test_place_of_nvcc_that_is_odd(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if damage == "relative":
        monkeypatch.setenv("MLPDOWN_NVCC", "compilers/nvcc")
        monkeypatch.setenv("CXX", "compilers/g++")
        assert library.build(ONE_TARGET).origin == "built"
        return
    (tmp_path / "nvcc").symlink_to("nvcc" if damage == "loop" else "nowhere")
    monkeypatch.setenv("MLPDOWN_NVCC", str(tmp_path / "nvcc"))
    with pytest.raises(BuildError, match=r"nvcc \(MLPDOWN_NVCC\): there is no such file"):
        library.find_or_build()


def test_nvcc_that_does_not_find_its_headers_is_passed_over(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "toolkit" / "bin"
    shutil.copytree(fake_compilers.folder, broken)
    (broken / "on-trial.sh").write_text('echo "1 | fatal error: cuda_runtime.h: No such file or directory" >&2; exit 1')
    monkeypatch.delenv("MLPDOWN_NVCC")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert toolchain.find_toolchain().nvcc == fake_compilers.nvcc
    monkeypatch.setenv("MLPDOWN_NVCC", str(broken / "nvcc"))
    with pytest.raises(BuildError, match=r"with .*g\+\+ \(PATH\): a trial ended with status 1: .*cuda_runtime\.h: No such file"):
        library.find_or_build()


@pytest.mark.parametrize("variable", toolchain.HOST_VARIABLES)
@pytest.mark.parametrize("as_folder", [False, True])
def test_host_compiler_can_be_named(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, as_folder: bool
) -> None:
    other = tmp_path / "other" / "g++"
    other.parent.mkdir()
    other.write_text((fake_compilers.folder / "g++").read_text().replace("(fake)", "(other)"))
    other.chmod(0o755)
    monkeypatch.setenv(variable, str(other.parent if as_folder else other))
    tools = toolchain.find_toolchain()
    assert (tools.host_compiler, tools.host_version) == (other, "g++ (other) 12.2.0")
    assert library.build(ONE_TARGET).manifest.compiler == "nvcc 13.0.88, g++ (other) 12.2.0"


@pytest.mark.parametrize("named", ["/nowhere/g++", "no-such-compiler", "g++ -O2", ""])
def test_named_host_compiler_that_is_not_there_is_passed_over_and_named(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    monkeypatch.setenv("CUDAHOSTCXX", named)
    assert toolchain.find_toolchain().host_compiler == fake_compilers.folder / "g++"
    monkeypatch.setattr(toolchain, "HOST_COMPILERS", ())
    expected = f"with {named} (CUDAHOSTCXX): there is no such file" if named else r"no C++ compiler: nvcc needs one of"
    with pytest.raises(BuildError) as raised:
        toolchain.find_toolchain()
    assert expected in str(raised.value)


def test_host_compiler_that_nvcc_refuses_is_passed_over(fake_compilers: FakeCompilers) -> None:
    shutil.copy(fake_compilers.folder / "g++", fake_compilers.folder / "c++")
    fake_compilers.on_trial(
        'case "$1" in *g++) echo "#error -- unsupported GNU version! gcc versions later than 15 are not supported!" >&2; exit 1 ;; esac'
    )
    assert toolchain.find_toolchain().host_compiler == fake_compilers.folder / "c++"
    (fake_compilers.folder / "c++").unlink()


# ninja


def _write_ninja(folder: Path, script: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "ninja"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_ninja_of_its_wheel_builds_then_the_one_on_path(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = toolchain.find_ninja()
    wheels = _write_ninja(tmp_path / "wheel", f'echo "$@" >> {tmp_path}/called; exec {real} "$@"')
    on_path = _write_ninja(fake_compilers.folder, f'exec {real} "$@"')
    monkeypatch.setitem(sys.modules, "ninja", types.SimpleNamespace(BIN_DIR=str(wheels.parent)))
    library.build(ONE_TARGET)
    assert (tmp_path / "called").read_text() == "--version\n\n"  # asked once, run once
    wheels.write_text("#!/no/such/interpreter\n")
    assert [(ninja.origin, ninja.path) for ninja in toolchain.ninjas()] == [("PyPI", wheels), ("PATH", on_path)]
    assert toolchain.find_ninja() == on_path
    for module in (types.SimpleNamespace(BIN_DIR=""), types.SimpleNamespace(), None):  # not found, of that name, not installed
        monkeypatch.setitem(sys.modules, "ninja", module)
        assert [ninja.path for ninja in toolchain.ninjas()] == [on_path]


def test_without_ninja_nothing_is_built_and_it_says_so(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = library.build(ONE_TARGET)
    monkeypatch.setattr(toolchain, "ninjas", lambda: iter(()))
    assert library.build(ONE_TARGET).path == built.path
    fake_compilers.set_version("13.1.12")  # nothing builds here, so what another compiler made is as good
    assert library.find_or_build().path == built.path
    built.path.unlink()
    with pytest.raises(BuildError, match=r"^no ninja, which runs the compilers: pip install ninja\n.*passed over:\n.*cannot be read"):
        library.find_or_build()
    assert cli.main(["build", "--arch", "sm_90"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("no ninja, which runs the compilers: pip install ninja")
    assert fake_compilers.num_compilations == 1


def test_ninja_that_does_not_run_is_named(fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ninja", None)
    path = _write_ninja(fake_compilers.folder, "echo GLIBC_2.99 not found; exit 1")
    with pytest.raises(BuildError) as raised:
        library.find_or_build()
    said = f"  {path} (PATH): --version ended with status 1: GLIBC_2.99 not found"
    assert str(raised.value).splitlines() == ["no ninja, which runs the compilers: pip install ninja", said]


def test_ninjas_own_error_is_shown(fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "_RULES", {".cu": "no-such-rule"})
    with pytest.raises(BuildError, match=r"does not compile .*: ninja: error: build\.ninja:\d+: unknown build rule 'no-such-rule'"):
        library.build(ONE_TARGET)


# Folders


def test_temporary_folder_that_is_not_there_keeps_nothing_from_being_built(tmp_path: Path) -> None:
    code = (
        "from mlpdown.jit import program\n"
        "files = {'empty.cu': b'__global__ void kernel() {}'}\n"
        "print(program.compile_cuda('tmpdir', files, ['empty.cu'], shared=True, built_targets=('sm_90',)))"
    )
    process = start_python(code, TMPDIR=str(tmp_path / "nowhere"), MLPDOWN_CACHE_DIR=str(tmp_path / "cache"))
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0 and Path(out.strip()).is_file(), error


@pytest.mark.parametrize("access", ["may not be entered", "may not be written"])
def test_home_that_cannot_be_used(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, access: str
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    isdir, may = os.path.isdir, os.access
    monkeypatch.delenv("MLPDOWN_CACHE_DIR")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if access == "may not be entered":  # os.path.isdir does not see what it may not look at
        monkeypatch.setattr(os.path, "isdir", lambda path: not str(path).startswith(str(home)) and isdir(path))
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == home and mode & os.W_OK) and may(path, mode))
    assert library.build(ONE_TARGET).path.is_relative_to(tmp_path / f"mlpdown-{os.getuid()}")
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("named", ["~no-such-user-here/x", "~no-such-user-here"])
def test_folder_of_nobody_is_a_reason_not_a_traceback(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    monkeypatch.setenv("MLPDOWN_CACHE_DIR", named)
    _native_says(monkeypatch, rf"the cache folder {named} cannot be: .*MLPDOWN_CACHE_DIR")


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), FileNotFoundError(2, "gone"), OSError(5, "I/O error")])
def test_file_that_cannot_be_read_is_a_reason_not_a_traceback(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def refuse() -> None:
        raise error

    monkeypatch.setattr(library, "package_sources", refuse)
    _native_says(monkeypatch, f"the native library cannot be found, built or loaded: .*{error.strerror}")


def _native_says(monkeypatch: pytest.MonkeyPatch, match: str) -> None:
    """The state of the native backend, on a machine with a GPU."""
    import re

    import torch

    native_backend.load.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(native_backend, "device_properties", lambda index: plan.H200)
    state = backends()["native"]
    assert not state.available and re.search(match, state.reason), state.reason


def test_package_in_a_zip_file(tmp_path: Path) -> None:
    archive = tmp_path / "mlpdown.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for folder, place in (("mlpdown", "mlpdown"), ("native", "mlpdown/native"), ("reference", "mlpdown/reference")):
            for path in (ROOT / folder).rglob("*"):
                if path.is_file() and "__pycache__" not in path.parts:
                    file.write(path, f"{place}/{path.relative_to(ROOT / folder)}")
    code = (
        f"import sys; sys.path.insert(0, {str(archive)!r})\n"
        "import mlpdown; from mlpdown import check; from mlpdown.jit import BuildError, library\n"
        "assert '.zip' in mlpdown.__file__\n"
        "try: library.load()\n"
        "except BuildError as error: print(error)\n"
        "print({name: state.available for name, state in mlpdown.backends().items()})\n"
        "trials, broken = check.recorded_trials(largest=1 << 16)\n"
        "print(broken, check.run_trial(next(trials), ['numba'])[1])\n"
    )
    process = start_python(code, CUDA_VISIBLE_DEVICES="")
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert "the native sources must be files in a folder" in out.splitlines()[0]
    assert out.splitlines()[1:] == ["{'native': False, 'numba': True, 'torch': True}", "[] []"]


def test_prebuilt_library_without_a_manifest_is_passed_over(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "prebuilt").mkdir()
    (tmp_path / "prebuilt" / cache.LIBRARY_NAME).write_bytes(b"")
    monkeypatch.setattr(library, "prebuilt_folder", lambda: tmp_path / "prebuilt")
    for text in (None, "", "{}"):
        if text is not None:
            (tmp_path / "prebuilt" / cache.MANIFEST_NAME).write_text(text)
        assert "the prebuilt library is not used: its manifest cannot be read" in library.find()[1][0]
    assert library.find_or_build().origin == "built"


# The build command


def test_installed_library_is_enough(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = library.build(ONE_TARGET)
    shutil.copytree(built.path.parent, tmp_path / "prebuilt")
    monkeypatch.setattr(library, "prebuilt_folder", lambda: tmp_path / "prebuilt")
    fake_compilers.nvcc.unlink()
    for words in ([], ["--arch", "sm_90"]):
        assert cli.main(["build", *words]) == 0
        assert "The prebuilt library has sm_90: nothing to build.\n" in capsys.readouterr().out
    for words in (["--arch", "sm_100"], ["--force"]):
        assert cli.main(["build", *words]) == 2
        assert "there is no such file" in capsys.readouterr().err


def test_report_has_a_line_for_each_kernel(fake_compilers: FakeCompilers, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["build", "--report"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) - 2 == library.num_kernels(sources.read_sources())
    assert lines[2].split()[:4] == ["sm_90", "64", "0", "0"]


def _has_ended(pid: str) -> bool:
    """Whether a process is gone, or waits to be taken note of."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("stubborn", [False, True])
def test_interrupted_build_ends_at_once_with_all_it_started(fake_compilers: FakeCompilers, tmp_path: Path, stubborn: bool) -> None:
    """Compilers that ignore the signal to end, too."""
    started_compilers = tmp_path / "pids"
    tell = f"sleep 30 & echo $$ $! > {started_compilers}.new; mv {started_compilers}.new {started_compilers}; wait"
    fake_compilers.on_compile(f"trap '' INT TERM; {tell}" if stubborn else tell)
    process = subprocess.Popen(
        [sys.executable, "-m", "mlpdown", "build"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    while not started_compilers.exists():
        assert process.poll() is None
        time.sleep(0.02)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=20)
    assert time.monotonic() - started < 4
    assert (process.returncode, out) == (130, "")
    assert said.splitlines()[1:] == ["mlpdown build: interrupted"]
    pids = started_compilers.read_text().split()
    assert len(pids) == 2 and all(map(_has_ended, pids))
    assert not list((tmp_path / "cache").glob(".building-*"))


@pytest.mark.parametrize(("grace", "num_interrupts"), [(0.5, 1), (60.0, 2)])
def test_ninja_that_does_not_end_is_killed(fake_compilers: FakeCompilers, tmp_path: Path, grace: float, num_interrupts: int) -> None:
    """After a while, or when Ctrl-C is pressed again."""
    pids = tmp_path / "pids"
    ninja = _write_ninja(
        tmp_path / "wheel", f'trap "" INT TERM; [ "$1" ] && exit 0; sleep 30 & echo $$ $! > {pids}.new; mv {pids}.new {pids}; wait'
    )
    process = start_python(
        f"import sys, types; sys.modules['ninja'] = types.SimpleNamespace(BIN_DIR={str(ninja.parent)!r})\n"
        f"from mlpdown.jit import compile; compile._GRACE_SECONDS = {grace}\n{BUILD_IN_A_PROCESS}"
    )
    while not pids.exists():
        assert process.poll() is None
        time.sleep(0.02)
    started = time.monotonic()
    for _ in range(num_interrupts):
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    process.communicate(timeout=20)
    assert time.monotonic() - started < 10
    assert process.returncode == -signal.SIGINT
    assert len(pids.read_text().split()) == 2 and all(map(_has_ended, pids.read_text().split()))


def test_first_compiler_that_fails_ends_the_others(fake_compilers: FakeCompilers, tmp_path: Path) -> None:
    fake_compilers.on_compile(f"echo $$ > {tmp_path}/pid; exec sleep 30")
    host = fake_compilers.folder / "g++"
    wait = f"until [ -s {tmp_path}/pid ]; do sleep 0.02; done"
    host.write_text(host.read_text().replace('cp "$input" "$output"', f'{wait}; echo "$input:1:1: error: no"; exit 1'))
    started = time.monotonic()
    with pytest.raises(BuildError, match=r"does not compile .*(op|source_hash)\.cpp:1:1: error: no"):
        library.build(ONE_TARGET)
    assert time.monotonic() - started < 10
    assert _has_ended((tmp_path / "pid").read_text().strip())


def test_compilers_that_never_end_are_ended(fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "LIMIT_SECONDS", 0.5)
    fake_compilers.on_compile("sleep 30")
    with pytest.raises(BuildError, match="does not compile .*no end in 0 s"):
        library.build(ONE_TARGET)
