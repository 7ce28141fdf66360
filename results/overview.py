"""The README's first picture: learning curves of three studies, from their CSV files here.

python results/overview.py results/overview.png
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.report import COLOURS, Run, read_csv

PANELS = {  # study -> title; minutes per run by results/README.md
    "quickstart": "point mass, small maze: 3 min a run",
    "maze2d-medium": "point mass, medium maze: 3 min a run",
    "antmaze": "ant, small maze: 17 to 23 min a run",
}
HERE = Path(__file__).resolve().parent
LINES = dict(zip(("Cal-QL", "CQL"), COLOURS))


def draw(axes, runs: list[Run]) -> None:
    """Each seed thin, their mean thick; the offline phase shaded."""
    for method, colour in LINES.items():
        seeds = [run for run in runs if run.method == method]
        for run in seeds:
            axes.plot(run.positions(), run.scores, color=colour, alpha=0.3, linewidth=0.8)
        mean = np.mean([run.scores for run in seeds], 0)
        axes.plot(seeds[0].positions(), mean, color=colour, linewidth=2.2, label=method)
    axes.axvspan(-runs[0].switch, 0, color="0.93", zorder=0)
    axes.set_xlim(-runs[0].switch, runs[0].end - runs[0].switch)
    axes.margins(y=0.16)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.spines[["top", "right"]].set_visible(False)
    for x, words in ((-runs[0].switch / 2, "offline"), (axes.get_xlim()[1] / 2, "online")):
        place = axes.get_xaxis_transform()
        axes.text(x, 0.97, words, transform=place, ha="center", va="top", color="0.3", size=10)


def main(path: str) -> None:
    figure = Figure((11, 3.6), layout="constrained")
    title = "Cal-QL learns from a dataset, then keeps learning in the environment"
    figure.suptitle(f"{title}: minutes on one CPU core", size=13, weight="bold")
    panels = figure.subplots(1, len(PANELS))
    for axes, (study, words) in zip(panels, PANELS.items()):
        draw(axes, read_csv(HERE / f"{study}.csv"))
        axes.set_title(words, size=11)
        axes.set_xlabel("updates on data | environment steps")
    panels[0].set_ylabel("normalized score")
    panels[0].legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(sys.argv[1])
