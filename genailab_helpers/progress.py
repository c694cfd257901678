"""How far a training is, by steps or by the clock, and its bar. Both trainings use it."""

import time
from typing import Self

from tqdm.auto import tqdm


class Progress:
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
        if n_steps is None and minutes is None:
            raise ValueError("how long to train? Give n_epochs, n_steps or minutes")
        for name, number in (("n_steps", n_steps), ("minutes", minutes)):
            if number is not None and number <= 0:
                raise ValueError(f"{name}={number}: expected more than 0")
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
        by_steps = self.steps / self.n_steps if self.n_steps else 0.0
        return max(by_steps, self.seconds / (60 * self.minutes) if self.minutes else 0.0)

    def step(self, loss: float) -> None:
        """Count a step and show its loss."""
        self.steps += 1
        self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self._bar.update()

    def __enter__(self) -> Self:
        """Begin; the bar ends with the block."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the bar."""
        self._bar.close()
