"""The command line: `mmdd run | evaluate | inspect | sweep | doctor | …`.

Exit codes: 0 done; 1 a named failure, in one line on stderr, or points of a sweep that failed; 2
not understood or not possible as asked (unknown command, option, preset, key or value); 130
interrupted. Anything else is a defect and shows a traceback (1).
"""

import itertools
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
import yaml

from mmdd.errors import ConfigError, DownloadError, MmddError

MAKE, LOOK, SET_UP = "Make sets", "Look at sets and records", "Set up"
# A blank line between lines, or rich joins them.
_CODES = """Exit codes: 0 done, 1 a named failure, 2 not possible as asked, 130 interrupted.

Shell completion: mmdd --install-completion (bash, zsh, fish, PowerShell)."""


def _examples(*commands: str) -> str:
    return "\n\n".join(["Examples:", *(f"  mmdd {command}" for command in commands)])


app = typer.Typer(
    help="Multimodal dataset distillation: make small sets of image–text pairs, score them.",
    epilog=_examples(
        "doctor",
        "run --method covmatch --pairs 50 --preset tiny",
        "evaluate results/shown/scenes-covmatch-50.safetensors",
        "COMMAND --help",
    )
    + "\n\n"
    + _CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _completed(*kinds: str) -> Callable[[str], list[str]]:
    """What a shell offers for the names of `mmdd list`."""

    def offer(incomplete: str) -> list[str]:
        names = _names()
        return [name for kind in kinds for name in names[kind] if name.startswith(incomplete)]

    return offer


def _recorded(column: str) -> Callable[[typer.Context, str], list[str]]:
    """What a shell offers for `mmdd results`: the values of the records there are."""

    def offer(context: typer.Context, incomplete: str) -> list[str]:
        from mmdd.runs import load_results

        found = load_results(context.params.get("folder") or Path("results"))[column]
        return sorted(value for value in found.unique() if value.startswith(incomplete))

    return offer


Results = Annotated[Path, typer.Option(file_okay=False, help="Folder of the result records.")]
Data = Annotated[
    Path | None, typer.Option(file_okay=False, help="Folder of the dataset's files, for photos.")
]
Preset = Annotated[
    str,
    typer.Option(
        autocompletion=_completed("presets"),
        help="tiny, small, photos, gpu or paper (see mmdd list).",
    ),
]
SetFile = Annotated[Path, typer.Argument(dir_okay=False, help="A distilled set (.safetensors).")]
_PROTOCOLS = _completed("protocols")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value, for scripts.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="key=value of the run's configuration, such as settings.rho=1.5."),
]


@app.command(
    rich_help_panel=SET_UP,
    epilog=_examples("prepare flickr8k", "prepare coco --root /data"),
)
def prepare(
    source: Annotated[
        str,
        typer.Argument(
            autocompletion=_completed("sources"), help="flickr8k, flickr30k, coco, karpathy, …"
        ),
    ],
    root: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Where to put it; by default the cache."),
    ] = None,
) -> None:
    """Download a public source: checked, resumed after a break, unpacked safely."""
    from mmdd.data.download import fetch
    from mmdd.data.sources import SOURCES
    from mmdd.paths import cache_dir

    _require_known("source", source, list(SOURCES))
    paths = fetch(source, root)
    for name, path in paths.items():
        typer.echo(f"{name}: {path}")
    if source in ("flickr8k", "flickr30k", "coco"):
        listing = fetch("karpathy", root)
        name = f"dataset_{source}.json"
        found = next((f for p in listing.values() for f in p.rglob(name)), None)
        if found is None:
            raise DownloadError(f"{name} is not among Karpathy's files: {listing}.")
        folder = (root or cache_dir() / "downloads") / source
        shutil.copyfile(found, folder / name)
        typer.echo(f"ready: --data {folder}")


@app.command(
    rich_help_panel=MAKE,
    epilog=_examples(
        "run --method random --pairs 100 --preset tiny",
        "run --method lors --protocol image+text_head --pairs 99",
        "run --set settings.rho=1.5 --set evaluation.students=2 --json",
        "run --preset photos --protocol image+text_head --data path/to/flickr8k",
    ),
)
def run(
    method: Annotated[
        str,
        typer.Option(
            autocompletion=_completed("methods", "selections"),
            help="A method or selection (see mmdd list).",
        ),
    ] = "covmatch",
    pairs: Annotated[int, typer.Option(help="Pairs of the set.")] = 100,
    protocol: Annotated[
        str,
        typer.Option(autocompletion=_PROTOCOLS, help="image+text_head, both or heads."),
    ] = "both",
    seed: Annotated[int, typer.Option(help="Of the start and of the distillation.")] = 0,
    preset: Preset = "small",
    sweep: Annotated[str, typer.Option(help="The group that the record is filed under.")] = (
        "default"
    ),
    data: Data = None,
    results: Results = Path("results"),
    override: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole record.")] = False,
) -> None:
    """Distil (or select) a set, train students on it, score them, keep the record.

    A run that is finished is not repeated; one that was interrupted goes on from its checkpoint.
    """
    from mmdd.presets import preset as make
    from mmdd.runs import run as carry_out

    options = {"method": method, "pairs": pairs, "protocol": protocol, "seed": seed, "sweep": sweep}
    record = carry_out(make(preset, **_wishes(options, override, data)), results)
    typer.echo(json.dumps(record, indent=1) if as_json else _summary(record))


@app.command(
    rich_help_panel=LOOK,
    epilog=_examples(
        "evaluate results/shown/scenes-covmatch-50.safetensors",
        "evaluate SET --dataset scenes --protocol heads --json",
        "evaluate SET --dataset flickr8k --data path/to/flickr8k --protocol image+text_head",
        "evaluate SET --set evaluation.students=1 --set model.pair=scenes-vit",
    ),
)
def evaluate(
    file: SetFile,
    dataset: Annotated[
        str | None,
        typer.Option(help="scenes, flickr8k, … By default what the set was made from."),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            autocompletion=_PROTOCOLS,
            help="image+text_head, both or heads. By default the set's own.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            autocompletion=_completed("presets"),
            help="Encoders and students. By default those for the dataset.",
        ),
    ] = None,
    data: Data = None,
    override: Overrides = None,
    as_json: Json = False,
) -> None:
    """Train students on any distilled set and score them on a dataset under a protocol."""
    from mmdd.sets import config_for, score_file
    from mmdd.synthetic import SyntheticPairs

    wishes = _wishes({}, override, data)
    pairs = SyntheticPairs.load(file)
    config = config_for(pairs, dataset, protocol, preset, wishes)
    _require_data(config.dataset.name, config.dataset.reader, config.runtime.data)
    scored = score_file(file, config)
    if as_json:
        typer.echo(json.dumps(scored, indent=1))
        return
    for student in scored["students"]:
        typer.echo(f"student {student['student_seed']}: mean {student['test']['mean']:.2f}")
    spread = "" if scored["std"] is None else f" ± {scored['std']:.2f}"
    typer.echo(
        f"{scored['pairs']} pairs on {scored['dataset']['name']}, protocol {scored['protocol']}, "
        f"{scored['model']}: mean recall {scored['mean']:.2f}{spread} "
        f"(chance {scored['chance']:.2f})"
    )
    if not scored["dataset"]["made_from_it"]:
        typer.echo("note: the set was made from other data than those it is scored on", err=True)


@app.command(
    rich_help_panel=LOOK,
    epilog=_examples("inspect SET --draw set.png", "inspect SET --json"),
)
def inspect(
    file: SetFile,
    draw: Annotated[Path | None, typer.Option(help="A PNG file to draw its images to.")] = None,
    as_json: Json = False,
) -> None:
    """Print what a distilled set is and where it is from; draw it."""
    from mmdd.sets import describe_file
    from mmdd.synthetic import SyntheticPairs

    if draw is not None and draw.suffix.lower() != ".png":
        raise ConfigError(f"--draw {draw}: name a PNG file, such as {draw.with_suffix('.png')}.")
    if draw is not None and not draw.parent.is_dir():
        raise ConfigError(f"--draw {draw}: there is no folder {draw.parent}: make it first.")
    about = describe_file(file)
    if draw is not None:
        from PIL import Image

        from mmdd.plots import image_grid

        images = SyntheticPairs.load(file).images
        grid = image_grid(images.permute(0, 2, 3, 1).numpy())
        Image.fromarray(grid).save(draw)
        about["drawn_to"] = str(draw)
    if as_json:
        typer.echo(json.dumps(about, indent=1))
        return
    rates, metadata = about.pop("learning_rates"), about.pop("metadata")
    shown = {key: value for key, value in metadata.items() if not isinstance(value, list | dict)}
    rates = ", ".join(f"{part} {rate:.3g}" for part, rate in rates.items())
    about["size"] = f"{about.pop('num_bytes') / 1e3:,.0f} kB"
    about["beyond black and white"] = f"{100 * about.pop('outside'):.1f} % of pixel values"
    for key, value in [*about.items(), ("learned rates", rates or "none"), *shown.items()]:
        typer.echo(f"{key.replace('_', ' '):<24} {_told(value)}")


@app.command(
    rich_help_panel=LOOK,
    epilog=_examples(
        "export SET out",
        "export SET out --as dataset",
        "export SET out.safetensors --as tensors --test test.safetensors",
    ),
)
def export(
    file: SetFile,
    to: Annotated[Path, typer.Argument(help="The folder, or file, to write.")],
    form: Annotated[
        Literal["folder", "dataset", "tensors"],
        typer.Option(
            "--as", help="PNG files and a table; a Hugging Face dataset with a card; one file."
        ),
    ] = "folder",
    test: Annotated[
        Path | None,
        typer.Option(help="Also write the test split of the set's dataset as plain tensors here."),
    ] = None,
    data: Data = None,
) -> None:
    """Write a distilled set in a form that other code reads without mmdd."""
    from mmdd.export import export_dataset, export_folder, export_tensors, export_test_split
    from mmdd.synthetic import SyntheticPairs

    pairs = SyntheticPairs.load(file)
    config = None
    if test is not None:  # what is wrong with it is told before anything is written
        from mmdd.sets import config_for

        config = config_for(pairs, wishes=_wishes({}, None, data))
        _require_data(config.dataset.name, config.dataset.reader, config.runtime.data)
    forms = {"folder": export_folder, "dataset": export_dataset, "tensors": export_tensors}
    typer.echo(f"written: {forms[form](pairs, to)}")
    if test is not None and config is not None:
        typer.echo(f"written: {export_test_split(config, test)}")


@app.command(
    name="list",
    rich_help_panel=LOOK,
    epilog=_examples("list", "list methods", "list encoders --json"),
)
def list_(
    kind: Annotated[
        Literal["methods", "selections", "presets", "sources", "encoders", "protocols"] | None,
        typer.Argument(help="One kind of names; by default all of them."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the names that commands take: methods, presets, encoders, what can be prepared."""
    names = _names()
    if kind is not None:
        names = {kind: names[kind]}
    if as_json:
        typer.echo(json.dumps(names, indent=1))
        return
    for title, members in names.items():
        typer.echo(f"{title:<11} {', '.join(members)}")


@app.command(
    rich_help_panel=LOOK,
    epilog=_examples("results --method covmatch", "results --dataset scenes --pairs 50 --json"),
)
def results(
    folder: Annotated[
        Path, typer.Argument(file_okay=False, help="Folder of the result records.")
    ] = Path("results"),
    dataset: Annotated[
        str | None, typer.Option(autocompletion=_recorded("dataset"), help="Only this dataset.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(autocompletion=_recorded("protocol"), help="Only this protocol.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(autocompletion=_recorded("method"), help="Only this method.")
    ] = None,
    pairs: Annotated[int | None, typer.Option(help="Only this budget.")] = None,
    sweep: Annotated[
        str | None, typer.Option(autocompletion=_recorded("sweep"), help="Only this sweep.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the records of a results folder: one line per run, mean recall over its students."""
    from mmdd.runs import load_results, summarise

    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder of records.")
    rows = load_results(folder)
    asked = {"dataset": dataset, "protocol": protocol, "method": method, "sweep": sweep}
    names = _names()
    possible = {"method": names["methods"] + names["selections"], "protocol": names["protocols"]}
    for column, name in asked.items():
        if name is not None:  # one that exists but has no record is no mistake
            there = sorted(rows[column].unique())
            _require_known(column, name, list(dict.fromkeys(possible.get(column, []) + there)))
    for column, value in (asked | {"pairs": pairs}).items():
        rows = rows if value is None else rows[rows[column] == value]
    keys = ["sweep", "run_id", "dataset", "protocol", "method", "pairs", "seed", "stale"]
    table = summarise(rows, keys).drop(columns="seeds")
    if as_json:
        typer.echo(table.to_json(orient="records", indent=1))
    elif table.empty:
        typer.echo("no record fits", err=True)
    else:
        typer.echo(table.round(2).to_string(index=False))


@app.command(
    rich_help_panel=MAKE,
    epilog=_examples(
        "sweep sweeps/scenes_covmatch.yaml --jobs 2",
        "sweep sweeps/*.yaml --scheduler tcp://host:8786 --resource GPU=1",
    ),
)
def sweep(
    files: Annotated[list[Path], typer.Argument(help="Grids in YAML, see sweeps/.")],
    jobs: Annotated[int, typer.Option(min=1, help="Worker processes at a time.")] = 1,
    scheduler: Annotated[
        str | None, typer.Option(help="A Dask scheduler instead, tcp://host:port.")
    ] = None,
    resource: Annotated[
        list[str] | None, typer.Option(help="What a point takes of a Dask worker, such as GPU=1.")
    ] = None,
    retries: Annotated[int, typer.Option(min=0, help="Of a point that failed.")] = 1,
    data: Data = None,
    results: Results = Path("results"),
    pack: Annotated[bool, typer.Option(help="Pack the records into one file at the end.")] = True,
    redo_stale: Annotated[
        bool, typer.Option("--redo-stale", help="Run points again whose record older code made.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Run no more points of a grid than this.")
    ] = None,
) -> None:
    """Carry out every point of grids that is not done yet, through papermill."""
    from mmdd.grid import load_sweep, read_sweep
    from mmdd.store import ResultsStore
    from mmdd.sweep import queue_of_chapters, queue_of_runs, run_jobs

    # What ends a batch job ends its kernels too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    how: dict[str, Any] = {
        "processes": jobs,
        "scheduler": scheduler,
        "resources": {k: float(v) for k, v in map(_assignment, resource or [])},
        "retries": retries,
    }
    runtime: dict[str, Any] = {"threads": 1, "redo_stale": redo_stale}
    if data is not None:
        runtime["data"] = str(data.resolve())
    store = ResultsStore(results)
    grids = []
    for file in files:
        grid = read_sweep(file)[0]
        points = None if grid.notebook is not None else load_sweep(file, runtime)
        grids.append((file, grid.sweep, points))
    queues = []  # of all files: a mistake in the last one is told before the first one runs
    # Grids of runs share one queue, so that no process waits for the last point of each.
    for of_runs, together in itertools.groupby(grids, key=lambda grid: grid[2] is not None):
        if of_runs:
            points = [point for *_, points in together for point in points or ()]
            queues.append(queue_of_runs(points, store, limit=limit))
        else:
            queues += [queue_of_chapters(file, store, limit) for file, *_ in together]
    failed: dict[tuple[str, str], str] = {}  # by sweep and run
    for queue in queues:
        sweep_of = {job.name: job.sweep for job in queue.jobs}
        found = run_jobs(queue, store, **how)
        failed |= {(sweep_of[name], name): error for name, error in found.items()}
    for (name, run_id), error in failed.items():
        where = store.working_folder(name) / "errors" / f"{run_id}.txt"
        typer.echo(f"\nFAILED {run_id} (all of it in {where}):\n{error}", err=True)
    for name in dict.fromkeys(name for _, name, _ in grids):
        # Points that another sweep has done leave nothing to pack here.
        if pack and any(store.working_folder(name).glob("*.json")):
            typer.echo(f"packed into {store.pack(name)}")
    raise typer.Exit(code=1 if failed else 0)


@app.command(
    rich_help_panel=MAKE,
    epilog=_examples("experts --method mtt --jobs 2", "experts --set settings.experts.count=20"),
)
def experts(
    method: Annotated[
        str,
        typer.Option(autocompletion=_completed("methods"), help="A method that follows experts."),
    ] = "mtt",
    protocol: Annotated[
        str,
        typer.Option(autocompletion=_PROTOCOLS, help="image+text_head, both or heads."),
    ] = "image+text_head",
    preset: Preset = "small",
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = 1,
    cluster: Annotated[str | None, typer.Option(help="A Dask scheduler, tcp://host:port.")] = None,
    data: Data = None,
    override: Overrides = None,
) -> None:
    """Train the experts of a run ahead of it, several at a time."""
    from mmdd.expert_jobs import train_all
    from mmdd.presets import preset as make

    wishes = _wishes({"method": method, "protocol": protocol}, override, data)
    buffer = train_all(make(preset, **wishes), jobs, cluster)
    typer.echo(
        f"{len(buffer)} experts, {buffer.snapshots + 1} snapshots each, {buffer.seconds:.0f} s, "
        f"{buffer.num_bytes / 1e6:.1f} MB in {buffer.folder}"
    )


@app.command(rich_help_panel=SET_UP, epilog=_examples("doctor", "doctor --json"))
def doctor(as_json: Json = False) -> None:
    """Tell versions, devices, threads, caches, and what each preset still needs."""
    from mmdd.doctor import examine, report

    found = examine()
    typer.echo(json.dumps(found, indent=1) if as_json else report(found))


def _names() -> dict[str, list[str]]:
    """What there is of each kind of names."""
    from typing import get_args

    from mmdd.data.sources import SOURCES
    from mmdd.distill import METHODS
    from mmdd.encoders.pairs import PAIRS
    from mmdd.presets import PresetName
    from mmdd.protocols import PROTOCOLS
    from mmdd.selection import SELECTORS

    return {
        "methods": [*METHODS, "full"],
        "selections": list(SELECTORS),
        "presets": list(get_args(PresetName)),
        "sources": list(SOURCES),
        "encoders": list(PAIRS),
        "protocols": list(PROTOCOLS),
    }


def _require_known(what: str, name: str, known: list[str]) -> None:
    """Raise `ConfigError` with the nearest name for one that nothing has."""
    from mmdd.mistakes import suggestion

    if name not in known:
        there = ", ".join(known) or "none"
        raise ConfigError(f"{what} {name!r} is unknown; known: {there}{suggestion(name, known)}")


def _require_data(name: str, reader: str, folder: str | None) -> None:
    """Raise `ConfigError` for a dataset that is read from a folder which nobody named."""
    from mmdd.mistakes import suggestion

    if reader != "scenes" and folder is None:
        near = suggestion(name, ["scenes"])
        raise ConfigError(
            f"dataset {name!r} is read from disk: name its folder with --data (`mmdd prepare` "
            f"tells how to get one){near}"
        )


def _wishes(
    options: dict[str, Any], override: list[str] | None, data: Path | None
) -> dict[str, Any]:
    """What was asked for on the command line: `--set` wins over options, `--data` over both."""
    from mmdd.grid import nest
    from mmdd.presets import merge

    wishes = merge(options, nest(dict(_assignment(text) for text in override or [])))
    if data is not None:
        wishes.setdefault("runtime", {})["data"] = str(data)
    return wishes


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise typer.BadParameter(f"{text!r} is not of the form key=value.")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"{text!r}: the value is no YAML ({error}).") from error


def _told(value: Any) -> str:
    """A value as a person reads it: a shape as 3 × 32 × 32, numbers and names as they are."""
    if isinstance(value, list):
        return " × ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    return str(value)


def _summary(record: dict[str, Any]) -> str:
    from mmdd.sets import mean_and_std

    means = [student["test"]["mean"] for student in record["students"]]
    centre, spread = mean_and_std(means)
    config = record["config"]
    return (
        f"{config['method']} on {record['dataset']['name']}, protocol {record['protocol']}, "
        f"{config.get('pairs', 'all')} pairs: mean recall {centre:.2f} ± {spread or 0:.2f} "
        f"({len(means)} students; chance {record['chance']['mean']:.2f}). "
        f"Record {record['run_id']} in sweep {record['sweep']}."
    )


def main() -> None:
    """The entry point: a deliberate error is one line and an exit code, not a traceback."""
    from pydantic import ValidationError

    try:
        app(prog_name="mmdd")
    except ValidationError as error:
        from mmdd.grid import explain

        _stop(explain(error), error, 2)
    except ConfigError as error:
        _stop(str(error), error, 2)
    except MmddError as error:
        _stop(str(error), error, 1)
    except OSError as error:  # a full disk, a folder that may not be written to
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _stop(f"{where}{error.strerror}", error, 1)
    except SystemExit as ended:
        if ended.code == 130:
            typer.echo("mmdd: interrupted; the same command goes on from what is done.", err=True)
        raise


def _stop(message: str, error: Exception, code: int) -> NoReturn:
    typer.echo(f"mmdd: {message}", err=True)
    raise SystemExit(code) from error


if __name__ == "__main__":
    main()
