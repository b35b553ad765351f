"""The command line: `mmdd prepare | run | evaluate | sweep | experts | doctor`."""

import json
import shutil
import signal
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from mmdd.errors import ConfigError, DownloadError, MmddError

app = typer.Typer(
    help="Multimodal dataset distillation: run, evaluate and sweep.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Results = Annotated[Path, typer.Option(help="Folder of the result records.")]
Data = Annotated[Path | None, typer.Option(help="Folder of the dataset's files, for photos.")]


@app.command()
def prepare(
    source: Annotated[str, typer.Argument(help="flickr8k, flickr30k, coco, karpathy, …")],
    root: Annotated[
        Path | None, typer.Option(help="Where to put it; by default the cache.")
    ] = None,
) -> None:
    """Download a public source: checked, resumed after a break, unpacked safely."""
    from mmdd.data.download import fetch
    from mmdd.paths import cache_dir

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


@app.command()
def run(
    method: str = "covmatch",
    pairs: int = 100,
    protocol: str = "both",
    seed: int = 0,
    preset: Annotated[str, typer.Option(help="tiny, small, photos, gpu or paper.")] = "small",
    sweep: str = "default",
    data: Data = None,
    results: Results = Path("results"),
    override: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, such as settings.rho=1.5")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole record.")] = False,
) -> None:
    """Distil (or select) a set, train students on it, score them, keep the record."""
    from mmdd.presets import preset as make
    from mmdd.runs import run as carry_out

    options = {"method": method, "pairs": pairs, "protocol": protocol, "seed": seed, "sweep": sweep}
    record = carry_out(make(preset, **_wishes(options, override, data)), results)
    typer.echo(json.dumps(record, indent=1) if as_json else _summary(record))


@app.command()
def evaluate(
    file: Annotated[Path, typer.Argument(help="A distilled set (.safetensors).")],
    protocol: Annotated[str, typer.Option(help="image+text_head, both or heads.")] = "both",
    preset: Annotated[str, typer.Option(help="Which data, encoders and students.")] = "small",
    data: Data = None,
) -> None:
    """Train students on any distilled set and score them under a protocol."""
    from mmdd.presets import preset as make
    from mmdd.runs import evaluate_file

    runtime = {} if data is None else {"data": str(data)}
    config = make(preset, method="random", protocol=protocol, runtime=runtime)
    students = evaluate_file(file, config)
    for student in students:
        typer.echo(f"student {student['student_seed']}: mean {student['test']['mean']:.2f}")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A distilled set (.safetensors).")],
    draw: Annotated[Path | None, typer.Option(help="A PNG file to draw its images to.")] = None,
) -> None:
    """Print what a distilled set is and where it is from; draw it."""
    from mmdd.synthetic import SyntheticPairs

    pairs = SyntheticPairs.load(file)
    typer.echo(repr(pairs))
    for key, value in pairs.metadata.items():
        if not isinstance(value, list | dict):
            typer.echo(f"{key:<20} {value}")
    similarity = "identity" if pairs.similarity is None else pairs.similarity.kind
    typer.echo(f"{'similarity':<20} {similarity}")
    rates = ", ".join(f"{part} {rate:.3g}" for part, rate in pairs.learning_rates.items())
    typer.echo(f"{'learned rates':<20} {rates or 'none'}")
    if draw is not None:
        from PIL import Image

        from mmdd.plots import image_grid

        grid = image_grid(pairs.images.permute(0, 2, 3, 1).numpy())
        Image.fromarray(grid).save(draw)
        typer.echo(f"{'drawn to':<20} {draw}")


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="A distilled set (.safetensors).")],
    to: Annotated[Path, typer.Argument(help="The folder, or file, to write.")],
    form: Annotated[
        str, typer.Option("--as", help="folder (PNG and a table), dataset (with a card), tensors.")
    ] = "folder",
) -> None:
    """Write a distilled set in a form that other code reads without mmdd."""
    from mmdd.export import export_dataset, export_folder, export_tensors
    from mmdd.synthetic import SyntheticPairs

    forms = {"folder": export_folder, "dataset": export_dataset, "tensors": export_tensors}
    if form not in forms:
        raise ConfigError(f"unknown form {form!r}; known: {', '.join(forms)}.")
    typer.echo(f"written: {forms[form](SyntheticPairs.load(file), to)}")


@app.command()
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
    from mmdd.sweep import run_chapters, run_sweep

    # What ends a batch job ends its kernels too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    how: dict[str, Any] = {
        "processes": jobs,
        "scheduler": scheduler,
        "resources": {k: float(v) for k, v in map(_assignment, resource or [])},
        "retries": retries,
        "limit": limit,
    }
    runtime: dict[str, Any] = {"threads": 1, "redo_stale": redo_stale}
    if data is not None:
        runtime["data"] = str(data.resolve())
    store = ResultsStore(results)
    grids = []
    for file in files:  # a mistake in the last one is told before the first one runs
        grid = read_sweep(file)[0]
        points = None if grid.notebook is not None else load_sweep(file, runtime)
        grids.append((file, grid.sweep, points))
    any_failed = False
    for file, name, points in grids:
        if points is None:
            failed = run_chapters(file, results, **how)
        else:
            failed = run_sweep(points, results, **how)
        any_failed |= bool(failed)
        for run_id, error in failed.items():
            where = store.working_folder(name) / "errors" / f"{run_id}.txt"
            typer.echo(f"\nFAILED {run_id} (all of it in {where}):\n{error}", err=True)
        # Points that another sweep has done leave nothing to pack here.
        if pack and any(store.working_folder(name).glob("*.json")):
            typer.echo(f"packed into {store.pack(name)}")
    raise typer.Exit(code=1 if any_failed else 0)


@app.command()
def experts(
    method: Annotated[str, typer.Option(help="A method that follows experts.")] = "mtt",
    protocol: str = "image+text_head",
    preset: Annotated[str, typer.Option(help="tiny, small, photos, gpu or paper.")] = "small",
    jobs: Annotated[int, typer.Option(help="Processes at a time.")] = 1,
    cluster: Annotated[str | None, typer.Option(help="A Dask scheduler, tcp://host:port.")] = None,
    data: Data = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="such as settings.experts.count=20")
    ] = None,
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


@app.command()
def doctor() -> None:
    """Tell versions, device, threads, caches, and which presets can run here."""
    from mmdd.doctor import report

    typer.echo(report())


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
    return key, yaml.safe_load(value)


def _summary(record: dict[str, Any]) -> str:
    means = [student["test"]["mean"] for student in record["students"]]
    centre = sum(means) / len(means)
    spread = (sum((m - centre) ** 2 for m in means) / max(1, len(means) - 1)) ** 0.5
    config = record["config"]
    return (
        f"{config['method']} on {record['dataset']['name']}, protocol {record['protocol']}, "
        f"{config.get('pairs', 'all')} pairs: mean recall {centre:.2f} ± {spread:.2f} "
        f"({len(means)} students; chance {record['chance']['mean']:.2f}). "
        f"Record {record['run_id']} in sweep {record['sweep']}."
    )


def main() -> None:
    """The entry point: a deliberate error is one line and exit code 2, not a traceback."""
    from pydantic import ValidationError

    try:
        app()
    except ValidationError as error:
        from mmdd.grid import explain

        typer.echo(f"mmdd: {explain(error)}", err=True)
        raise SystemExit(2) from error
    except MmddError as error:
        typer.echo(f"mmdd: {error}", err=True)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
