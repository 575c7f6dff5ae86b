"""Parts of the comparison's report: drift, verdict, names, intervals and progress."""

import io
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from scripts.compare.drift import Shift, shift
from scripts.compare.machines import note_machine, note_start, read_machines
from scripts.compare.measures import Compared, Measured
from scripts.compare.pictures import moved_most
from scripts.compare.progress import Progress
from scripts.compare.runs import Finished, Planned, names
from scripts.compare.tables import half_width, tables, verdict
from trainer.reporting.tags import FIXED_LOSS, VALIDATION_LOSS


def square(ink, corner=16):
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).rectangle((corner, corner, corner + 31, corner + 31), fill=ink)
    return image


def test_a_square_that_changes_its_colour_moves_in_colour_alone():
    colour, structure = shift(square("blue"), square("red"))
    assert colour == pytest.approx(0.537 / 4, abs=1e-3), "a quarter of the picture, red to blue"
    assert structure == pytest.approx(0, abs=1e-9)


def test_a_square_that_moves_changes_in_structure_alone():
    colour, structure = shift(square("red", 0), square("red", 32))
    assert colour == pytest.approx(0, abs=1e-9) and structure > 1


def test_the_same_picture_has_not_moved():
    flat = Image.new("RGB", (8, 8), (130, 130, 130))
    assert shift(flat, flat) == (0, 0) and shift(square("red"), square("red")) == (0, 0)
    assert shift(flat, square("red")).structure == 1, "no composition is like a plain one"


def test_just_visible_steps_of_grey_are_a_fiftieth():
    one, other = (Image.new("RGB", (8, 8), (grey, grey, grey)) for grey in (130, 136))
    assert shift(one, other).colour == pytest.approx(0.02, abs=2e-3)


def compared(label, losses, colours=(), tag=VALIDATION_LOSS):
    planned = Planned(label, Path(f"{label}.json"), 1, Path(), (), {})
    runs = tuple(
        Measured(Finished(planned, None, 0, None, ("CPU",)), {tag: {0: 1.0, 5: loss}}, None, *[None] * 5)
        for loss in losses
    )
    shifts = tuple(((0, Shift(colour, 0.1)),) for colour in colours)
    return Compared(label, runs, shifts=shifts)


def test_the_verdict_names_the_lowest_loss_and_the_farthest_colours():
    files = [compared("adamw", [0.05], [0.02]), compared("dadapt", [0.045], [0.04])]
    loss, drift, chance = verdict(files)
    assert loss == "dadapt reached the lowest validation loss, 0.0450, 10.0% below adamw."
    assert drift.startswith("dadapt moved the colours of unrelated prompts most, 2.0 times as far")
    assert chance.startswith("One seed: small differences between files may be chance.")


def test_drift_that_differs_little_names_nobody():
    files = [compared("adamw", [0.05], [0.020]), compared("dadapt", [0.045], [0.022])]
    assert verdict(files)[1] == "All files moved the colours of unrelated prompts about equally far."


def test_the_verdict_ranks_by_the_fixed_noise_loss_without_validation():
    files = [compared("a", [0.05], tag=FIXED_LOSS), compared("b", [0.06], tag=FIXED_LOSS)]
    assert verdict(files)[0].startswith("a reached the lowest fixed-noise loss")


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([0.045, 0.046, 0.044], "; 3 seeds confirm the difference"),
        ([0.045, 0.046, 0.055], "; 3 seeds do not confirm"),
    ],
)
def test_from_three_seeds_the_verdict_says_how_sure_it_is(losses, words):
    files = [compared("a", losses), compared("b", [0.050, 0.052, 0.049])]
    (sentence,) = verdict(files)
    assert words in sentence


def test_a_process_that_was_killed_leaves_no_machine(tmp_path):
    record = tmp_path / "output.machines"
    assert read_machines(record) == []
    note_start(record)
    note_start(record)
    note_machine(record)
    killed, ended = read_machines(record)
    assert killed is None and ended is not None and ended.startswith("CPU (") and ", torch " in ended


def test_intervals_are_students():
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5)
    cells = tables([compared("a", [1.0, 2.0, 3.0]), compared("b", [1.0, 2.0])], None)[0].rows
    assert cells[0].cells[4].under == "±\u00a02.4843" and cells[1].cells[4].under == "1.0000 to 2.0000"


def test_the_prompts_that_moved_most_count_colour_and_structure_alike():
    shifts = ((0, Shift(0.01, 0.1)), (1, Shift(0.05, 0.1)), (2, Shift(0.01, 0.9)), (3, Shift(0.0, 0.0)))
    file = Compared("a", (), shifts=(shifts,))
    assert [prompt for prompt, _ in moved_most(file)] == [2, 1, 0]
    assert moved_most(Compared("b", ())) == []


def run(label, unet, text, **more):
    config = {
        f"{section}.{key}": value
        for section, values in (("base", unet), ("text_encoder_overrides", text))
        for key, value in values.items()
    }
    return Planned(label, Path(label), 1, Path(), (), {**config, **more})


def test_files_are_named_by_optimizer_and_rate():
    adamw, slower = ({"optimizer": "adamw8bit", "lr": lr} for lr in (1e-6, 5e-7))
    dadapt = {"optimizer": "dadapt_adam", "lr": 0.1, "d0": 1e-6}
    found = names(
        [
            run("one", adamw, slower),
            run("two", dadapt, dadapt),
            run("three", adamw, dadapt),
            run("four", adamw, dadapt, disable_textenc_training=True),
            run("five", dadapt, dadapt),
        ]
    )
    assert found == {
        "one": "adamw8bit at 1e-6 / 5e-7",
        "two": "dadapt_adam at d x 0.1 (two)",
        "three": "adamw8bit at 1e-6 / dadapt_adam at d x 0.1",
        "four": "adamw8bit at 1e-6",
        "five": "dadapt_adam at d x 0.1 (five)",
    }


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_progress_shows_step_and_remaining_time(tmp_path):
    output, stream, clock = tmp_path / "output.txt", io.StringIO(), Clock()
    output.write_text("step 90/100: of an earlier start\n")
    progress = Progress(2, stream=stream, clock=clock)
    progress.start("1/2: a, seed 1", output)
    clock.now = 100
    progress.show()
    assert stream.getvalue() == "", "the run has not reported yet"
    with output.open("a") as file:
        file.write("epoch 1/4, step 25/100: loss 0.2\n")
    progress.show()
    assert stream.getvalue() == "1/2: a, seed 1: step 25/100, about 12 min left for all runs\n"
    clock.now = 130
    progress.show()
    assert stream.getvalue().count("\n") == 1, "a line a minute"
    clock.now = 400
    progress.end()
    progress.start("2/2: b, seed 1", tmp_path / "other.txt")
    assert progress.left(0.5) == 200
