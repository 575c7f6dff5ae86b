"""Settings of the test process, made before torch is imported: one thread, no network, no GPU."""

import gc
import os

import hypothesis

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # the models are tiny: a second thread only waits, and would change sums
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

# Libraries are half a million objects that live to the end: a full collection walks them in 0.3 s.
gc.disable()

# The same examples every time, so that a failure is the change's; no database to leave behind.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config):
    """Hide GPUs, so that results are the CPU's on every machine, unless the gpu marker is chosen."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported


def pytest_collection_modifyitems(items):
    """Run the files with tests of many seconds first: one of them at the end would leave processes idle."""
    longest = {f"test_{name}.py" for name in ("processes", "gpu_report", "compare", "signals", "output")}
    items.sort(key=lambda item: item.path.name not in longest)


def pytest_collection_finish():
    """Collect garbage again, but only among the objects of tests."""
    gc.freeze()
    gc.enable()
