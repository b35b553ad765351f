"""Draw how data flow through the package, from what its modules import.

Run as `python tools/draw_architecture.py`; writes `book/architecture.svg`. The stages and which
module belongs to which are written down here; the arrows, their widths and the dashed exceptions
are counted in the code. A module that no stage names is an error, and a test compares the picture
with the code of today.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "book" / "architecture.svg"

# In the order in which data flow: a stage may import what stands before it.
STAGES: dict[str, tuple[str, ...]] = {
    "Ground": (
        *("errors", "mistakes", "disk", "seal", "files", "paths", "devices", "provenance"),
        *("allocator", "_torchvision"),
    ),
    "Losses": ("losses", "similarity", "statistics", "synthetic", "retrieval"),
    "Data": ("data",),
    "Models": ("encoders", "protocols", "batches"),
    "Students and experts": ("evaluation", "experts", "snapshots", "interpolation"),
    "Selection": ("selection",),
    "Distillation": ("distill",),
    "Runs": (
        *("config", "combinations", "grid", "presets", "store", "results", "runs"),
        *("expert_jobs", "board", "sweep"),
    ),
    "Readers of records": (
        *("rows", "tables", "costs", "variance", "significance", "ablations", "targets"),
        *("storage", "published", "claims"),
    ),
    "Figures and files": ("plots", "gallery", "sets", "export"),
    "Command line": ("doctor", "__main__"),
}
SAYS = {
    "Ground": "atomic files, folders, errors that name things",
    "Losses": "pure functions; the distilled set as a file",
    "Data": "readers, checks and caches: PairDataset",
    "Models": "image and text encoders; what a protocol trains",
    "Students and experts": "training on a set; recall on real data",
    "Selection": "real pairs to keep, or to start from",
    "Distillation": "one loop; a file for each family of methods",
    "Runs": "a configuration becomes one record",
    "Readers of records": "tables, tests and verdicts from records",
    "Figures and files": "what pages and other programs show",
    "Command line": "the same functions, for a shell",
}


def modules(package: Path) -> Iterator[tuple[str, Path]]:
    """Each file of the package, with the module or subpackage directly below it that it is in."""
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).parts[0].removesuffix(".py")
        if name != "__init__":
            yield name, path


def imported(source: str) -> set[str]:
    """The modules and subpackages directly below mmdd that a source imports when it runs."""
    tree = ast.parse(source)
    for node in ast.walk(tree):  # what is imported for the type checker alone moves no data
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "mmdd":
            names = [f"mmdd.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found |= {name.split(".")[1] for name in names if name.startswith("mmdd.")}
    return found


def imports_between_stages(package: Path = ROOT / "mmdd") -> Counter[tuple[str, str]]:
    """(from, to) → how many files of stage `to` import something of stage `from`.

    Raises `SystemExit` for a module that `STAGES` does not name, and for a name without module.
    """
    stage_of = {module: stage for stage, members in STAGES.items() for module in members}
    present = {name for name, _ in modules(package)}
    if present != set(stage_of):
        sys.exit(
            "STAGES in tools/draw_architecture.py does not fit mmdd/: "
            f"without a stage {sorted(present - set(stage_of))}, "
            f"no longer there {sorted(set(stage_of) - present)}"
        )
    counts: Counter[tuple[str, str]] = Counter()
    for name, path in modules(package):
        stages = {stage_of[m] for m in imported(path.read_text(encoding="utf-8")) if m in stage_of}
        counts.update((stage, stage_of[name]) for stage in stages - {stage_of[name]})
    return counts


def svg(counts: Counter[tuple[str, str]]) -> str:
    """The picture: stages from top to bottom, imports as arcs (but for the ground's)."""
    order = list(STAGES)
    left, width, height, step = 20, 580, 62, 80
    right = left + width
    total = 20 + step * len(order)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 {total}" role="img" '
        "font-family=\"'Segoe UI', Roboto, 'DejaVu Sans', Helvetica, Arial, sans-serif\">",
        "<title>How data flow through the package mmdd</title>",
        '<defs><marker id="to" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="9" '
        'markerHeight="9" markerUnits="userSpaceOnUse" orient="auto">'
        '<path d="M0 0 10 5 0 10Z" fill="context-stroke"/></marker></defs>',
    ]
    for (source, target), count in sorted(counts.items()):
        if source == "Ground":  # everything stands on it: its arrows would hide the others
            continue
        a, b = order.index(source), order.index(target)
        reach = right + 34 + 25 * abs(b - a)
        # Ends are spread over the side of a box: those that come from afar end at its top.
        start = 20 + step * a + height * (0.5 + 0.04 * (b - a))
        end = 20 + step * b + height * (0.5 - 0.04 * (b - a))
        colour, dash = ("#3b6fb6", "") if a < b else ("#c2410c", ' stroke-dasharray="6 5"')
        lines.append(
            f'<path d="M{right} {start:.1f}C{reach} {start:.1f} {reach} {end:.1f} '
            f'{right + 2} {end:.1f}" fill="none" stroke="{colour}" stroke-opacity="0.75" '
            f'stroke-width="{min(1 + 0.4 * (count - 1), 5):.1f}"{dash} marker-end="url(#to)">'
            f"<title>{escape(target)} imports {escape(source)} in {count} "
            f"{'file' if count == 1 else 'files'}</title></path>"
        )
    for place, stage in enumerate(order):
        y = 20 + step * place
        named = ", ".join(STAGES[stage])
        lines += [
            f'<rect x="{left}" y="{y}" width="{width}" height="{height}" rx="10" fill="#1f4e79"/>',
            f'<text x="{left + 14}" y="{y + 24}" font-size="17" font-weight="600" fill="#fff">'
            f'{stage}<tspan font-size="13.5" font-weight="400" dx="10">{SAYS[stage]}</tspan>'
            "</text>",
            f'<text x="{left + 14}" y="{y + 47}" font-size="{13 if len(named) < 70 else 10}" '
            f'font-family="\'DejaVu Sans Mono\', Consolas, monospace" fill="#dbe7f3">{named}'
            "</text>",
        ]
    return "\n".join([*lines, "</svg>\n"])


def main() -> None:
    PICTURE.write_text(svg(imports_between_stages()), encoding="utf-8")
    print(f"wrote {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
