"""Draw the README's picture from the committed records: `python tools/draw_result.py`."""

from pathlib import Path

import matplotlib.pyplot as plt

from mmdd.plots import recall_bars, set_style
from mmdd.runs import load_results

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    set_style()
    results = load_results(ROOT / "results")
    scenes = results[results["sweep"] == "scenes-covmatch"]
    figure, panels = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
    for axes, protocol in zip(panels, ("both", "image+text_head"), strict=True):
        recall_bars(scenes[scenes["protocol"] == protocol], ["random", "covmatch"], axes)
        axes.set_title(f"protocol {protocol}")
    panels[0].get_legend().remove()
    figure.tight_layout()
    figure.savefig(ROOT / "book" / "result.png", dpi=110)


if __name__ == "__main__":
    main()
