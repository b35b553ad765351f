"""Draw the README's and the landing page's pictures from what is committed.

Run as `python tools/draw_result.py`. `book/result.png` has the scores of CovMatch under two
protocols; `book/landing.png` has fifty real pictures, what the distillation made of them, and what
students of either, and of all the data, find; `book/landing_phone.png` the same for a narrow
screen. The numbers that a picture shows are kept in it
(`Description`), and a test compares them with the records.
"""

from pathlib import Path

import matplotlib.pyplot as plt

from mmdd.ablations import in_sweeps
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
    rows = results[in_sweeps(results, ROOT / "sweeps", "scenes-covmatch")]
    rows = rows[rows["protocol"].eq("image+text_head")]
    found = {}
    for method in ("random", "covmatch", "full"):
        some = rows[rows["method"].eq(method)]
        some = some if method == "full" else some[some["pairs"].eq(50)]
        found[method] = (float(some["mean"].mean()), float(some["mean"].std()))
    return found


def description(scores: dict[str, tuple[float, float]]) -> str:
    return "; ".join(f"{name} {mean:.1f} ± {std:.1f}" for name, (mean, std) in scores.items())


def draw_landing(phone: bool) -> None:
    """The landing page's picture; for a phone with the bars below the pictures."""
    config = preset("small", **SHOWN[SET])
    dataset, model = open_dataset(config.dataset, config.runtime), build_model(config.model)
    distilled = SyntheticPairs.load(ROOT / "results" / "shown" / f"{SET}.safetensors")
    start = start_of(distilled, dataset, model)
    scores = landing_scores()
    total = len(dataset.indices("train"))

    if phone:  # 4.6 inches on 390 pixels: 10 points are 12 pixels
        figure = plt.figure(figsize=(4.6, 3.3))
        grid = figure.add_gridspec(
            2, 2, height_ratios=[1.25, 1], wspace=0.06, hspace=0.5,
            left=0.02, right=0.98, top=0.92, bottom=0.02,
        )  # fmt: skip
        places, titles, sizes = (
            (grid[0, 0], grid[0, 1], grid[1, :]),
            ("50 real", "50 distilled"),
            10,
        )
    else:
        figure = plt.figure(figsize=(9.2, 2.72))
        grid = figure.add_gridspec(1, 3, width_ratios=[1, 1, 0.6], wspace=0.08)
        places, sizes = (grid[0], grid[1], grid[2]), 12
        titles = ("50 real pairs, at random", "50 pairs, distilled from them")
    for column, (pairs, method, title) in enumerate(
        zip((start, distilled), ("random", "covmatch"), titles, strict=True)
    ):
        axes = figure.add_subplot(places[column])
        images = pairs.images.clamp(0, 1).permute(0, 2, 3, 1).numpy()
        axes.imshow(image_grid(images, columns=10), interpolation="nearest")
        axes.set_title(title, fontsize=sizes)
        axes.set_xlabel(
            f"{scores[method][0]:.1f} %", fontsize=round(1.6 * sizes), fontweight="bold"
        )
        axes.set(xticks=[], yticks=[])
        for side in axes.spines.values():
            side.set_visible(False)
    axes = figure.add_subplot(places[2])
    names = ("50 real", "50 distilled", f"all {total:,}")
    colours = (METHOD_COLOURS["random"], METHOD_COLOURS["covmatch"], "#555555")
    means, deviations = zip(*scores.values(), strict=True)
    axes.barh(names, means, xerr=deviations, color=colours, error_kw={"capsize": 3})
    for place, (name, mean, deviation) in enumerate(zip(names, means, deviations, strict=True)):
        told = f"{name}: {mean:.1f} %" if phone else f"{name}\n{mean:.1f} %"
        axes.text(mean + deviation + 2, place, told, va="center", fontsize=sizes - 1)
    axes.invert_yaxis()
    axes.set(yticks=[], xlim=(0, 105), xticks=[])
    axes.set_title("found by students", fontsize=sizes)
    axes.grid(False)
    for border in ("top", "right", "bottom"):
        axes.spines[border].set_visible(False)
    name = "landing_phone.png" if phone else "landing.png"
    figure.savefig(ROOT / "book" / name, dpi=160, metadata={"Description": description(scores)})


def draw_result() -> None:
    results = load_results(ROOT / "results")
    scenes = results[in_sweeps(results, ROOT / "sweeps", "scenes-covmatch")]
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
    draw_landing(phone=False)
    draw_landing(phone=True)


if __name__ == "__main__":
    main()
