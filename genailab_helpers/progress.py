"""How far a training is, by steps or by the clock, and its bar. Both trainings use it."""

import math
import time
from contextlib import AbstractContextManager

from tqdm.auto import tqdm


class Progress(AbstractContextManager["Progress"]):
    """Count the steps of a training and tell which share of it is done.

    Parameters
    ----------
    n_steps : int, optional
        Length in steps.
    minutes : float, optional
        Length in minutes. At least one of the two has to be given; whichever is reached first ends it.
    show : bool, default True
        Whether to draw a bar.
    steps, seconds : int and float, default 0
        What an earlier part of the same training has taken.

    Raises
    ------
    ValueError
        If neither length is given, or one is not above 0.
    """

    def __init__(self, n_steps: int | None, minutes: float | None, show: bool = True, steps: int = 0,
                 seconds: float = 0.0) -> None:
        lengths = [length for length in (n_steps, minutes) if length is not None]
        if min(lengths, default=0) <= 0:
            raise ValueError(f"n_steps={n_steps}, minutes={minutes}: give n_epochs, n_steps or minutes > 0")
        self.n_steps, self.minutes, self.steps = n_steps, minutes, steps
        self._started = time.monotonic() - seconds
        self._bar = tqdm(total=n_steps, initial=steps, desc="training", unit="step", disable=not show)

    @property
    def seconds(self) -> float:
        """Time spent, interruptions not counted."""
        return time.monotonic() - self._started

    @property
    def share(self) -> float:
        """0 at the beginning, 1 or more at the end."""
        return max(self.steps / (self.n_steps or math.inf), self.seconds / (60 * (self.minutes or math.inf)))

    def step(self, loss: float) -> None:
        """Count a step and show its loss."""
        self.steps += 1
        self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self._bar.update()

    def __exit__(self, *error: object) -> None:
        """End the bar."""
        self._bar.close()
