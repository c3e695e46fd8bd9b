"""Processes, compilers and prebuilt libraries that go wrong: each works, or gives a clear error; never a hang."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from mlpdown import cli
from mlpdown.jit import BuildError, cache, library, targets, toolchain

from .conftest import BUILD_IN_A_PROCESS, ONE_TARGET, FakeCompilers, start_python


def test_second_build_takes_the_first_ones_library(fake_compilers: FakeCompilers) -> None:
    first = library.build(ONE_TARGET)
    second = library.build(ONE_TARGET)
    assert (first.origin, second.origin, first.path) == ("built", "cached", second.path)
    assert fake_compilers.num_compilations == 1
    assert library.find_or_build().path == first.path


def test_force_builds_again(fake_compilers: FakeCompilers) -> None:
    library.build(ONE_TARGET)
    assert library.build(ONE_TARGET, force=True).origin == "built"
    assert fake_compilers.num_compilations == 2


# Processes


def test_two_processes_at_once_build_once(fake_compilers: FakeCompilers) -> None:
    fake_compilers.on_compile("sleep 1.5")
    processes = [start_python(BUILD_IN_A_PROCESS) for _ in range(2)]
    outcomes = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outcomes
    assert sorted(out.strip() for out, _ in outcomes) == ["built", "cached"]
    assert fake_compilers.num_compilations == 1


def test_waiting_for_another_build_says_so(fake_compilers: FakeCompilers, capsys: pytest.CaptureFixture[str]) -> None:
    with cache.building_folder("key"):
        other = start_python(
            "from mlpdown.jit import cache\nwith cache.building_folder('key'): print('mine', flush=True)"
        )
        assert other.stderr is not None
        line = other.stderr.readline()
        assert f"another process ({os.getpid()}) is building key; waiting for it" in line
    out, _ = other.communicate(timeout=30)
    assert out.strip() == "mine"
    assert capsys.readouterr().err == ""


def test_lock_held_for_too_long_is_an_error_not_a_hang(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "LOCK_LIMIT_SECONDS", 0.3)
    with (
        cache.building_folder("key"),
        pytest.raises(BuildError, match="another process has held"),
        cache.building_folder("key"),
    ):
        pass


def test_killed_build_leaves_nothing_in_the_way(fake_compilers: FakeCompilers, tmp_path: Path) -> None:
    fake_compilers.on_compile("sleep 20")
    process = start_python(BUILD_IN_A_PROCESS)
    deadline = time.monotonic() + 30
    while fake_compilers.num_compilations == 0:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert list((tmp_path / "cache").glob(".building-*"))
    fake_compilers.on_compile("")
    started = time.monotonic()
    assert library.build(ONE_TARGET).origin == "built"
    assert time.monotonic() - started < 15  # and not when what the killed build left running ends
    assert not list((tmp_path / "cache").glob(".building-*"))


# The library that came with the package


def _make_prebuilt(built: library.LibraryInfo, folder: Path, **changes: object) -> Path:
    shutil.copytree(built.path.parent, folder)
    manifest = dataclasses.replace(built.manifest, **changes)
    (folder / cache.MANIFEST_NAME).write_text(manifest.to_json())
    return folder


def test_prebuilt_library_comes_first(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = _make_prebuilt(library.build(ONE_TARGET), tmp_path / "prebuilt")
    monkeypatch.setattr(library, "prebuilt_folder", lambda: folder)
    found = library.find_or_build()
    assert (found.origin, found.path.parent) == ("prebuilt", folder)


def test_prebuilt_library_of_other_sources_is_refused_and_says_so(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built = library.build(ONE_TARGET)
    folder = _make_prebuilt(built, tmp_path / "prebuilt", source_hash="f" * 64)
    monkeypatch.setattr(library, "prebuilt_folder", lambda: folder)
    found, refusals = library.find()
    assert found is not None
    assert found.origin == "cached"
    assert "the prebuilt library is not used: it was made from other sources (hash ffffffffffff" in refusals[0]


def test_old_driver_passes_over_newer_libraries_and_compilers(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = _make_prebuilt(library.build(ONE_TARGET), tmp_path / "prebuilt")
    monkeypatch.setattr(library, "prebuilt_folder", lambda: folder)
    monkeypatch.setattr(toolchain, "supported_cuda", lambda: (12, 8))
    with pytest.raises(BuildError) as raised:
        library.find_or_build()
    message = str(raised.value)
    assert "its libraries would not run here: CUDA 13.0 needs driver 580 or newer" in message
    assert "the prebuilt library is not used: CUDA 13.0 needs driver 580" in message
    assert "the installed driver supports CUDA 12.8" in message
    fake_compilers.set_version("12.8.93")
    assert library.find_or_build().manifest.cuda_version == (12, 8)


# Compilers


def test_no_compiler_anywhere_says_where_it_was_looked_for(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain, "_nvcc_places", lambda: iter(()))
    with pytest.raises(
        BuildError, match=r"no CUDA compiler: no nvcc in CUDA_HOME, on PATH.*pip install 'mlpdown\[nvcc\]'"
    ):
        library.find_or_build()


def test_nvcc_that_is_too_old(fake_compilers: FakeCompilers) -> None:
    fake_compilers.set_version("12.4.131")
    with pytest.raises(BuildError, match=r"(?s)nvcc 12\.8 or newer is needed; pip install.*it is too old: 12\.4\.131"):
        library.find_or_build()


def test_nvcc_that_is_not_there(fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPDOWN_NVCC", "/nowhere/nvcc")
    with pytest.raises(BuildError, match=r"/nowhere/nvcc \(MLPDOWN_NVCC\): there is no such file"):
        library.find_or_build()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("#!/bin/sh\necho hello\n", "its --version is not nvcc's: 'hello'"),
        ("#!/bin/sh\necho broken install >&2; exit 3\n", "--version ended with status 3: broken install"),
        ("#!/no/such/interpreter\n", "it cannot be run"),
        ("#!/bin/sh\nexec sleep 60\n", "it did not answer in 1 s"),
    ],
)
def test_nvcc_that_is_something_else(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    monkeypatch.setattr(toolchain, "_ANSWER_SECONDS", 1)
    fake_compilers.nvcc.write_text(script)
    with pytest.raises(BuildError, match=said):
        library.find_or_build()


def test_nvcc_without_a_host_compiler(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("sh", "cat", "dirname"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"no C\+\+ compiler: nvcc needs one of g\+\+.*apt install g\+\+"):
        library.find_or_build()


def test_places_in_order(fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    homes = [tmp_path / "toolkit" / "bin", tmp_path / "site" / "nvidia" / "cu13" / "bin"]
    for home in homes:
        shutil.copytree(fake_compilers.folder, home)
    monkeypatch.delenv("MLPDOWN_NVCC")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(__import__("sys").modules, "nvidia", raising=False)
    origins = [compiler.origin for compiler in toolchain.nvcc_compilers()]
    assert [origin for origin in origins if origin != "/usr/local/cuda"] == ["CUDA_HOME", "PATH", "PyPI"]
    assert toolchain.find_toolchain().nvcc == homes[0] / "nvcc"
    (homes[0] / "nvcc").unlink()  # a CUDA_HOME that leads nowhere is passed over
    assert toolchain.find_toolchain().origin == "PATH"


def test_an_older_compiler_leaves_out_targets_it_does_not_know(fake_compilers: FakeCompilers) -> None:
    fake_compilers.set_version("12.8.93")
    known = tuple(target for target in targets.MACHINE_TARGETS if target != "sm_103")
    fake_compilers.set_report(names=known)
    assert library.build(targets.ALL_TARGETS).manifest.targets == (*known, targets.PTX_TARGET)


# What the compilers say


def test_first_compiler_error_is_shown_and_no_traceback(
    fake_compilers: FakeCompilers, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fake_compilers.on_compile(
        'echo "launcher.cu(7): warning #177-D: declared but never referenced"; '
        'echo "mlp_down.cuh(12): error: identifier \\"nonsense\\" is undefined"; '
        'echo "mlp_down.cuh(13): error: a second one"; exit 2'
    )
    assert cli.main(["build", "--arch", "sm_90"]) == 2
    said = capsys.readouterr().err
    assert 'mlp_down.cuh(12): error: identifier "nonsense" is undefined' in said
    assert "a second one" not in said
    assert "Traceback" not in said
    log = tmp_path / "cache" / library.FAILURE_LOG
    assert str(log) in said
    assert "a second one" in log.read_text()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 3", "the compiler said nothing"),
        ("echo '[1/3] no rhyme'; echo; echo 'and no reason'; exit 1", "and no reason"),
        ("kill -9 $$", "(Killed|the compiler said nothing)"),  # shells differ
    ],
)
def test_what_ninja_says_is_not_taken_for_a_compilers(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, said: str
) -> None:
    for variable, value in (("CLICOLOR_FORCE", "1"), ("NINJA_STATUS", "error: ")):
        monkeypatch.setenv(variable, value)
    shutil.copytree(fake_compilers.folder, tmp_path / "error: a $folder 'of' errors")
    monkeypatch.setenv("MLPDOWN_NVCC", str(tmp_path / "error: a $folder 'of' errors" / "nvcc"))
    assert library.build(ONE_TARGET).origin == "built"
    (tmp_path / "error: a $folder 'of' errors" / "on-compile.sh").write_text(script)
    with pytest.raises(BuildError, match=rf"does not compile \(.*\): {said}\nThe whole output: .*$"):
        library.build(ONE_TARGET, force=True)


def test_spill_fails_the_build(fake_compilers: FakeCompilers) -> None:
    fake_compilers.set_report(stack_bytes=16, names=ONE_TARGET)
    with pytest.raises(
        BuildError, match=r"(?s)use local memory.*registers<BFloat16, .*> for sm_90: 16 bytes of stack"
    ):
        library.build(ONE_TARGET)
    assert library.find()[0] is None


def test_kernel_that_the_compiler_left_out_fails_the_build(fake_compilers: FakeCompilers) -> None:
    fake_compilers.set_report(names=("sm_100",))
    with pytest.raises(BuildError, match=r"reported 0 kernels for sm_90, \d+ were to be compiled"):
        library.build(ONE_TARGET)


def test_a_failure_is_remembered(fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setattr(library, "_failure", None)
    fake_compilers.on_compile("exit 1")
    for _ in range(2):
        with pytest.raises(BuildError, match="does not compile"):
            library.load()
    assert fake_compilers.num_compilations == 1


def test_library_that_does_not_load_is_a_build_error(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setattr(library, "_failure", None)
    with pytest.raises(BuildError, match="the native library cannot be found, built or loaded: .*libmlpdown.so"):
        library.load()  # what the fake compilers make is no library
