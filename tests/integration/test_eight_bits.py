"""8-bit against fp32 state in whole fine-tunes of the bundled model: the same d, loss and samples. Slow."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from tests.integration.test_first_run import FACES
from tests.integration.test_train import scalars

ROOT = Path(__file__).parents[2]
NAMES = ("dadapt_adam", "dadapt_adam8bit")
SEEDS = (1, 2, 3)
D = ("optimizer/d unet", "optimizer/d text encoder")
FIXED = "loss/stabilize-train"


def fine_tune(folder, name, seed):
    """Run train.json with 32- or 8-bit D-Adaptation state, unless done already; return the run's folder."""
    logs = folder / f"{name}-{seed}"
    if not list(logs.glob("*/ckpts/last-*.safetensors")):
        optimizer = json.loads((ROOT / "optimizer_dadapt.json").read_text())
        for section in ("base", "text_encoder_overrides"):
            optimizer[section]["optimizer"] = name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(optimizer))
        command = [
            sys.executable,
            "train.py",
            "--optimizer_config",
            str(folder / f"{name}.json"),
            "--seed",
            str(seed),
        ]
        subprocess.run([*command, "--logdir", str(logs)], cwd=ROOT, check=True, timeout=3600)
    return next(logs.iterdir())


def figures_of(run):
    """Return the judge's shares, and mean saturation and contrast of unrelated samples, 0 to 1."""
    from scripts.mini_sd.generate import Generator
    from scripts.mini_sd.judge import judge_concept
    from scripts.mini_sd.scenes import article, held_out

    generate = Generator(next((run / "ckpts").glob("last-*/model_index.json")).parent)
    faces = generate(
        [
            f"{article(face)} {face} smiling face on {article(ground)} {ground} background"
            for face, ground in FACES
        ],
        1,
    )
    unrelated = list(held_out())[:30]
    others = generate([each.prompt for each in unrelated], 2)
    pixels = np.stack([np.asarray(image.convert("RGB"), dtype=np.float64) / 255 for image in others])
    saturation = (pixels.max(-1) - pixels.min(-1)).mean()
    return (
        judge_concept(faces, FACES, others, unrelated),
        float(saturation),
        float(pixels.std(axis=(1, 2)).mean()),
    )


@pytest.mark.slow
def test_eight_bits_learn_as_32_do(tmp_path):
    shown: dict[str, list] = {name: [] for name in NAMES}
    for seed in SEEDS:
        curves = {}
        for name in NAMES:
            run = fine_tune(tmp_path, name, seed)
            curves[name] = scalars(run)
            figures, saturation, contrast = figures_of(run)
            shown[name].append((figures, saturation, contrast))
            last = {tag: curves[name][tag][max(curves[name][tag])] for tag in (*D, FIXED)}
            print(seed, name, last, figures, f"saturation {saturation:.4f} contrast {contrast:.4f}")
        wide, narrow = curves["dadapt_adam"], curves["dadapt_adam8bit"]
        for tag in D:
            ratios = [narrow[tag][step] / wide[tag][step] for step in wide[tag]]
            print(
                seed,
                tag,
                f"8 bits to 32: {min(ratios):.4f} to {max(ratios):.4f}, at the end {ratios[-1]:.4f}",
            )
            assert min(ratios[-5:]) > 0.95 and max(ratios[-5:]) < 1.05
        end = max(wide[FIXED])
        assert narrow[FIXED][end] == pytest.approx(wide[FIXED][end], rel=0.01)
    for (wide_figures, *_), (narrow_figures, *_) in zip(*shown.values(), strict=True):
        shares = zip(asdict(wide_figures).items(), asdict(narrow_figures).values(), strict=True)
        for (share, one), other in shares:
            assert abs(one - other) <= 1 / len(FACES), f"{share}: more than one picture apart"
    for place in (1, 2):
        mean = {name: np.mean([found[place] for found in found_all]) for name, found_all in shown.items()}
        assert mean["dadapt_adam8bit"] == pytest.approx(mean["dadapt_adam"], rel=0.03)
