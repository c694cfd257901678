"""What every notebook uses: one start, figures with alternative text, widgets, and checks of exercises."""

from genailab_helpers.lessons.exercises import check
from genailab_helpers.lessons.figures import image_grid, shortcut_figure, show
from genailab_helpers.lessons.seeding import start_lesson
from genailab_helpers.lessons.widgets import explore

__all__ = ["check", "explore", "image_grid", "shortcut_figure", "show", "start_lesson"]
