"""Train the experts of a run ahead of it, each an independent job: in processes or on Dask."""

from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from mmdd.config import RunConfig
from mmdd.data.open import open_dataset
from mmdd.devices import place
from mmdd.distill import METHODS
from mmdd.distill.loop import Context
from mmdd.encoders import build_model
from mmdd.errors import ConfigError
from mmdd.experts import ExpertBuffer, ExpertConfig, Layout, buffer_folder, train_experts
from mmdd.provenance import resolve_device
from mmdd.runs import experts_folder, initial_pairs, make_context


def train_expert(config: RunConfig, number: int) -> int:
    """Train one expert of the buffer that a run will ask for; returns its number.

    Nothing happens if it is finished. Raises `ConfigError` for a method without experts.
    """
    settings, context, folder = _buffer(config)
    train_experts(settings, context, folder, numbers=[number], progress=False)
    return number


def train_all(
    config: RunConfig, jobs: int = 1, cluster: str | None = None, progress: bool = True
) -> ExpertBuffer:
    """Train every expert of a run's buffer, `jobs` at a time, and return the buffer.

    cluster: address of a Dask scheduler, whose workers must see the same folder of experts
    (`runtime.experts`); jobs is then ignored. A job that fails raises here after the others are
    done; what is finished stays. Book: notebooks/05_trajectory_matching.
    """
    settings, context, folder = _buffer(config)
    # Workers neither draw bars nor share this process' threads.
    quiet = config.runtime.model_copy(update={"progress": False, "threads": 1})
    job = config.model_copy(update={"runtime": quiet})
    with _executor(jobs, cluster) as executor:
        futures = [executor.submit(train_expert, job, n) for n in range(settings.count)]
        bar = tqdm(as_completed(futures), total=len(futures), desc="experts", disable=not progress)
        errors = [error for future in bar if (error := future.exception()) is not None]
    if errors:
        raise errors[0]
    return ExpertBuffer(folder, Layout.of(context.model, context.protocol), settings.count)


def _buffer(config: RunConfig) -> tuple[ExpertConfig, Context, Path]:
    """What experts of a run are trained with, and where they go."""
    settings = getattr(config.settings, "experts", None)
    if not isinstance(settings, ExpertConfig):
        raise ConfigError(f"method {config.method!r} uses no experts.")
    if config.runtime.threads is not None:
        torch.set_num_threads(config.runtime.threads)
    dataset = open_dataset(config.dataset, config.runtime)
    device = resolve_device(config.runtime.device)
    model = place(build_model(config.model), device)
    start = initial_pairs(config, dataset, model)
    context = make_context(config, dataset, model, device, start)
    distiller: Any = METHODS[config.method].distiller
    if hasattr(distiller, "expert_context"):  # its experts start in a way of their own
        context = distiller.expert_context(config.settings, context)
    return settings, context, buffer_folder(settings, context, experts_folder(config))


@contextmanager
def _executor(jobs: int, cluster: str | None) -> Iterator[Executor]:
    if cluster is None:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            yield pool
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise ConfigError("a cluster needs Dask: pip install 'mmdd[dask]'.") from error
    with Client(cluster) as client:
        yield client.get_executor(pure=False)
