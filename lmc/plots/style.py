"""What all figures share."""

from __future__ import annotations

from matplotlib.axes import Axes

# Okabe and Ito's palette, told apart with any colour vision; markers repeat it without colour.
GREY, PURPLE, BLUE, SKY = "#BBBBBB", "#CC79A7", "#0072B2", "#56B4E9"
YELLOW, ORANGE, GREEN, AMBER = "#F0E442", "#D55E00", "#009E73", "#E69F00"


def tidy(axes: Axes) -> None:
    """No frame above and to the right, a faint grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
