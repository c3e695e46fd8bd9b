"""Cache folders and cached libraries that go wrong: each works, or gives a clear error; never a stale or foreign library."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from mlpdown.jit import BuildError, cache, compile, library, sources, targets

from .conftest import ONE_TARGET, FakeCompilers

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
    with pytest.raises(BuildError, match="cannot be written .*Read-only file system"):
        library.build(("sm_100",))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_while_publishing(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int
) -> None:
    def no_space(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", no_space)  # the manifest
        with pytest.raises(BuildError, match=os.strerror(code) + ".*MLPDOWN_CACHE_DIR"):
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
    monkeypatch.setattr(sources.plan, "instantiations", lambda: [(1, 1, 0)])
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
