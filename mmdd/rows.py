"""Which records a table compares: those of the presets, by configuration and never by sweep."""

import pandas as pd
from pydantic import ValidationError

from mmdd.errors import ConfigError
from mmdd.presets import PresetName, preset

_PRESETS: tuple[PresetName, ...] = ("small", "photos")


def preset_rows(results: pd.DataFrame) -> pd.DataFrame:
    """The rows whose run is a preset's, with only method, budget, protocol and seed chosen.

    results: rows of `load_results`. The preset is "small" for Scenes and "photos" for Flickr8k; a
    run counts when the run id that the preset gives today is its own. So every method and budget
    of a dataset and protocol is left with one configuration, the tuned one and its own start, in
    whatever sweep the record is filed. The full data are trained for as many epochs as a sweep
    asks for, not for those of a small set: of those records the longest training is taken.

    Book: notebooks/09_comparison.
    """
    runs = results.drop_duplicates("run_id")
    kept = [row["run_id"] for row in runs.to_dict("records") if _is_a_preset(row)]
    found = results[results["run_id"].isin(kept)].drop_duplicates(["run_id", "student_seed"])
    epochs = found["config"].map(lambda config: config["evaluation"]["epochs"])
    full = found["method"].eq("full")
    longest = epochs[full].groupby([found["dataset"], found["protocol"]]).transform("max")
    shorter = longest.index[epochs[longest.index] < longest]
    return found.drop(index=shorter)


def _is_a_preset(row: dict) -> bool:
    wishes = {"method": row["method"], "protocol": row["protocol"], "seed": int(row["seed"])}
    if row["method"] == "full":
        # Nor does it matter how often its students were looked at on their way.
        had = row["config"]["evaluation"]
        wishes["evaluation"] = {key: had[key] for key in ("epochs", "scores")}
    else:
        wishes["pairs"] = int(row["pairs"])
    for name in _PRESETS:
        try:
            point = preset(name, **wishes)
        except (ConfigError, ValidationError):  # a method that this version does not have
            continue
        if point.dataset.name == row["dataset"] and point.run_id == row["run_id"]:
            return True
    return False
