"""Resume state that somebody crafted, with right hashes, is refused in a sentence before the run starts."""

import copy
import json
import shutil

import numpy as np
import pytest

import train
from tests.runs import ADAMW, DADAPT, run_of, write
from trainer.checkpoints.format import MANIFEST, RESUME, _write_manifest, resume_problem
from trainer.checkpoints.listing import checkpoints
from trainer.state_file import as_kind

JUNK = ("x", [], {}, None, -1, 1e300, [["x", "y"]], True, {"$tensor": "nothing"}, {"$float": "x"})


@pytest.fixture
def crafted(workplace, request, no_curves):
    """Return a function that resumes a run of two steps from a changed state and returns the exit code."""
    write(workplace, getattr(request, "param", DADAPT), first_samples=False, max_epochs=2)
    assert train.main(["--stop_after_steps", "2"]) == 0
    (folder,) = checkpoints(run_of(workplace))
    whole = workplace / "whole"
    shutil.copytree(run_of(workplace), whole)

    def resume(file, change):
        shutil.rmtree(run_of(workplace))
        shutil.copytree(whole, folder.parent.parent)
        path = folder / RESUME / file
        content = json.loads(path.read_text())
        path.write_text(json.dumps(change(content)))
        manifest = json.loads((folder / RESUME / MANIFEST).read_text())
        (folder / RESUME / MANIFEST).unlink()
        _write_manifest(
            folder / RESUME, {key: value for key, value in manifest.items() if key not in ("format", "files")}
        )
        assert resume_problem(folder) is None
        return train.main(["--resume_ckpt", str(folder), "--stop_after_steps", "3"])

    return resume


def changed(*keys, to):
    """Return a function that returns a JSON tree with the value at `keys` changed."""

    def change(tree):
        place = tree
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to
        return tree

    return change


def test_state_that_is_none_is_refused(crafted, capsys):
    cases = [
        (
            "training.json",
            lambda tree: {},
            "training.json: the state of the run cannot be used (it holds none of the optimizers)",
        ),
        ("training.json", lambda tree: [], "cannot be used ("),
        (
            "training.json",
            changed("meter", "window", to={"loss/log_step": "ab"}),
            "loss/log_step: input should be a valid tuple",
        ),
        ("training.json", changed("meter", "epoch_seconds", to="soon"), "input should be a valid number"),
        (
            "training.json",
            changed("curves", to={"loss/log_step": [["a", "b"]]}),
            "loss/log_step" and "0.0: input should be",
        ),
        (
            "training.json",
            changed("watch", "unet", to={"level": []}),
            "level: input should be a valid number",
        ),
        (
            "training.json",
            changed("loss watch", "fixed", to={"step": "x"}),
            "step: input should be a valid integer",
        ),
        ("training.json", changed("card", to={}), "name: field required"),
        ("training.json", changed("optimizers", "unet", "state", to={}), "cannot be used ("),
        ("training.json", changed("optimizers", "unet", "groups", to=[]), "cannot be used ("),
        ("state.json", changed("state", "step", to="many"), "step: input should be a valid integer"),
        ("state.json", changed("state", "step", to=-2), "a count is negative"),
        (
            "state.json",
            changed("state", "step_in_epoch", to=99),
            "its counts are not those of a run on these images",
        ),
        ("state.json", changed("about", to={}), "state of the run cannot be read ('same')"),
        ("state.json", changed("about", "same", "seed", to=None), "state of the run cannot be read ("),
        ("state.json", changed("about", "config", to=[]), "state of the run cannot be read ("),
    ]
    for file, change, said in cases:
        capsys.readouterr()
        assert crafted(file, change) == 2, said
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error


@pytest.mark.slow
@pytest.mark.parametrize("crafted", [ADAMW, DADAPT], indirect=True, ids=["adamw", "dadapt"])
@pytest.mark.parametrize("file", ["state.json", "training.json"])
def test_junk_anywhere_in_the_state_is_refused_or_harmless(crafted, file):
    """25 seeded changes of one place each."""
    draws = np.random.default_rng(5)

    def change(tree):
        place, tree = copy.deepcopy(tree), tree
        ways = list(leaves(place))
        way = ways[int(draws.integers(len(ways)))]
        way = way[: int(draws.integers(1, len(way) + 1))]
        return changed(*way, to=JUNK[int(draws.integers(len(JUNK)))])(place)

    codes = [crafted(file, change) for _ in range(25)]
    assert set(codes) <= {0, 2} and codes.count(2) > 5, codes


def leaves(tree, way=()):
    if isinstance(tree, dict | list) and tree:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, (*way, key))
    elif way:
        yield way


def test_a_type_that_fits_is_kept():
    assert as_kind(dict[str, tuple[float, float]], {"a": [1, 0.1 + 0.2]}) == {"a": (1.0, 0.1 + 0.2)}
