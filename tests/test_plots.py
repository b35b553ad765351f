"""The figures: what they show, not how they look."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex

from mmdd.plots import (
    METHOD_COLOURS,
    heat_map,
    image_grid,
    loss_curves,
    recall_bars,
    set_style,
    show_images,
    show_pairs,
)
from mmdd.synthetic import SyntheticPairs


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def results() -> pd.DataFrame:
    rows = []
    for method, pairs, scores in (
        ("random", 50, [10, 12, 14]),
        ("random", 100, [15, 17, 19]),
        ("covmatch", 50, [30, 31, 32]),
        ("covmatch", 100, [35, 36, 40]),
        ("full", 4000, [60, 62, 64]),
    ):
        for score in scores:
            rows.append({"method": method, "pairs": pairs, "mean": score, "IR@1": score / 2})
    return pd.DataFrame(rows).assign(chance_mean=1.8)


def test_image_grid() -> None:
    images = np.stack([np.full((2, 3, 3), 10 * i, np.uint8) for i in range(5)])
    grid = image_grid(images, columns=3, gap=1)
    assert grid.shape == (2 * 3 - 1, 3 * 4 - 1, 3)
    assert (grid[:2, :3] == 0).all()
    assert (grid[:2, 4:7] == 10).all()
    assert (grid[3:5, 4:7] == 40).all()
    assert (grid[2] == 255).all()  # the gap
    assert (grid[3:, 8:] == 255).all()  # the place of a sixth image
    assert image_grid(images[:2], columns=12).shape == (2, 7, 3)
    assert image_grid(images[:1], columns=12).shape == (2, 3, 3)


def test_distilled_images_are_clipped() -> None:
    images = np.array([-3.0, 0.0, 0.5, 1.0, 9.0]).reshape(5, 1, 1, 1).repeat(3, axis=3)
    grid = image_grid(images, columns=5, gap=0)
    assert grid[0, :, 0].tolist() == [0, 0, 127, 255, 255]


def test_show_pairs() -> None:
    pairs = SyntheticPairs(torch.rand(30, 3, 4, 4), torch.rand(30, 6))
    figure = show_pairs(pairs, count=24, columns=12, title="Distilled")
    (axes,) = figure.axes
    (shown,) = axes.get_images()
    assert shown.get_array().shape == (2 * 5 - 1, 12 * 5 - 1, 3)
    assert axes.get_title() == "Distilled"
    first = shown.get_array()[:4, :4] / 255
    np.testing.assert_allclose(first, pairs.images[0].permute(1, 2, 0), atol=1 / 255)
    assert show_images(np.zeros((1, 4, 4, 3), np.uint8)).axes


def test_loss_curves() -> None:
    history = {"iteration": [0.0, 10.0, 20.0], "loss": [3.0, 2.0, 1.0], "means": [1.0, 1.0, 0.5]}
    figure = loss_curves(history)
    assert [axes.get_title() for axes in figure.axes] == ["loss", "means"]
    line = figure.axes[0].lines[0]
    assert line.get_xdata().tolist() == [0.0, 10.0, 20.0]
    assert line.get_ydata().tolist() == [3.0, 2.0, 1.0]


def test_recall_bars(results: pd.DataFrame) -> None:
    axes = recall_bars(results, ["random", "covmatch"])
    heights = sorted(round(bar.get_height(), 3) for bar in axes.patches if bar.get_height() > 0)
    assert heights == [12.0, 17.0, 31.0, 37.0]
    colours = {to_hex(bar.get_facecolor()) for bar in axes.patches}
    assert len(colours) == 2
    # Error bars are one standard deviation, not the standard error.
    spans = sorted(
        round(float(np.ptp(line.get_ydata()[~np.isnan(line.get_ydata())])), 3)
        for line in axes.lines
        if len(line.get_ydata()) > 2
    )
    assert spans == [2.0, 4.0, 4.0, 5.292]  # twice the deviation
    levels = [line.get_ydata()[0] for line in axes.lines if len(line.get_ydata()) == 2]
    assert 1.8 in levels
    assert 62.0 in levels
    assert [label.get_text() for label in axes.get_xticklabels()] == ["50", "100"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["random", "covmatch"]
    assert axes.get_ylabel() == "mean recall (%)"


def test_recall_bars_without_full_data(results: pd.DataFrame) -> None:
    axes = plt.subplots()[1]
    some = results[results["method"] != "full"]
    assert recall_bars(some, ["covmatch"], axes=axes, metric="IR@1") is axes
    assert axes.get_ylabel() == "IR@1 (%)"
    assert not axes.texts


def test_colours_can_be_told_apart() -> None:
    colours = {to_hex(c) for c in METHOD_COLOURS.values()}
    assert len(colours) == len(METHOD_COLOURS)
    lightness = [
        float(np.array(plt.matplotlib.colors.to_rgb(METHOD_COLOURS[m])) @ [0.3, 0.6, 0.1])
        for m in ("random", "covmatch")
    ]
    assert abs(lightness[0] - lightness[1]) > 0.2


def test_set_style() -> None:
    with plt.rc_context():
        set_style()
        assert plt.rcParams["figure.facecolor"] == "white"
        assert plt.rcParams["savefig.bbox"] == "tight"


def test_heat_map() -> None:
    table = pd.DataFrame({"a": [1.0, 20.0], "b": [float("nan"), 40.0]}, index=["x", "y"])
    axes = heat_map(table, "shares", decimals=1)
    assert [text.get_text() for text in axes.texts] == ["1.0", "20.0", "40.0"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["x", "y"]
    assert axes.get_title() == "shares"
    colours = axes.collections[0].get_facecolors()  # of all four cells, row by row
    lightness = colours[[0, 2, 3], :3].sum(axis=1)
    assert lightness[0] > lightness[1] > lightness[2]
    empty = heat_map(table * float("nan"), "nothing yet")
    assert [text.get_text() for text in empty.texts] == []


def test_heat_map_can_say_more_than_the_number_and_show_a_relief() -> None:
    table = pd.DataFrame([[30.0, 34.0], [np.nan, 32.0]])
    labels = table.map("{:.0f}\nstd".format)
    axes = heat_map(table, "a plane", labels=labels, low=None)
    assert [text.get_text() for text in axes.texts] == ["30\nstd", "34\nstd", "32\nstd"]
    assert axes.collections[0].get_clim() == (30, 34)
    plt.close("all")
    assert heat_map(table, "from nothing").collections[0].get_clim() == (0, 34)
    assert len(heat_map(table * np.nan, "empty", low=None).texts) == 0
