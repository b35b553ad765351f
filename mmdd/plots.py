"""The book's figures: one colour per method, error bars of one standard deviation, references."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mmdd.synthetic import SyntheticPairs

# Okabe and Ito's palette: told apart with every common kind of colour blindness, and by lightness.
METHOD_COLOURS = {
    "chance": "#999999",
    "random": "#E69F00",
    "herding": "#C2A05A",
    "k-center": "#A6761D",
    "forgetting": "#882255",
    "k-means": "#117733",
    "k-means-image": "#44AA99",
    "k-means-text": "#88CCEE",
    "clip-filter": "#AA4499",
    "dc": "#B0B0D0",
    "dm": "#8A8ABF",
    "mtt": "#56B4E9",
    "tesla": "#009E73",
    "tesla-wbce": "#7FCDBB",
    "lors": "#F0E442",
    "lors-wbce": "#D9C700",
    "lors-ence": "#F7F0A0",
    "mdm": "#CC79A7",
    "repblend": "#D55E00",
    "amd": "#8C3B00",
    "cov-trajectory": "#004F3B",
    "cov-similarity": "#3E6FA3",
    "cov-blend": "#7F9FC4",
    "moment-trajectory": "#4B2E83",
    "covmatch": "#0072B2",
    "moments": "#7B68C8",
    "full": "#444444",
}


def set_style() -> None:
    """Fonts and lines for figures that are read at 600 pixels' width."""
    sns.set_theme(context="notebook", style="whitegrid", font_scale=1.0)
    plt.rcParams |= {
        "figure.dpi": 110,
        "savefig.bbox": "tight",
        "axes.titlesize": "medium",
        "figure.facecolor": "white",
        "legend.frameon": False,
    }


def image_grid(images: np.ndarray, columns: int = 12, gap: int = 1) -> np.ndarray:
    """Tile (n, H, W, 3) images into one picture with white gaps; clipped to what can be shown."""
    shown = images if images.dtype == np.uint8 else (np.clip(images, 0, 1) * 255).astype(np.uint8)
    n, height, width, _ = shown.shape
    rows = -(-n // columns)
    columns = min(columns, n)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(shown):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def show_pairs(
    pairs: SyntheticPairs, count: int = 24, columns: int = 12, title: str | None = None
) -> Figure:
    """The first images of a set in a grid. Book: notebooks/00_start."""
    return show_images(_to_numpy(pairs.images[:count]), columns, title)


def show_images(images: np.ndarray, columns: int = 12, title: str | None = None) -> Figure:
    """Images (n, H, W, 3) in a grid, without interpolation between pixels."""
    grid = image_grid(images, columns)
    figure, axes = plt.subplots(figsize=(9, 9 * grid.shape[0] / grid.shape[1] + 0.3))
    axes.imshow(grid, interpolation="nearest")
    axes.set_axis_off()
    if title:
        axes.set_title(title)
    return figure


def _to_numpy(images: Tensor) -> np.ndarray:
    return images.detach().cpu().permute(0, 2, 3, 1).numpy()


def loss_curves(history: Mapping[str, Sequence[float]]) -> Figure:
    """Every term of a distillation over its iterations, one panel each."""
    names = [name for name in history if name != "iteration"]
    figure, axes = plt.subplots(1, len(names), figsize=(2.6 * len(names), 2.4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        values = np.asarray(history[name])
        axis.plot(np.linspace(0, max(history["iteration"]), len(values)), values, lw=1)
        axis.set_title(name)
        axis.set_xlabel("iteration")
    figure.tight_layout()
    return figure


def recall_bars(
    results: pd.DataFrame, methods: Sequence[str], axes: Axes | None = None, metric: str = "mean"
) -> Axes:
    """Mean recall against budget as grouped bars, with chance and full data as lines.

    results: rows of `load_results` of one dataset and one protocol. Error bars are one standard
    deviation over all students of all distillation seeds. The legend lies below: a phone shows no
    more than the width of the bars at once. Book: notebooks/07_covmatch.
    """
    axes = axes or plt.subplots(figsize=(5.6, 3.4))[1]
    shown = results[results["method"].isin(methods)]
    sns.barplot(
        shown,
        x="pairs",
        y=metric,
        hue="method",
        hue_order=list(methods),
        palette={m: METHOD_COLOURS.get(m, "#7A7A7A") for m in methods},
        errorbar="sd",
        saturation=1,
        capsize=0.15,
        err_kws={"linewidth": 1.2},
        ax=axes,
    )
    axes.axhline(results["chance_mean"].iloc[0], color=METHOD_COLOURS["chance"], ls=":", lw=1.5)
    full = results.loc[results["method"] == "full", metric]
    if len(full):
        axes.axhline(full.mean(), color=METHOD_COLOURS["full"], ls="--", lw=1.5)
        axes.set_ylim(top=max(axes.get_ylim()[1], 1.15 * full.mean()))  # room for the line's name
        axes.text(0.01, full.mean(), "full data", transform=axes.get_yaxis_transform(), va="bottom")
    axes.set_xlabel("pairs")
    axes.set_ylabel("mean recall (%)" if metric == "mean" else f"{metric} (%)")
    axes.legend(
        title=None,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=min(len(methods), 4),
        columnspacing=1.2,
        handlelength=1.4,
    )
    return axes


def heat_map(
    table: pd.DataFrame,
    title: str,
    axes: Axes | None = None,
    decimals: int = 0,
    labels: pd.DataFrame | None = None,
    low: float | None = 0.0,
) -> Axes:
    """A table of numbers as coloured cells with the numbers in them, larger is darker.

    table: (rows, columns) of floats; NaN stays an empty cell. labels: other texts for the cells, of
    the same shape. low: the number of the lightest colour; None takes the smallest of the table,
    which shows a relief and hides how high it stands. Lightness grows in one direction, so that the
    colours keep their order in grey and for every kind of colour blindness.
    Book: notebooks/13_cross_architecture.
    """
    known = bool(table.notna().any(axis=None))
    if low is None:
        low = float(np.nanmin(table.to_numpy(dtype=float))) if known else 0.0
    axes = axes or plt.subplots(figsize=(1.0 * len(table.columns) + 2, 0.42 * len(table) + 0.8))[1]
    sns.heatmap(
        table.astype(float),
        annot=True if labels is None else labels,
        fmt=f".{decimals}f" if labels is None else "",
        cmap=sns.color_palette("blend:#f4f8fb,#0b3c5d", as_cmap=True),
        vmin=low,
        vmax=table.max(axis=None) if known else 1,
        cbar=False,
        linewidths=1,
        annot_kws={"size": "medium"},
        ax=axes,
    )
    axes.grid(False)  # it would show in empty cells
    axes.set(title=title, xlabel="", ylabel="")
    axes.tick_params(axis="x", rotation=30)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right")
    return axes
