"""The published tables are whole, consistent with themselves, and found by any name."""

import pandas as pd
import pytest

from mmdd.errors import ConfigError
from mmdd.paths import data_file
from mmdd.presets import preset
from mmdd.published import RECALLS, disagreements, published

# (first word of source, dataset, pairs, method) whose printed mean contradicts the printed recalls
CONTRADICTIONS = {
    ("MDM", "flickr30k", 500, "lors"),
    ("MDM", "coco", 100, "herding"),
    ("MDM", "flickr30k", 500, "herding"),
}


def test_every_row_of_every_table_is_there():
    table = published()
    assert len(table) == 156
    counts = table["source"].str.split(n=1).str[0].value_counts().to_dict()
    assert counts == {"MDM": 75, "LoRS": 44, "CovMatch": 37}
    assert not table.duplicated(["source", "dataset", "pairs", "method", "protocol"]).any()
    # one full-data row for each dataset of LoRS and MDM, one for CovMatch
    assert table["pairs"].isna().sum() == 6
    assert (table["pairs"].isna() == (table["method"] == "full")).all()


@pytest.mark.parametrize(
    ("source", "methods", "datasets"), [("LoRS", 7, 2), ("CovMatch", 6, 2), ("MDM", 8, 3)]
)
def test_each_table_is_a_full_grid(source, methods, datasets):
    table = published(source=source, pairs=[100, 200, 500])
    assert len(table) == methods * datasets * 3
    assert table["method"].nunique() == methods
    assert table["dataset"].nunique() == datasets


def test_printed_means_are_the_means_of_the_recalls_except_where_the_note_says_so():
    table = published()
    complete = table.dropna(subset=list(RECALLS))
    assert len(complete) == 155
    off = (complete[list(RECALLS)].mean(axis=1) - complete["mean"]).abs() > 0.05 + 1e-9
    contradicting = {
        (row["source"].split()[0], row["dataset"], int(row["pairs"]), row["method"])
        for _, row in complete[off].iterrows()
    }
    assert contradicting == CONTRADICTIONS
    assert complete.loc[off, "note"].str.contains("printed").all()
    # besides these, only the number that is not from a paper carries a note
    assert (table["note"] != "").sum() == len(CONTRADICTIONS) + 1


def test_recalls_are_percentages_that_grow_with_k():
    table = published().dropna(subset=list(RECALLS))
    values = table[list(RECALLS)]
    assert ((values >= 0) & (values <= 100)).all(axis=None)
    for direction in ("IR", "TR"):
        at_1, at_5, at_10 = (table[f"{direction}@{k}"] for k in (1, 5, 10))
        assert (at_1 < at_5).all()
        assert (at_5 < at_10).all()


def test_lors_and_the_papers_that_repeat_it_agree_but_for_the_misprint():
    keys = ["dataset", "pairs", "method"]
    repeated = ["mtt", "lors", "tesla-wbce"]
    lors = published(source="LoRS", method=repeated)
    for other in ("CovMatch", "MDM"):
        both = lors.merge(published(source=other, method=repeated), on=keys)
        assert len(both) >= 12
        different = {
            (row["dataset"], row["pairs"], row["method"], name)
            for _, row in both.iterrows()
            for name in RECALLS
            if row[f"{name}_x"] != row[f"{name}_y"]
        }
        misprint = {("flickr30k", 500, "lors", "TR@5")}
        assert different == (misprint if other == "MDM" else set())


def test_a_known_row():
    (row,) = published("flickr30k", 500, "covmatch").to_dict("records")
    assert [row[name] for name in RECALLS] == [14.7, 38.4, 51.4, 19.9, 46.7, 59.5]
    assert (row["mean"], row["protocol"], row["note"]) == (38.4, "both", "")


def test_filters_take_one_value_several_or_the_papers_spelling():
    by_project = published(method="mtt")
    assert set(by_project["printed_name"]) == {"MTT-VL"}
    pd.testing.assert_frame_equal(by_project, published(method="MTT-VL"))
    assert set(published(pairs=(100, 200))["pairs"]) == {100, 200}
    assert set(published(pairs="full")["method"]) == {"full"}
    assert set(published(protocol="both")["source"].str.split().str[0]) == {"CovMatch"}


def test_a_filter_may_leave_nothing_without_being_wrong():
    assert len(published("flickr8k", method="covmatch")) == 0


def test_the_caller_may_change_what_it_gets():
    mine = published()
    mine["mean"] = 0.0
    assert published()["mean"].gt(0).all()


@pytest.mark.parametrize(
    ("filters", "known"),
    [
        ({"dataset": "imagenet"}, "'flickr30k'"),
        ({"pairs": 150}, "'500', 'full'"),
        ({"method": ["lors", "magic"]}, "'tesla-wbce'"),
        ({"protocol": "heads"}, "'image+text_head'"),
        ({"source": "Nature"}, "'MDM'"),
    ],
)
def test_an_unknown_value_is_refused_with_the_known_ones(filters, known):
    with pytest.raises(ConfigError) as caught:
        published(**filters)
    (column,) = filters
    assert f"no {column}" in str(caught.value)
    assert known in str(caught.value)
    assert "'lors' in" not in str(caught.value), "only the unknown value is complained about"


def test_the_ablations_of_lors_agree_with_its_main_table():
    table = pd.read_csv(data_file("published/lors_table5.csv")).set_index("number")
    assert list(table.index) == list(range(1, 18))
    recalls = table[list(RECALLS)]
    assert ((recalls >= 0) & (recalls <= 100)).all(axis=None)
    for direction in ("IR", "TR"):
        assert (recalls[f"{direction}@1"] < recalls[f"{direction}@5"]).all()
        assert (recalls[f"{direction}@5"] < recalls[f"{direction}@10"]).all()
    for number, method in ((6, "lors"), (13, "tesla-wbce")):  # without a similarity it is TESLA
        (main,) = published("flickr30k", 200, method, source="LoRS").to_dict("records")
        assert [main[name] for name in RECALLS] == recalls.loc[number].tolist()


def test_the_choices_of_covmatch_are_those_of_the_preset_paper():
    table = pd.read_csv(data_file("published/covmatch_ablations.csv"), dtype=str)
    assert not table.duplicated(["axis", "dataset"]).any()
    keys = {
        "rho": "rho",
        "lambda": "lambda_",
        "update": "update",
        "real batch": "real_batch",
        "frozen encoder": "freeze",
        "reset period": "reset_every",
        "temperature": "temperature",
    }
    compared = 0
    for row in table[table["axis"].isin(keys)].to_dict("records"):
        datasets = ("flickr30k", "coco") if pd.isna(row["dataset"]) else (row["dataset"],)
        for dataset in datasets:
            for pairs in (100, 200, 500):
                wishes = {"dataset": {"name": dataset, "reader": "karpathy"}, "pairs": pairs}
                settings = preset("paper", method="covmatch", **wishes).settings.model_dump()
                chosen = row[f"chosen_{pairs}"]
                value = settings[keys[row["axis"]]]
                assert chosen == value or float(chosen) == value, (row["axis"], dataset, pairs)
                compared += 1
    assert compared == 6 * len(keys)


def test_the_ablations_of_mdm_agree_with_themselves_and_the_main_table():
    table = pd.read_csv(data_file("published/mdm_ablations.csv"))
    assert not table.duplicated(["group", "variant"]).any()
    assert set(table["source"]) == {"presentation", "supplement"}
    printed = table.dropna(subset=["IR", "TR"])
    assert ((printed["IR"] + printed["TR"]) / 2 - printed["mean"]).abs().max() <= 0.1 + 1e-9
    (main,) = published("flickr8k", 100, "mdm").to_dict("records")
    for group, rows in table.groupby("group"):
        # The method itself is the best row of every ablation, to the rounding of the tables.
        assert rows["mean"].max() == pytest.approx(main["mean"], abs=0.15), group
    (random,) = table.loc[table["variant"].eq("random"), "mean"]
    assert random < main["mean"]


def test_the_cost_of_mdm_multiplies():
    table = pd.read_csv(data_file("published/mdm_cost.csv"))
    minutes = table["seconds_per_iteration"] * table["iterations_to_best"] / 60
    assert (minutes - table["minutes"]).abs().max() < 0.01 * table["minutes"].max()


def test_the_cross_architecture_tables_agree_with_what_is_printed_beside_them():
    table = pd.read_csv(data_file("published/cross_architecture.csv")).fillna({"unseen": ""})
    assert not table.duplicated(
        ["source", "dataset", "pairs", "method", "image_encoder", "text_encoder"]
    ).any()
    assert table["mean"].between(0, 100).all()
    counts = table["source"].str.split().str[0].value_counts()
    assert counts.to_dict() == {"MDM": 108, "CovMatch": 32, "LoRS": 6}
    unseen = table[table["unseen"].eq("yes") & table["source"].str.startswith("MDM")]
    means = unseen.groupby(["dataset", "pairs", "method"])["mean"].agg(["mean", "size"])
    assert means["size"].eq(5).all()
    printed = {  # LoRS and MDM at 100, 200 and 500 pairs
        "flickr8k": (10.3, 13.9, 11.6, 15.6, 10.2, 16.2),
        "flickr30k": (9.9, 16.1, 12.2, 17.4, 14.5, 19.3),
        "coco": (2.5, 6.1, 3.1, 8.7, 2.4, 9.8),
    }
    for dataset, values in printed.items():
        assert means["mean"][dataset].tolist() == pytest.approx(values, abs=0.1)
    # On the encoders of the distillation MDM's slide repeats its own main table.
    own = table[table["unseen"].eq("no") & table["source"].str.startswith("MDM")]
    for row in own.to_dict("records"):
        found = published(row["dataset"], row["pairs"], row["method"], source="MDM")
        assert found["mean"].tolist() == [row["mean"]]


def test_the_newer_peers_are_means_or_recalls_in_order():
    table = pd.read_csv(data_file("published/peers.csv"))
    assert len(table) == 8
    assert not table.duplicated(["source", "dataset", "pairs", "method"]).any()
    assert set(table["protocol"]) == {"image+text_head", "heads"}
    assert (table["mean"].notna() | table["IR@1"].notna()).all()
    assert table["mean"].dropna().between(0, 100).all()
    recalls = table.dropna(subset=["IR@1"])
    assert (recalls["IR@1"] < recalls["IR@5"]).all()
    assert (recalls["IR@5"] < recalls["IR@10"]).all()
    # RepBlend's own figures grow with the budget
    repblend = table[table["method"].eq("repblend")].set_index(["dataset", "pairs"])["mean"]
    for dataset in ("flickr30k", "coco"):
        assert repblend[dataset].is_monotonic_increasing


def test_the_variances_of_lors_are_larger_for_image_text_data_in_every_column():
    table = pd.read_csv(data_file("published/lors_table6.csv")).set_index("dataset")
    assert table["kind"].value_counts().to_dict() == {"classes": 7, "image-text": 3}
    values = table.drop(columns=["kind", "images"])
    assert values.shape == (10, 3)
    multimodal = table["kind"].eq("image-text")
    # The claim of the paper's Fig. 2, which a slip of the decimal point would break.
    assert (values[multimodal].min() > values[~multimodal].max()).all()
    assert (values.max() < 4 * values.min()).all()


def test_papers_that_disagree_are_found_and_those_that_agree_are_not():
    apart = disagreements()
    typo = apart.xs(("flickr30k", "500", "lors"), level=("dataset", "pairs", "method"))
    assert list(typo.index) == ["TR@5"]  # the means agree
    assert typo.loc["TR@5", ["LoRS", "CovMatch", "MDM"]].to_list() == [39.8, 39.8, 29.8]
    means = apart.xs("mean", level="quantity")
    full = means.loc[("flickr30k", "full", "full")]
    assert full[["LoRS", "MDM", "CovMatch"]].to_list() == [54.7, 55.7, 75.7]
    assert full["difference"] == 21.0
    assert full["protocols"] == "image+text_head / both"
    # 24.9 and 25.0 are one number rounded twice
    assert ("flickr30k", "500", "mtt") not in means.index
    assert disagreements(above=100.0).empty
