"""Everything that goes wrong with builds: each works, or gives a clear error; never a hang, never a stale library."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest

from mlpdown import cli
from mlpdown.build import BuildError, cache, compile, driver, library, report, sources, targets, toolchain

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


def test_waiting_for_another_build_says_so(fake_compilers: FakeCompilers, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache.create(folder)
    said: list[str] = []
    with cache.lock(folder, "key", said.append):
        other = start_python(
            "import sys; from pathlib import Path; from mlpdown.build import cache\n"
            f"with cache.lock(Path({str(folder)!r}), 'key', lambda text: print(text, flush=True)): print('mine', flush=True)"
        )
        assert other.stdout is not None
        line = other.stdout.readline()
        assert f"another process ({os.getpid()}) is building the library" in line
    out, _ = other.communicate(timeout=30)
    assert out.strip() == "mine"
    assert said == []


def test_lock_held_for_too_long_is_an_error_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LOCK_LIMIT_SECONDS", 0.3)
    cache.create(tmp_path / "cache")
    with (
        cache.lock(tmp_path / "cache", "key", print),
        pytest.raises(BuildError, match="another process has held"),
        cache.lock(tmp_path / "cache", "key", print),
    ):
        pass


def test_killed_build_leaves_nothing_in_the_way(fake_compilers: FakeCompilers, tmp_path: Path) -> None:
    fake_compilers.on_compile("sleep 3")
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
    assert time.monotonic() - started < 2.5
    assert not list((tmp_path / "cache").glob(".building-*"))


# Cache folders


def test_folder_that_cannot_be_written_is_named(fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPDOWN_CACHE_DIR", "/sys/mlpdown")  # not even for root
    with pytest.raises(BuildError, match=r"the cache folder /sys/mlpdown cannot be written.*MLPDOWN_CACHE_DIR"):
        library.build(ONE_TARGET)


def test_read_only_folder_still_serves_what_it_has(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = library.build(ONE_TARGET)

    def refuse(*arguments: object, **keywords: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    monkeypatch.setattr(os, "open", refuse)
    assert library.find_or_build().path == built.path
    with pytest.raises(BuildError, match="is on a read-only file system"):
        library.build(("sm_100",))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_while_publishing(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int
) -> None:
    def no_space(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", no_space)
        with pytest.raises(BuildError, match=r"has no space left.*MLPDOWN_CACHE_DIR"):
            library.build(ONE_TARGET)
    assert cache.entries(tmp_path / "cache") == []
    assert library.build(ONE_TARGET).origin == "built"


def test_full_disk_while_compiling(fake_compilers: FakeCompilers) -> None:
    fake_compilers.on_compile('echo "/tmp/x.s: fatal error: error writing: No space left on device" >&2; exit 1')
    with pytest.raises(BuildError, match="does not compile.*No space left on device"):
        library.build(ONE_TARGET)


def test_home_that_does_not_exist(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MLPDOWN_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    built = library.build(ONE_TARGET)
    assert built.path.parent.parent == tmp_path / f"mlpdown-{os.getuid()}"
    assert (tmp_path / f"mlpdown-{os.getuid()}").stat().st_mode & 0o777 == 0o700
    assert not (tmp_path / "nobody").exists()


def test_path_with_blanks_and_letters_of_any_kind(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "čache, with $PATH 'quotes' \"and\" ünïcode 漢字"
    monkeypatch.setenv("MLPDOWN_CACHE_DIR", str(folder))
    built = library.build(ONE_TARGET)
    assert built.path.is_relative_to(folder)
    assert library.find_or_build().path == built.path


def test_folder_is_private(fake_compilers: FakeCompilers, tmp_path: Path) -> None:
    library.build(ONE_TARGET)
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_folder_that_others_can_write_is_not_trusted(fake_compilers: FakeCompilers, tmp_path: Path, mode: int) -> None:
    library.build(ONE_TARGET)
    (tmp_path / "cache").chmod(mode)
    for use in (library.find, lambda: library.build(ONE_TARGET)):
        with pytest.raises(BuildError, match=r"not trusted: others can write to it .*chmod go-w"):
            use()


def test_folder_in_a_place_that_all_can_write_is_not_trusted(
    fake_compilers: FakeCompilers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)  # and not sticky: anybody could put another folder in its place
    monkeypatch.setenv("MLPDOWN_CACHE_DIR", str(tmp_path / "shared" / "cache"))
    with pytest.raises(BuildError, match="not trusted: anybody can write to"):
        library.build(ONE_TARGET)


def test_folder_of_somebody_else_is_not_trusted(
    fake_compilers: FakeCompilers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.build(ONE_TARGET)
    if os.getuid() == 0:
        os.chown(tmp_path / "cache", 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(BuildError, match="not trusted: it belongs to user id"):
        library.find()


def test_file_in_the_place_of_the_folder(fake_compilers: FakeCompilers, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(BuildError, match="is not a folder"):
        library.build(ONE_TARGET)


# Broken and stale libraries


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "gone"])
def test_corrupted_library_is_never_used(fake_compilers: FakeCompilers, damage: str) -> None:
    path = library.build(ONE_TARGET).path
    content = bytearray(path.read_bytes())
    if damage == "flipped byte":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncated":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    found, refusals = library.find()
    assert found is None
    assert any("corrupted" in refusal or "cannot be read" in refusal for refusal in refusals)
    assert library.find_or_build().origin == "built"
    assert library.find()[0] is not None


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"targets": 1}'])
def test_corrupted_manifest_is_no_entry(fake_compilers: FakeCompilers, text: str) -> None:
    built = library.build(ONE_TARGET)
    (built.path.parent / cache.MANIFEST_NAME).write_text(text)
    assert library.find()[0] is None
    assert library.build(ONE_TARGET).origin == "built"


def test_library_that_carries_another_hash_is_never_used(fake_compilers: FakeCompilers) -> None:
    built = library.build(ONE_TARGET)
    forged = built.path.read_bytes().replace(built.manifest.source_hash.encode(), b"0" * sources.HASH_DIGITS)
    built.path.write_bytes(forged)
    manifest = dataclasses.replace(built.manifest, checksum=cache.checksum(forged))
    (built.path.parent / cache.MANIFEST_NAME).write_text(manifest.to_json())
    found, refusals = library.find()
    assert found is None
    assert "the hash inside it is not that of the sources" in refusals[0]


def test_changed_source_is_built_anew(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = library.build(ONE_TARGET)
    copy = tmp_path / "native"
    shutil.copytree(sources.native_folder(), copy, ignore=shutil.ignore_patterns("prebuilt", "__pycache__"))
    with (copy / "launcher.cu").open("a") as file:
        file.write("\n")
    changed = sources.read_sources(copy)
    monkeypatch.setattr(library, "package_sources", lambda: changed)
    assert library.find()[0] is None
    second = library.find_or_build()
    assert second.origin == "built"
    assert second.manifest.source_hash == changed.source_hash != first.manifest.source_hash


def test_changed_instantiations_change_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sources.read_sources()
    monkeypatch.setattr(sources.plan, "instantiations", lambda: [(1, 1)])
    assert sources.read_sources().source_hash != before.source_hash


def test_changed_flag_is_built_anew(fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch) -> None:
    library.build(ONE_TARGET)
    monkeypatch.setattr(compile, "HOST_FLAGS", (*compile.HOST_FLAGS, "-g"))
    assert library.find_or_build().origin == "built"
    assert fake_compilers.num_compilations == 2


def test_changed_compiler_is_built_anew(fake_compilers: FakeCompilers) -> None:
    library.build(ONE_TARGET)
    fake_compilers.set_version("13.1.12")
    found, refusals = library.find()
    assert found is None
    assert "made by nvcc 13.0.88" in refusals[0]
    assert "here is nvcc 13.1.12" in refusals[0]
    assert library.find_or_build().origin == "built"


def test_cached_library_serves_where_there_is_no_compiler(fake_compilers: FakeCompilers) -> None:
    built = library.build(ONE_TARGET)
    fake_compilers.nvcc.unlink()
    assert library.find_or_build().path == built.path


def test_library_for_another_gpu_is_passed_over(fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compilers.set_report(names=("sm_90", "sm_120"))
    library.build(ONE_TARGET)
    monkeypatch.setattr(targets, "present_capabilities", lambda: [(12, 0)])
    found, refusals = library.find()
    assert found is None
    assert "holds sm_90, the GPU has compute capability 12.0" in refusals[0]
    fake_compilers.set_report(names=("sm_120",))
    assert library.find_or_build().manifest.targets == ("sm_120",)


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
    monkeypatch.setattr(driver, "supported_cuda", lambda: (12, 8))
    with pytest.raises(BuildError) as raised:
        library.find_or_build()
    message = str(raised.value)
    assert "its libraries would not run here: one made by CUDA 13.0, which needs driver 580 or newer" in message
    assert "the prebuilt library is not used: it was made by CUDA 13.0" in message
    assert "the installed driver supports CUDA 12.8" in message
    fake_compilers.set_version("12.8.93")
    assert library.find_or_build().manifest.cuda_version == (12, 8)


# Compilers


def test_no_compiler_anywhere_says_where_it_was_looked_for(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain, "_places", lambda: iter(()))
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
        ("#!/bin/sh\nexec sleep 60\n", "it did not answer --version"),
    ],
)
def test_nvcc_that_is_something_else(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    monkeypatch.setattr(toolchain, "_VERSION_SECONDS", 1)
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
    origins = [candidate.origin for candidate in toolchain.candidates()]
    assert [origin for origin in origins if origin != "/usr/local/cuda"] == ["CUDA_HOME", "PATH", "PyPI"]
    assert toolchain.find_toolchain().nvcc == homes[0] / "nvcc"
    (homes[0] / "nvcc").unlink()  # a CUDA_HOME that leads nowhere is passed over
    assert toolchain.find_toolchain().origin == "PATH"


def test_an_older_compiler_leaves_out_targets_it_does_not_know(fake_compilers: FakeCompilers) -> None:
    fake_compilers.set_version("12.8.93")
    fake_compilers.set_report(names=("sm_90", "sm_100", "sm_120"))
    assert library.build(targets.ALL_TARGETS).manifest.targets == ("sm_90", "sm_100", "sm_120", "compute_90")


# What the compilers say


def test_first_compiler_error_is_shown_and_no_traceback(
    fake_compilers: FakeCompilers, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fake_compilers.on_compile(
        'echo "launcher.cu(7): warning #177-D: declared but never referenced"; '
        'echo "mlp_down.cuh(12): error: identifier \\"nonsense\\" is undefined"; '
        'echo "mlp_down.cuh(13): error: a second one"; exit 2'
    )
    assert cli.main(["build", "--arch", "sm_90"]) == 1
    said = capsys.readouterr().err
    assert 'mlp_down.cuh(12): error: identifier "nonsense" is undefined' in said
    assert "a second one" not in said
    assert "Traceback" not in said
    log = tmp_path / "cache" / library.FAILURE_LOG
    assert str(log) in said
    assert "a second one" in log.read_text()


def test_spill_fails_the_build(fake_compilers: FakeCompilers) -> None:
    fake_compilers.set_report(stack_bytes=16, names=ONE_TARGET)
    with pytest.raises(
        BuildError, match=r"(?s)use local memory.*mlp_down<BFloat16, 1, 1> for sm_90: 16 bytes of stack"
    ):
        library.build(ONE_TARGET)
    assert library.find()[0] is None


def test_kernel_that_the_compiler_left_out_fails_the_build(fake_compilers: FakeCompilers) -> None:
    fake_compilers.set_report(names=("sm_100",))
    with pytest.raises(BuildError, match="reported 0 kernels for sm_90, 24 were to be compiled"):
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
    with pytest.raises(BuildError, match="does not load"):
        library.load()  # what the fake compilers make is no library


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["90"], ("sm_90",)),
        (["12.0", "sm_90", "compute_90", "9.0"], ("sm_90", "sm_120", "compute_90")),
        (["all"], targets.ALL_TARGETS),
    ],
)
def test_targets_of_the_command_line(names: list[str], expected: tuple[str, ...]) -> None:
    assert targets.parse_targets(names) == expected


@pytest.mark.parametrize("name", ["sm_80", "hopper", "sm_", "9", "sm_90a"])
def test_target_that_cannot_be(name: str) -> None:
    with pytest.raises(ValueError, match="arch must be"):
        targets.parse_targets([name])


@pytest.mark.parametrize(
    ("held", "capability", "expected"),
    [
        (("sm_90",), (9, 0), True),
        (("sm_90",), (10, 0), False),
        (("sm_90", "compute_90"), (11, 0), True),
        (("sm_100",), (10, 3), True),
        (("sm_103",), (10, 0), False),
        (("sm_120",), (12, 1), True),
        (("compute_120",), (9, 0), False),
    ],
)
def test_which_gpus_a_library_serves(held: tuple[str, ...], capability: tuple[int, int], expected: bool) -> None:
    assert targets.serves(held, capability) is expected


def test_report_is_read_from_what_ptxas_says() -> None:
    log = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z8mlp_downI7Float16Lj8ELj4EEv14MlpDownProblem11MlpDownPlan' for 'sm_90'
ptxas info    : Function properties for _Z8mlp_downI7Float16Lj8ELj4EEv14MlpDownProblem11MlpDownPlan
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 86 registers, used 1 barriers, 384 bytes smem, 16 bytes lmem
"""
    assert report.parse(log) == [report.KernelResources("sm_90", "mlp_down<Float16, 8, 4>", 86, 4, 12, 8, 16, 384)]
