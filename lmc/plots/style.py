"""What all figures share."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

# Okabe and Ito's palette, told apart with any colour vision; markers repeat it without colour.
GREY, PURPLE, BLUE, SKY = "#BBBBBB", "#CC79A7", "#0072B2", "#56B4E9"
YELLOW, ORANGE, GREEN, AMBER = "#F0E442", "#D55E00", "#009E73", "#E69F00"


def log_across(axes: Axes, labels: Any) -> None:
    """A logarithmic x axis over what is drawn, labelled within a decade too.

    labels: a formatter, or what `Axis.set_major_formatter` makes one of.
    """
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.xaxis.set_major_formatter(labels)
    axes.xaxis.set_minor_formatter(NullFormatter())


def tidy(axes: Axes) -> None:
    """No frame above and to the right, a faint grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
