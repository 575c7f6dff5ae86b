"""Messages about the course of d: once each, if it is stuck, falling back or running away."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainer.state_file import as_kind

if TYPE_CHECKING:
    from trainer.optim.dadapt import EstimateOptions

PATIENCE = 100
"""Optimizer steps of d at d0, of d_hat below 0, or of a flat d, before a message or a conclusion."""

FLAT = 1.01
"""The growth over `PATIENCE` steps up to which d counts as flat."""

RUNAWAY = 10.0
"""The growth after a flat stretch that is reported."""


@dataclass
class _Course:
    """Memory of one network's d between reports."""

    told: list[str] = field(default_factory=list)
    looks: list[list[float]] = field(default_factory=list)
    """Step and d, from the last look that was `PATIENCE` steps ago or more on."""
    negative_since: int | None = None
    level: float = 0.0
    """d where the present flat stretch began."""
    level_since: int = 0
    learned: bool = False
    """d started at a checkpoint's, so it need not rise."""
    plateau: float = 0.0
    """The last d that had been flat for long enough; 0 before there is one."""


class AdaptationWatch:
    """Follow d and d_hat of each network over the reports of a run.

    Args:
        options: of the optimizers that find their rate, by network.
        sections: the section of the optimizer file that sets each network's keys, for the sentences.
        learned: networks whose d starts at a checkpoint's.
    """

    def __init__(
        self,
        options: Mapping[str, EstimateOptions],
        sections: Mapping[str, str],
        learned: Collection[str] = (),
    ) -> None:
        self._options, self._sections = dict(options), dict(sections)
        self._courses = {network: _Course(learned=network in learned) for network in options}
        self.networks = tuple(options)

    def look(self, network: str, *, step: int, d: float, d_hat: float) -> list[str]:
        """Return the messages at optimizer step `step`, each once for a network."""
        course, d0, where = self._courses[network], self._options[network].first_d, self._sections[network]
        sentences: list[str] = []

        def say(what: str, sentence: str) -> None:
            if what not in course.told:
                course.told.append(what)
                sentences.append(f"step {step}: {sentence}")

        if d <= d0 and step >= PATIENCE and not course.learned:
            say(
                "stuck",
                f"d of the {network} has not left d0 ({d0:g}): the gradients of successive steps agree too "
                f"little to raise it, so the network learns next to nothing; raise {where}.lr towards 1.0, "
                f"or the images per step, or set {where}.d0 ten times higher.",
            )
        if d_hat >= 0:
            course.negative_since = None
        elif course.negative_since is None:
            course.negative_since = step
        elif step - course.negative_since >= PATIENCE:
            say(
                "negative",
                f"d_hat of the {network} has been below 0 since step {course.negative_since}: the gradients "
                "point back along the way the weights have come, so d no longer grows; that is the usual end "
                f"of the search, and if the loss rises too, lower {where}.lr.",
            )
        while course.looks and course.looks[-1][0] >= step:  # steps taken back, which trained nothing
            course.looks.pop()
        course.looks.append([step, d])
        while len(course.looks) > 1 and course.looks[1][0] <= step - PATIENCE:
            del course.looks[0]
        self._follow(course, step, d, d0)
        if (
            course.plateau
            and d >= RUNAWAY * course.plateau
            and (change := self._brakes(network, course.plateau))
        ):
            say(
                "runaway",
                f"d of the {network} is {d:.3g}, ten times the {course.plateau:.3g} at which it had come to "
                f"rest, and d never falls: look at the samples from before the rise, and {change}.",
            )
        return sentences

    def _brakes(self, network: str, rest: float) -> str | None:
        """Return the keys that brake a rise of d from `rest`, as a clause; None if rate_max has held it."""
        options, where = self._options[network], self._sections[network]
        rate = rest * (options.lr or 1.0) * getattr(options, "layer_scale", 1.0)
        if rate >= getattr(options, "rate_max", math.inf) * (1 - 1e-6):
            return None
        values = {"rate_max": f"{rate:.2g}", "d_max": f"{rest:.2g}", "growth_rate": "1.02"}
        known = [f"{where}.{key} {value}" for key, value in values.items() if hasattr(options, key)]
        return f"resume from that time with {' or '.join(known)}" if known else f"lower {where}.lr"

    def stuck(self, network: str, d: float) -> bool:
        """Return whether d is still at a d0 that was not learned before."""
        return d <= self._options[network].first_d and not self._courses[network].learned

    def settled(self, network: str, *, step: int, d: float) -> str:
        """Return how settled d is after `step`, as a clause: its growth over 100 steps, or its cap."""
        d_max = getattr(self._options[network], "d_max", math.inf)
        if d >= d_max * (1 - 1e-6):  # d_max is fp64, d may be fp32
            return f"held by {self._sections[network]}.d_max ({d_max:g}), so chosen rather than learned"
        earlier = [look for look in self._courses[network].looks if look[0] <= step - PATIENCE]
        if not earlier:
            return f"too early to tell whether d has settled, after {step} of {PATIENCE} steps"
        then, before = earlier[-1]
        grown = f"grew by {d / before - 1:.1%}" if d < 2 * before else f"is {d / before:.0f} times as large"
        over = f"d {grown} over the last {step - then:.0f} steps"
        return f"settled, {over}" if d <= FLAT * before else f"still rising, {over}"

    def _follow(self, course: _Course, step: int, d: float, d0: float) -> None:
        """Find the stretches where d is flat; d0 itself is no rest that d has come to."""
        if d > FLAT * course.level:
            course.level, course.level_since = d, step
        elif (d > d0 or course.learned) and step - course.level_since >= PATIENCE and not course.plateau:
            course.plateau = course.level

    def state_dict(self) -> dict[str, Any]:
        """Return the memory, so that a resumed run logs the messages of an unbroken one."""
        return {
            network: {key: value for key, value in vars(course).items() if key != "learned" or value}
            for network, course in self._courses.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the memory of `state_dict`."""
        self._courses |= {
            network: as_kind(_Course, state[network]) for network in self._courses if network in state
        }
