"""The receipt of a GPU: stages end, whatever runs in them; what they leave is read; the README's figures come from receipts."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from mlpdown import receipt, receipt_stages
from mlpdown.bench import e2e_report
from mlpdown.bench.e2e_passes import Passes
from mlpdown.bench.e2e_timing import Pair
from mlpdown.bench.results import Report, Result
from mlpdown.receipt_readme import BEGIN, END, README, RECEIPTS, figures, update_readme, with_figures
from mlpdown.receipt_stages import STAGES, Stage, read_junit, run_stage, summarize

REPOSITORY = Path(__file__).parent.parent.parent

JUNIT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.gpu.test_hazard" name="test_default">
<properties><property name="calls_with_stale_bits" value="0"/></properties></testcase>
<testcase classname="tests.gpu.test_hazard" name="test_prefetch"><failure message="assert 0 &gt; 0&#10;more"/></testcase>
<testcase classname="tests.gpu.test_bits" name="test_skipped"><skipped message="no second GPU"/></testcase>
</testsuite></testsuites>"""


def stage(code: str, limit_seconds: float = 30) -> Stage:
    return Stage(limit_seconds, lambda folder: [sys.executable, "-c", code], lambda folder: {"found": 1})


def test_stage_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); print('begun', flush=True); time.sleep(60)"
    begin = time.monotonic()
    outcome = run_stage(stage(code, 1.0), tmp_path / "hangs", tmp_path)
    assert outcome.verdict == "timed out" and "begun" in outcome.log_tail
    assert time.monotonic() - begin < 3
    time.sleep(3.5)
    assert not mark.exists(), "the stage's own child went on"


def test_stage_that_hangs_can_end_what_it_has_put_into_other_sessions(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(4); open({str(mark)!r}, 'w')"
    code = (
        f"import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
        "try:\n    child.wait()\nexcept BaseException:\n    child.kill()\n    raise\n"
    )
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background
    try:
        assert run_stage(stage(code, 1.0), tmp_path / "hangs", tmp_path).verdict == "timed out"
    finally:
        signal.signal(signal.SIGINT, before)
    time.sleep(4)
    assert not mark.exists(), "the child in a session of its own went on"


def test_stage_that_fails_keeps_the_end_of_its_log(tmp_path: Path) -> None:
    outcome = run_stage(stage("raise SystemExit('the reason')"), tmp_path / "fails", tmp_path)
    assert outcome.verdict == "failed" and "the reason" in outcome.log_tail
    assert run_stage(stage("pass"), tmp_path / "passes", tmp_path).verdict == "passed"


def test_stage_that_leaves_nothing_to_read_has_failed(tmp_path: Path) -> None:
    nothing = Stage(30, lambda folder: [sys.executable, "-c", "pass"], lambda folder: read_junit(folder / "absent.xml"))
    outcome = run_stage(nothing, tmp_path / "nothing", tmp_path)
    assert outcome.verdict == "failed" and "absent.xml" in outcome.findings["unreadable"]
    assert "absent.xml" in summarize("tests", outcome.findings)


def test_junit_file_is_counted(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(JUNIT)
    findings = read_junit(tmp_path / "tests.xml")
    assert (findings["passed"], findings["failed"], findings["skipped"]) == (1, 1, 1)
    assert findings["files"]["tests.gpu.test_hazard"] == {"passed": 1, "failed": 1, "skipped": 0}
    assert findings["failures"] == ["test_prefetch: assert 0 > 0"]
    assert findings["properties"] == {"test_default": {"calls_with_stale_bits": "0"}}
    assert "calls_with_stale_bits 0" in summarize("hazard", findings)


def test_tests_that_were_all_skipped_show_nothing(tmp_path: Path) -> None:
    case = '<testcase classname="a" name="b"><skipped message="no CUDA GPU"/></testcase>'
    (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{case}</testsuite></testsuites>")
    with pytest.raises(ValueError, match="not one test ran, 1 were skipped: b: no CUDA GPU"):
        read_junit(tmp_path / "tests.xml")


def test_command_writes_the_receipt_and_fails_with_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave = "import sys; open(sys.argv[1], 'w').write({!r})"
    stages = {
        name: Stage(
            30,
            lambda folder, name=name: [sys.executable, "-c", leave.format(JUNIT), str(folder / f"{name}.xml")],
            lambda folder, name=name: read_junit(folder / f"{name}.xml"),
        )
        for name in ("tests", "hazard")
    }
    monkeypatch.setattr(receipt, "STAGES", stages)
    assert receipt.main(["--out", str(tmp_path), "--stages", "hazard", "--commit", "abc"]) == 0
    content = json.loads((tmp_path / "receipt.json").read_text())
    assert content["receipt"] == "gpu" and content["machine"]["commit"] == "abc"
    assert list(content["stages"]) == ["hazard"] and content["stages"]["hazard"]["findings"]["passed"] == 1
    broken = [sys.executable, "-c", "raise SystemExit('broken kernel')"]
    stages["tests"] = Stage(30, lambda folder: broken, lambda folder: read_junit(folder / "tests.xml"))
    assert receipt.main(["--out", str(tmp_path / "again"), "--stages", "tests,hazard"]) == 1
    assert "broken kernel" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        receipt.main(["--out", str(tmp_path), "--stages", "hazard"])
    assert "without hazard" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--out", "x", "--stages", "test"], []])
def test_wrong_usage_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        receipt.main(arguments)
    assert exit_status.value.code == 2
    assert "--stages" in capsys.readouterr().err


def test_stages_run_tests_that_exist() -> None:
    for path in (receipt_stages.HAZARD_TESTS, receipt_stages.SANITIZER_TESTS):
        assert (REPOSITORY / path).is_file()
    # What may be spent on a machine that is lent.
    assert sum(stage.limit_seconds for stage in STAGES.values()) <= 900


def test_build_report_is_summed_up(tmp_path: Path) -> None:
    kernel = {"registers": 80, "spill_store_bytes": 0, "spill_load_bytes": 0, "stack_bytes": 0, "local_bytes": 0}
    manifest = {"compiler": "nvcc 13.0", "targets": ["sm_90"], "build_seconds": 9.5, "source_hash": "abc", "kernels": [kernel, kernel]}
    printed = json.dumps({"path": "x", "origin": "built", "manifest": manifest}, indent=1)
    (tmp_path / "log.txt").write_text(f"mlpdown: building\n{printed}\n")
    line = summarize("build", STAGES["build"].findings(tmp_path))
    assert line == "2 kernels, at most 80 registers, 0 bytes of local memory, 9.5 s (built)"


def machine(date: str) -> dict[str, object]:
    return {"gpu": "NVIDIA H200", "platform": "Linux", "torch": "2.11", "driver": "580", "commit": "abc", "date": date}


def operation(date: str, native: float) -> Report:
    result = Result("pythia-2.8b", 2560, 10240, "float16", 52_428_800, 32, floor_us=11.68)
    result.timings = {"native_chained_prefetch": [native], "torch_graph": [22.0], "compile_default": [20.0]}
    result.cpu_cost = {"native": [7.5], "torch": [28.0]}
    return Report(machine(date), {"tb_per_s": [4.49]}, results=[result])


def end_to_end() -> e2e_report.Report:
    settings = {"weight_prefetch": True}
    report = e2e_report.Report("GPT-NeoX 2.8b", "float16", "NVIDIA H200", settings, failed=["graph: no device"])
    report.not_run = ["compile, cache of 2064, to 2048 tokens: 3 s are left", "eager, to 4 tokens: 2 s are left"]
    passes = [[Pair(4, 4, 3.0, 2.5), Pair(8, 4, 3.0, 2.5)]]
    report.passes = [Passes("compile", 32, passes), Passes("loop", None, passes)]
    report.rows = [report.passes[0].row(8), report.passes[1].row(4)]
    return report


def test_figures_are_those_of_the_newest_receipts(tmp_path: Path) -> None:
    assert figures(tmp_path) == "No receipt has been made yet.\n"
    operation("2025-01-02T00:00:00+00:00", 12.4).write(tmp_path / "new.json")
    operation("2025-01-01T00:00:00+00:00", 99.9).write(tmp_path / "old.json")
    (tmp_path / "new.svg").write_text("<svg/>")
    end_to_end().write_json(tmp_path / "e2e.json")
    (tmp_path / "tests.xml").write_text(JUNIT)
    stages = {"hazard": {"verdict": "failed", "seconds": 3, "findings": read_junit(tmp_path / "tests.xml"), "log_tail": ""}}
    light = {"receipt": "gpu", "schema_version": 1, "machine": machine("2025-01-01"), "stages": stages}
    (tmp_path / "light.json").write_text(json.dumps(light))
    block = figures(tmp_path)
    assert "| pythia-2.8b 2560x10240 float16 | 11.68 | - | 12.40 (1.06) | - | - | 22.00 (1.88) | 20.00 (1.71) |" in block
    assert "99.9" not in block
    assert "CPU time of an eager call: 7.5 us, PyTorch's three calls 28.0 us." in block
    assert f"({RECEIPTS}/new.svg)" in block
    assert "GPT-NeoX 2.8b, float16, weight_prefetch." in block
    assert "| compile, cache of 32 | 8 | 3.000 | 2.500 | 1.200 (1.200 to 1.200) |" in block
    assert "| loop | 4 | 3.000 | 2.500 | 1.200 (1.200 to 1.200) |" in block
    assert "Failed there: graph: no device." in block
    assert "Not run: compile, cache of 2064, to 2048 tokens; eager, to 4 tokens." in block
    assert "| hazard | failed | 1 passed, 1 failed, 1 skipped |" in block


def test_a_ratio_that_may_be_anything_is_named_and_not_shown(tmp_path: Path) -> None:
    report = end_to_end()
    passes = [[Pair(4 * end, 4, *pair) for end, pair in enumerate([(12.0, 48.0), (48.0, 12.0)] * 8, 1)]]
    report.passes[1] = Passes("loop", None, passes)
    report.rows = [report.passes[0].row(8), report.passes[1].row(64)]
    report.write_json(tmp_path / "e2e.json")
    block = figures(tmp_path)
    assert "| compile, cache of 32 | 8 |" in block
    assert "| loop" not in block
    assert "Too noisy to say anything (mode and tokens): loop 64." in block


def test_only_the_block_of_the_readme_is_rewritten(tmp_path: Path) -> None:
    (tmp_path / README).write_text(f"# a\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    assert update_readme(tmp_path)
    assert (tmp_path / README).read_text() == f"# a\n\n{BEGIN}\nNo receipt has been made yet.\n{END}\n\nafter\n"
    assert not update_readme(tmp_path)
    for text in ("no marks", f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}"):
        with pytest.raises(ValueError, match="figures:begin"):
            with_figures(text, "")


def test_readme_is_in_step_with_the_receipts() -> None:
    """If not: ``python -m mlpdown.receipt --readme``."""
    text = (REPOSITORY / README).read_text()
    assert with_figures(text, figures(REPOSITORY / RECEIPTS)) == text
