"""The GPU report: every step on the CPU with the bundled model, and steps that hang or crash."""

import json
import os
import time
from types import SimpleNamespace

import pytest
from PIL import Image

from scripts import gpu_report
from scripts.gpu.figures import ratios, training_rows
from scripts.gpu.job import Job
from scripts.gpu.page import page
from scripts.gpu.worker import Workers
from scripts.processes import started

SIMILAR = [f"{kind} {name}" for kind in ("epochs", "training", "largest") for name in gpu_report.OPTIMIZERS]
TRIED = {"epochs dadapt_adam8bit+fused", "training dadapt_adam_reference", "largest adamw8bit"}
"""Of the steps that differ by the optimizer alone, those that the test takes."""


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling takes longer than all steps


def test_every_step_runs_on_the_cpu(tmp_path, capsys, on_the_cpu):
    names = [step.name for step in gpu_report.STEPS if step.name not in SIMILAR or step.name in TRIED]
    status = gpu_report.main(["--out", str(tmp_path), "--device", "cpu", "--tiny", "--only", *names])
    report = json.loads((tmp_path / "report.json").read_text())
    found = {name: (step["status"], step["reason"]) for name, step in report["steps"].items()}
    assert found == dict.fromkeys(names, ("ok", "")), capsys.readouterr().out
    assert status == 0 and all(step["results"] for step in report["steps"].values())
    text = (tmp_path / "report.md").read_text()
    for title in (
        "Environment",
        "Correctness",
        "Epochs",
        "Training steps",
        "Optimizer steps",
        "Profile",
        "First run",
    ):
        assert f"## {title}" in text
    assert "its numbers say nothing about a GPU" in text and "(comparison.png)" in text
    assert len(Image.open(tmp_path / "comparison.png").convert("RGB").getcolors(1 << 20)) > 10
    assert all(result["grown"] > 2 for result in report["steps"]["agreement"]["results"]), (
        "d moved, so it was compared"
    )
    equal = [result for result in report["steps"]["resumed"]["results"] if result["kind"] == "equality"]
    assert [result["differing"] for result in equal] == [0, 0] and equal[0]["tensors"] > 100


def hang(job, tell):
    tell({"kind": "begun", "pid": os.getpid()})
    time.sleep(600)


def crash(job, tell):
    tell({"kind": "begun"})
    os._exit(3)


def fail(job, tell):
    raise ValueError("no such kernel")


@pytest.mark.parametrize(
    ("function", "status", "reason", "results"),
    [
        (hang, "stopped", "not finished after 3 s", 1),
        (crash, "failed", "its process ended with status 3", 1),
        (fail, "failed", "ValueError: no such kernel", 0),
    ],
)
def test_a_step_that_does_not_finish_keeps_its_results(
    tmp_path, on_the_cpu, function, status, reason, results
):
    started(["--help"], tmp_path / "help.txt").join()  # importing the libraries takes longer than 3 s
    workers, told = Workers("cpu"), []
    try:
        job = Job("a step", "cpu", True, tmp_path / "step")
        limit = 3 if function is hang else 120  # beside other work a process takes seconds to end
        assert workers.run(f"{__name__}:{function.__name__}", job, limit, told.append, last=True) == (
            status,
            reason,
        )
    finally:
        workers.close()
    assert len(told) == results
    if function is hang:
        with pytest.raises(ProcessLookupError):
            os.kill(told[0]["pid"], 0)
    if function is fail:
        assert "no such kernel" in (tmp_path / "step" / "output.log").read_text()


def test_steps_without_time_are_not_run_and_earlier_results_stay(tmp_path):
    earlier = {
        "status": "ok",
        "reason": "",
        "seconds": 1.0,
        "results": [{"kind": "speed", "copy": 2900.0, "product": 600.0, "product_dtype": "bfloat16"}],
    }
    (tmp_path / "report.json").write_text(json.dumps({"steps": {"environment": earlier}}))
    options = [
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
        "--tiny",
        "--minutes",
        "0",
        "--only",
        "environment",
        "profile",
    ]
    assert gpu_report.main(options) == 0
    steps = json.loads((tmp_path / "report.json").read_text())["steps"]
    assert steps["environment"] == earlier and steps["profile"]["status"] == "not run"


def _step(*results):
    return {"status": "ok", "reason": "", "seconds": 1.0, "results": list(results)}


def _steps(whole, allocated, images=4):
    parts = dict.fromkeys(("forward", "backward", "optimizer", "host", "first"), 1.0)
    sizes = {"allocated": allocated, "reserved": allocated, "beside": 0, "state": 2000}
    return _step(
        {"kind": "built", "trained": 1000, "seconds": 1.0},
        {"kind": "steps", "images": images, "whole": whole, **parts, **sizes},
    )


def test_ratios_are_of_adamw8bit_and_the_floor_counts_every_byte():
    gib = 2**30
    steps = {
        "environment": _step({"kind": "speed", "copy": 16.0, "product": 1.0, "product_dtype": "bfloat16"}),
        "training dadapt_adam8bit+fused": _steps(180.0, 6 * gib),
        "training adamw8bit": _steps(200.0, 8 * gib),
        "epochs adamw8bit": _step(
            *(
                {"kind": "epoch", "images": 60, "seconds": s, "counted": s < 9, "allocated": 5 * gib}
                for s in (9.0, 2.0, 4.0, 3.0)
            )
        ),
        "epochs dadapt_adam8bit+fused": _step(
            {"kind": "epoch", "images": 60, "seconds": 2.4, "counted": True, "allocated": 3 * gib}
        ),
        "estimates": _step({"kind": "estimate", "optimizer": "adamw8bit", "images": 4, "bytes": 9 * gib}),
        "alone": _step(
            {
                "kind": "alone",
                "optimizer": "dadapt_adam8bit+fused",
                "trained": 2e6,
                "state": 4e6,
                "first": 0.5,
            }
            | {"whole": 3.0, "host": 1.0}
        ),
        "largest adamw8bit": _step(
            *_steps(900.0, 70 * gib, images=90)["results"],
            {"kind": "estimate", "optimizer": "adamw8bit", "images": 90, "bytes": 63 * gib},
        ),
    }
    assert ratios(steps) == [
        ("dadapt_adam8bit+fused, whole epochs", pytest.approx(0.8), pytest.approx(0.6)),
        ("dadapt_adam8bit+fused, steps of batch 4", pytest.approx(0.9), pytest.approx(0.75)),
    ]
    rows = {row["name"]: row for row in training_rows(steps) if row["images"] == 4}
    assert rows["adamw8bit"]["floor"] == pytest.approx(1e-3)  # 12 x 1000 + 2 x 2000 bytes at 16 GB/s, in ms
    assert "floor" not in rows["dadapt_adam8bit+fused"], "its updates are inside the backward pass"
    text = page({"date": "2026-11-27", "tiny": False, "device": "cuda", "steps": steps})
    assert "numbers say nothing" not in text
    for line in (
        "| adamw8bit | 4 | 8.00 | 8.00 | 9.00 | 1.12 | 0.00 | 2.00 |",
        "| adamw8bit | 90 | 70.0 | 70.0 | 63.0 | 0.90 | 0.00 | 2.00 |",
        "| dadapt_adam8bit+fused | 60 | 2.40 | 25.0 | 3.00 |",
        "| dadapt_adam8bit+fused | 3.00 | 1.00 | 2.00 | 1.50 | 2.00 | 0.50 |",
    ):
        assert line in text


def test_a_trace_counts_launches_and_the_time_that_the_gpu_computes():
    from torch._C._autograd import DeviceType

    from scripts.gpu.profiling import summary

    def event(name, kind, start, end):
        span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(
            name=name,
            device_type=kind,
            time_range=span,
            self_cpu_time_total=end - start,
            is_user_annotation=False,
        )

    found = summary(
        [
            event("cudaLaunchKernel", DeviceType.CPU, 0, 1000),
            event("aten::mm", DeviceType.CPU, 0, 4000),
            event("cuLaunchKernelEx", DeviceType.CPU, 1000, 2000),
            event("gemm", DeviceType.CUDA, 1000, 4000),
            event("copy", DeviceType.CUDA, 3000, 5000),  # on another stream at the same time
            event("gemm", DeviceType.CUDA, 8000, 9000),
        ]
    )
    assert (found["launches"], found["operators"], found["busy"]) == (2, 3, 5.0)
    assert found["kernels"][0] == {"name": "gemm", "milliseconds": 4.0, "count": 2}
    assert found["host"][0] == {"name": "aten::mm", "milliseconds": 4.0, "count": 1}
