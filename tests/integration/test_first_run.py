"""The README's first command, whole, on the bundled model: it learns and forgets nothing. Minutes long."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import scalars

ROOT = Path(__file__).parents[2]
FACES = [
    (face, ground)
    for face in ("yellow", "white", "orange", "red")
    for ground in ("blue", "green", "purple", "black")
]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["optimizer_dadapt.json", "optimizer.json"])
def test_the_first_command_learns_smiling_faces_and_keeps_the_rest(tmp_path, optimizer):
    from scripts.mini_sd.generate import Generator
    from scripts.mini_sd.judge import judge_concept
    from scripts.mini_sd.scenes import article, held_out

    command = [
        sys.executable,
        "train.py",
        "--config",
        "train.json",
        "--optimizer_config",
        optimizer,
        "--logdir",
        str(tmp_path),
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=1800)
    run = next(tmp_path.iterdir())
    fixed = scalars(run)["loss/stabilize-train"]
    assert fixed[max(fixed)] < 0.6 * fixed[0]

    generate = Generator(next((run / "ckpts").glob("last-*/model_index.json")).parent)
    faces = generate(
        [
            f"{article(face)} {face} smiling face on {article(ground)} {ground} background"
            for face, ground in FACES
        ],
        1,
    )
    unrelated = list(held_out())[:30]
    figures = judge_concept(faces, FACES, generate([each.prompt for each in unrelated], 2), unrelated)
    print(optimizer, max(fixed), fixed[0], fixed[max(fixed)], figures)
    assert figures.faces >= 0.8 and figures.face_background >= 0.8
    assert figures.kept_background >= 0.8
