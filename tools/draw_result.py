"""Draw the README's and the landing page's pictures from what is committed.

Run as `python tools/draw_result.py`. `book/result.png` has the scores of CovMatch under two
protocols; `book/landing.png` has fifty real pictures, what the distillation made of them, and what
students of either, and of all the data, find. The numbers that a picture shows are kept in it
(`Description`), and a test compares them with the records.
"""

from pathlib import Path

import matplotlib.pyplot as plt

from mmdd.data.open import open_dataset
from mmdd.encoders import build_model
from mmdd.gallery import SHOWN, start_of
from mmdd.plots import METHOD_COLOURS, image_grid, recall_bars, set_style
from mmdd.presets import preset
from mmdd.runs import load_results
from mmdd.synthetic import SyntheticPairs

ROOT = Path(__file__).resolve().parent.parent
SET = "scenes-covmatch-50"


def landing_scores() -> dict[str, tuple[float, float]]:
    """Mean recall and its deviation over all students: 50 random, 50 distilled, all pairs."""
    results = load_results(ROOT / "results")
    rows = results[
        results["sweep"].eq("scenes-covmatch") & results["protocol"].eq("image+text_head")
    ]
    found = {}
    for method in ("random", "covmatch", "full"):
        some = rows[rows["method"].eq(method)]
        some = some if method == "full" else some[some["pairs"].eq(50)]
        found[method] = (float(some["mean"].mean()), float(some["mean"].std()))
    return found


def description(scores: dict[str, tuple[float, float]]) -> str:
    return "; ".join(f"{name} {mean:.1f} ± {std:.1f}" for name, (mean, std) in scores.items())


def draw_landing() -> None:
    config = preset("small", **SHOWN[SET])
    dataset, model = open_dataset(config.dataset, config.runtime), build_model(config.model)
    distilled = SyntheticPairs.load(ROOT / "results" / "shown" / f"{SET}.safetensors")
    start = start_of(distilled, dataset, model)
    scores = landing_scores()
    total = len(dataset.indices("train"))

    figure = plt.figure(figsize=(9.2, 2.72))
    across = figure.add_gridspec(1, 3, width_ratios=[1, 1, 0.6], wspace=0.08)
    titles = ("50 real pairs, at random", "50 pairs, distilled from them")
    for column, (pairs, method, title) in enumerate(
        zip((start, distilled), ("random", "covmatch"), titles, strict=True)
    ):
        axes = figure.add_subplot(across[column])
        images = pairs.images.clamp(0, 1).permute(0, 2, 3, 1).numpy()
        axes.imshow(image_grid(images, columns=10), interpolation="nearest")
        axes.set_title(title, fontsize=12)
        axes.set_xlabel(f"{scores[method][0]:.1f} %", fontsize=19, fontweight="bold")
        axes.set(xticks=[], yticks=[])
        for side in axes.spines.values():
            side.set_visible(False)
    axes = figure.add_subplot(across[2])
    names = ("50 real", "50 distilled", f"all {total:,}")
    colours = (METHOD_COLOURS["random"], METHOD_COLOURS["covmatch"], "#555555")
    means, deviations = zip(*scores.values(), strict=True)
    axes.barh(names, means, xerr=deviations, color=colours, error_kw={"capsize": 3})
    for place, (name, mean, deviation) in enumerate(zip(names, means, deviations, strict=True)):
        axes.text(mean + deviation + 2, place, f"{name}\n{mean:.1f} %", va="center", fontsize=11)
    axes.invert_yaxis()
    axes.set(yticks=[], xlim=(0, 105), xticks=[])
    axes.set_title("found by students", fontsize=12)
    axes.grid(False)
    for border in ("top", "right", "bottom"):
        axes.spines[border].set_visible(False)
    figure.savefig(
        ROOT / "book" / "landing.png", dpi=160, metadata={"Description": description(scores)}
    )


def draw_result() -> None:
    results = load_results(ROOT / "results")
    scenes = results[results["sweep"] == "scenes-covmatch"]
    figure, panels = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
    for axes, protocol in zip(panels, ("both", "image+text_head"), strict=True):
        recall_bars(scenes[scenes["protocol"] == protocol], ["random", "covmatch"], axes)
        axes.set_title(f"protocol {protocol}")
    panels[0].get_legend().remove()
    figure.tight_layout()
    figure.savefig(ROOT / "book" / "result.png", dpi=110)


def main() -> None:
    set_style()
    draw_result()
    draw_landing()


if __name__ == "__main__":
    main()
