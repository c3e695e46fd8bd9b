"""The receipt of a GPU: stages end, whatever runs in them; what they leave is read; the README's figures come from receipts."""

from __future__ import annotations

import json
import time
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
from mlpdown.reference import order

from mlpdown.bench import e2e_timing
from mlpdown.bench.e2e_timing import Pair
from mlpdown.json_lines import write_json
from receipt import __main__ as receipt
from receipt import drawings
from receipt.readme import (
    BLOCKS,
    NO_RECEIPT,
    README,
    RECEIPTS,
    all_figures,
    files,
    headline,
    newest_receipts,
    six_figures,
    update_readme,
    with_block,
)
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


def write_receipts(folder: Path) -> None:
    write_json(folder / "new.json", operation("2025-01-02T00:00:00+00:00", 12.4))
    write_json(folder / "old.json", operation("2025-01-01T00:00:00+00:00", 99.9))
    write_json(folder / "e2e.json", end_to_end([Pair(4, 4, 3.0, 2.5)]))
    (folder / "tests.xml").write_text(JUNIT)
    stages = {"hazard": {"verdict": "failed", "seconds": 3, "findings": read_junit(folder), "log_tail": ""}}
    write_json(folder / "gpu.json", {"receipt": "gpu", "machine": machine("2025-01-01"), "stages": stages})


def test_page_has_the_figures_of_every_receipt(tmp_path: Path) -> None:
    write_receipts(tmp_path)
    page = all_figures(tmp_path)
    assert "| pythia-2.8b 2560x10240 float16 | 11.68 | - | 12.40 (1.06) | - | - | 22.00 (1.88) | 20.00 (1.71) |" in page
    assert page.index("## new.json") < page.index("12.40") < page.index("## old.json") < page.index("99.90")
    assert "CPU time of an eager call: 7.5 us, PyTorch's three calls 28.0 us." in page
    assert "GPT-NeoX 2.8b, float16, weight_prefetch." in page
    assert "| compile, cache of 32 | 8 | 3.000 | 2.500 | 1.200 (1.200 to 1.200) |" in page
    assert "| loop | 4 | 3.000 | 2.500 | 1.200 (1.200 to 1.200) |" in page
    assert "Failed there: graph: no device." in page
    assert "Not run: compile, cache of 2064, to 2048 tokens; eager, to 4 tokens." in page
    assert "| hazard | failed | 1 passed, 1 failed, 1 skipped |" in page


def test_readme_has_the_figures_of_the_newest_receipts(tmp_path: Path) -> None:
    assert headline({}) == six_figures({}) == []
    write_receipts(tmp_path)
    newest = newest_receipts(tmp_path)
    table, best = "\n".join(six_figures(newest)), "\n".join(headline(newest))
    assert "| NVIDIA H200, kernels of commit abc, float16 | floor |" in table
    assert "| pythia-2.8b 2560x10240 | 11.68 | 12.40 (1.06) | - | 22.00 (1.88) |" in table
    assert "12.4 us back to back, - us alone. PyTorch takes 22.0" in best
    assert "99.9" not in table + best


def test_readme_compares_the_fastest_of_either_side(tmp_path: Path) -> None:
    def row(mode: str, stock: float, patched: float) -> dict[str, Any]:
        medians = {"stock_ms": {"median": stock}, "patched_ms": {"median": patched}, "ratio": {"median": stock / patched}}
        return {"mode": mode, "num_tokens": 256, **medians}

    content = end_to_end([Pair(4, 4, 3.0, 2.5)])
    content["rows"] = [row("compile", 2.4, 2.3), row("compile-pdl", 2.6, 2.0)]
    (_, times) = headline({"e2e": content})
    assert "1.04 times as long with torch.compile, 1.20 times if both may use PDL." in times


def test_a_ratio_that_may_be_anything_is_named_and_not_shown(tmp_path: Path) -> None:
    noisy = [Pair(4 * end, 4, *pair) for end, pair in enumerate([(12.0, 48.0), (48.0, 12.0)] * 8, 1)]
    write_json(tmp_path / "e2e.json", end_to_end(noisy))
    block = all_figures(tmp_path)
    assert "| compile, cache of 32 | 8 |" in block
    assert "| loop" not in block
    assert "Too noisy to say anything (mode and tokens): loop 64." in block


def test_only_the_blocks_of_the_readme_are_rewritten(tmp_path: Path) -> None:
    (tmp_path / RECEIPTS).mkdir(parents=True)
    marks = [f"<!-- {name}:{which} -->" for name in BLOCKS for which in ("begin", "end")]
    begin, end, *others = marks
    (tmp_path / README).write_text("\n".join(["# a", begin, "old", end, "between", *others, "after", ""]))
    assert update_readme(tmp_path)
    expected = ["# a", begin, NO_RECEIPT, end, "between", others[0], NO_RECEIPT, others[1], "after", ""]
    assert (tmp_path / README).read_text().split("\n") == expected
    assert not update_readme(tmp_path)
    for text in ("no marks", f"{end}{begin}", f"{begin}{begin}{end}"):
        with pytest.raises(ValueError, match="headline:begin"):
            with_block(text, "headline", [])


def test_what_is_made_from_the_receipts_is_in_step_with_them() -> None:
    """If not: ``python -m tests.receipt --readme``."""
    made = files(REPOSITORY)
    assert len(made) == 4
    assert len(six_figures(newest_receipts(REPOSITORY / RECEIPTS))) == 2 + 6 + 1 + 3, "six rows, with a head and how to read them"
    assert [path for path, text in made.items() if (REPOSITORY / path).read_text() != text] == []


def test_drawing_of_the_order_follows_the_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    """It deals every vector of a segment once, draws every addition, and follows the constants."""
    dealt = [vector for lane in range(order.NUM_LANES) for vector in drawings.vectors_of(lane, 160)]
    assert sorted(dealt) == list(range(160)) and drawings.vectors_of(3, 160) == [3, 35, 67, 99, 131]
    drawing = drawings.order_svg()
    xml.etree.ElementTree.fromstring(drawing)
    # 7 in a lane, 31 over lanes, 7 over segments, and three tensors.
    assert drawing.count("<circle") == 7 + 31 + 7 + 3

    monkeypatch.setattr(order, "MIN_VECTORS_PER_SEGMENT", 512)
    assert drawings.order_svg().count("<circle") == 7 + 31 + 1 + 3, "two segments"


def test_plot_has_six_bars_and_leaves_out_what_was_not_measured() -> None:
    content = json.loads((REPOSITORY / RECEIPTS / "h200-2026-11-24-op.json").read_text())
    plot = drawings.times_svg(content["results"][0], "a GPU")
    xml.etree.ElementTree.fromstring(plot)
    assert plot.count("<rect") == 1 + 6
    assert drawings.times_svg(content["results"][2], "a GPU").count("<rect") == 1 + 5, "without torch.compile"
