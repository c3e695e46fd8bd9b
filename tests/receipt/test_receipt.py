"""The receipt of a GPU: stages end, whatever runs in them; what they leave is read; the README's figures come from receipts."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from mlpdown.bench import e2e_timing
from mlpdown.bench.e2e_timing import Pair
from mlpdown.json_lines import write_json
from receipt import __main__ as receipt
from receipt.readme import BEGIN, END, README, RECEIPTS, figures, update_readme, with_figures
from receipt.stages import HAZARD_TESTS, REPOSITORY, SANITIZER_TESTS, STAGES, Stage, read_junit, run_stage, summarize

JUNIT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.gpu.test_hazard" name="test_default">
<properties><property name="calls_with_stale_bits" value="0"/></properties></testcase>
<testcase classname="tests.gpu.test_hazard" name="test_prefetch"><failure message="assert 0 &gt; 0&#10;more"/></testcase>
<testcase classname="tests.gpu.test_bits" name="test_skipped"><skipped message="no second GPU"/></testcase>
</testsuite></testsuites>"""


def stage(code: str, limit_seconds: int = 30) -> Stage:
    return Stage(limit_seconds, ("-c", code.replace("{", "{{").replace("}", "}}")), lambda folder: {"found": 1})


def test_stage_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); print('begun', flush=True); time.sleep(60)"
    begin = time.monotonic()
    outcome = run_stage(stage(code, 1), tmp_path / "hangs")
    assert outcome["verdict"] == "timed out" and "begun" in outcome["log_tail"] and "KeyboardInterrupt" in outcome["log_tail"]
    time.sleep(max(0.0, 3.0 - (time.monotonic() - begin)))
    assert not mark.exists(), "the stage's own child went on"


def test_stage_that_fails_keeps_the_end_of_its_log(tmp_path: Path) -> None:
    outcome = run_stage(stage("raise SystemExit('the reason')"), tmp_path / "fails")
    assert outcome["verdict"] == "failed" and "the reason" in outcome["log_tail"]
    outcome = run_stage(stage("print('fine')"), tmp_path / "passes")
    assert outcome["verdict"] == "passed" and outcome["log_tail"] == "" and outcome["findings"] == {"found": 1}


def test_stage_that_leaves_nothing_to_read_has_failed(tmp_path: Path) -> None:
    outcome = run_stage(Stage(30, ("-c", "pass"), read_junit), tmp_path / "nothing")
    assert outcome["verdict"] == "failed" and "tests.xml" in outcome["findings"]["unreadable"]
    assert "tests.xml" in summarize("tests", outcome["findings"])


def test_junit_file_is_counted(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(JUNIT)
    findings = read_junit(tmp_path)
    assert (findings["passed"], findings["failed"], findings["skipped"]) == (1, 1, 1)
    assert findings["files"]["tests.gpu.test_hazard"] == {"passed": 1, "failed": 1, "skipped": 0}
    assert findings["failures"] == ["test_prefetch: assert 0 > 0"]
    assert findings["properties"] == {"test_default": {"calls_with_stale_bits": "0"}}
    assert "calls_with_stale_bits 0" in summarize("hazard", findings)


def test_tests_that_were_all_skipped_show_nothing(tmp_path: Path) -> None:
    case = '<testcase classname="a" name="b"><skipped message="no CUDA GPU"/></testcase>'
    (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{case}</testsuite></testsuites>")
    with pytest.raises(ValueError, match="not one test ran, 1 were skipped: b: no CUDA GPU"):
        read_junit(tmp_path)


def test_command_writes_the_receipt_and_fails_with_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave = f"import sys; open(sys.argv[1], 'w').write({JUNIT!r})"
    stages = {name: Stage(30, ("-c", leave, "{folder}/tests.xml"), read_junit) for name in ("tests", "hazard")}
    monkeypatch.setattr(receipt, "STAGES", stages)
    assert receipt.main(["--out", str(tmp_path), "--stages", "hazard", "--commit", "abc"]) == 0
    content = json.loads((tmp_path / "receipt.json").read_text())
    assert content["receipt"] == "gpu" and content["machine"]["commit"] == "abc"
    assert list(content["stages"]) == ["hazard"] and content["stages"]["hazard"]["findings"]["passed"] == 1
    stages["tests"] = Stage(30, ("-c", "raise SystemExit('broken kernel')"), read_junit)
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
    for path in (HAZARD_TESTS, SANITIZER_TESTS):
        assert (REPOSITORY / path).is_file()
    # What may be spent on a machine that is lent.
    assert sum(stage.limit_seconds for stage in STAGES.values()) <= 900


def test_build_report_is_summed_up(tmp_path: Path) -> None:
    kernel = {"registers": 80, "spill_store_bytes": 0, "spill_load_bytes": 0, "stack_bytes": 0, "local_bytes": 0}
    manifest = {"compiler": "nvcc 13.0", "targets": ["sm_90"], "build_seconds": 9.5, "source_hash": "abc", "kernels": [kernel, kernel]}
    printed = json.dumps({"path": "x", "origin": "built", "manifest": manifest}, indent=1)
    (tmp_path / "log.txt").write_text(f"mlpdown: building\n{printed}\n")
    line = summarize("build", STAGES["build"].read(tmp_path))
    assert line == "2 kernels, at most 80 registers, 0 bytes of local memory, 9.5 s (built)"


def machine(date: str) -> dict[str, object]:
    return {"gpu": "NVIDIA H200", "platform": "Linux", "torch": "2.11", "driver": "580", "commit": "abc", "date": date}


def operation(date: str, native: float) -> dict[str, Any]:
    timings = {"native_chained_prefetch": [native], "torch_graph": [22.0], "compile_default": [20.0]}
    result = {"shape": "pythia-2.8b", "hidden_dim": 2560, "intermediate_dim": 10240, "dtype": "float16", "floor_us": 11.68}
    result |= {"weight_bytes": 52_428_800, "timings": timings, "cpu_cost": {"native": [7.5], "torch": [28.0]}}
    facts = {"machine": machine(date), "steady_read": {"tb_per_s": [4.49]}, "validity": {"valid": True, "reasons": []}}
    return {"benchmark": "op", "schema_version": 1, **facts, "results": [result]}


def end_to_end(loop: list[Pair]) -> dict[str, Any]:
    pairs = [Pair(4, 4, 3.0, 2.5), Pair(8, 4, 3.0, 2.5)]
    content: dict[str, Any] = {"benchmark": "e2e", "machine": machine("2025-01-01"), "model": "GPT-NeoX 2.8b", "dtype": "float16"}
    content |= {"settings": {"weight_prefetch": True}, "failed": ["graph: no device"]}
    content["not_run"] = ["compile, cache of 2064, to 2048 tokens: 3 s are left", "eager, to 4 tokens: 2 s are left"]
    content["rows"] = [e2e_timing.row("compile", 32, 8, [pairs]), e2e_timing.row("loop", None, loop[-1].end, [loop])]
    return content


def test_figures_are_those_of_the_newest_receipts(tmp_path: Path) -> None:
    assert figures(tmp_path) == "No receipt has been made yet.\n"
    write_json(tmp_path / "new.json", operation("2025-01-02T00:00:00+00:00", 12.4))
    write_json(tmp_path / "old.json", operation("2025-01-01T00:00:00+00:00", 99.9))
    (tmp_path / "new.svg").write_text("<svg/>")
    write_json(tmp_path / "e2e.json", end_to_end([Pair(4, 4, 3.0, 2.5)]))
    (tmp_path / "tests.xml").write_text(JUNIT)
    stages = {"hazard": {"verdict": "failed", "seconds": 3, "findings": read_junit(tmp_path), "log_tail": ""}}
    write_json(tmp_path / "gpu.json", {"receipt": "gpu", "machine": machine("2025-01-01"), "stages": stages})
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
    noisy = [Pair(4 * end, 4, *pair) for end, pair in enumerate([(12.0, 48.0), (48.0, 12.0)] * 8, 1)]
    write_json(tmp_path / "e2e.json", end_to_end(noisy))
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
    """If not: ``python -m tests.receipt --readme``."""
    text = (REPOSITORY / README).read_text()
    assert with_figures(text, figures(REPOSITORY / RECEIPTS)) == text


def test_plot_of_the_readme_is_of_one_shape() -> None:
    assert len(re.findall("TB/s of weights", (REPOSITORY / RECEIPTS / "h200-2026-11-24-op.svg").read_text())) == 1
