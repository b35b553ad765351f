"""CPU seconds and memory of an iteration against the number of synthetic pairs, on Scenes.

    python benchmarks/budgets.py [--methods covmatch mdm …] [--repeats 5]

Each method at each budget runs in a process of its own, with this project's encoders and tuned
settings under the protocol `image+text_head`; within a method the budgets take turns, one iteration
each, so that all of them meet the same load. CPU seconds are those that the process worked on one
thread, medians; memory is what is resident at the peak above what the process held between
iterations. Experts are trained for a few steps: time does not depend on how well. Results go to
budgets.json. Linux only: peaks are the kernel's count.
"""

import argparse
import json
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from _measure import Timer, Worker, load, machine, require_peaks, serve, write
from mdm import build

RECORD = Path(__file__).with_suffix(".json")
METHODS = ("covmatch", "mdm", "mtt", "lors", "repblend", "moments", "moment-trajectory")
BUDGETS = (25, 50, 100, 200, 500)


def answer(method_name: str, pairs: int, folder: Path) -> None:
    """What a process does: says when it is ready, then iterations when asked to."""
    import torch

    torch.set_num_threads(1)
    method = build("scenes-tiny", method_name, folder, pairs)

    def iterate(iteration: int) -> dict[str, Any]:
        method.optimizer.zero_grad(set_to_none=True)
        with Timer() as timer:
            method.backward(iteration)
            method.optimizer.step()
            method.after_step(iteration)
        if iteration == 0:
            method.optimizer.zero_grad(set_to_none=True)
        return {"seconds": timer.seconds, "cpu_seconds": timer.cpu_seconds}

    print("ready", flush=True)
    serve(iterate)


def compare(method_name: str, budgets: list[int], repeats: int) -> list[dict[str, Any]]:
    """One method at every budget, the budgets taking turns."""
    answers: dict[int, list[dict[str, Any]]] = {pairs: [] for pairs in budgets}
    with tempfile.TemporaryDirectory(prefix="budgets-") as folder, ExitStack() as stack:
        workers = {}
        for pairs in budgets:
            given = Path(folder) / str(pairs)  # experts of the same scenes, but of more of them
            worker = Worker(
                __file__, f"{method_name} at {pairs}", [method_name, pairs, str(given)], 1, True
            )
            workers[pairs] = stack.enter_context(worker)
            worker.iterate(0)
        for repeat in range(repeats):
            for pairs, worker in workers.items():
                answers[pairs].append(worker.iterate(repeat + 1))
    return [
        {
            "method": method_name,
            "pairs": pairs,
            "median_seconds": round(statistics.median(a["seconds"] for a in given), 4),
            "median_cpu_seconds": round(statistics.median(a["cpu_seconds"] for a in given), 4),
            "peak_bytes_above_base": given[-1]["peak_bytes"] - given[-1]["base_bytes"],
        }
        for pairs, given in answers.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--budgets", nargs="+", type=int, default=list(BUDGETS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        method_name, pairs, folder = json.loads(arguments.serve)
        answer(method_name, pairs, Path(folder))
        return
    require_peaks()
    before, runs = load(), []
    for method_name in arguments.methods:
        runs += compare(method_name, arguments.budgets, arguments.repeats)
        for run in runs[-len(arguments.budgets) :]:
            print(run)
    record = {
        "what": "one iteration at N pairs, scenes-tiny, image+text_head, tuned settings",
        "threads": 1,
        "repeats": arguments.repeats,
        "runs": runs,
        "machine": {"load_before_and_after": [before, load()], **machine("torch")},
    }
    write(record, arguments.record)


if __name__ == "__main__":
    main()
