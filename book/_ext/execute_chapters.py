"""Chapters whose outputs are not in the execution cache are executed side by side.

myst-nb executes a notebook when Sphinx reads its page, one page after the other. Just before that,
this extension executes the notebooks among those pages, as many at a time as there are cores, and
puts their outputs where myst-nb looks for them. One that fails is left out: myst-nb comes to it
again and reports its error, in the same words as ever.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

import nbformat
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn, JupyterCacheAbstract
from jupyter_cache.executors.utils import ExecutionResult, single_nb_execution
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.display import progress_message

logger = logging.getLogger(__name__)

AT_ONCE = 4  # more kernels than these, of up to 1 GB each, want memory that a laptop may not have
THREADS = "OMP_NUM_THREADS"


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("env-before-read-docs", execute_missing)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def execute_missing(app: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    """Put into the cache what the notebooks among the pages to read show, where it is not there."""
    config = env.mystnb_config
    if config.execution_mode != "cache" or config.execution_in_temp:
        return
    cache = get_cache(config.execution_cache_path or ".jupyter_cache")
    chapters = {
        path: notebook
        for path in map(Path, map(env.doc2path, docnames))
        if path.suffix == ".ipynb" and not _is_excluded(path, config.execution_excludepatterns)
        if not _is_cached(cache, notebook := nbformat.read(path, as_version=4))
    }
    jobs = min(_cores(), AT_ONCE, len(chapters))
    if jobs < 2:
        return  # myst-nb does as well
    execute = partial(
        single_nb_execution,
        timeout=config.execution_timeout,
        allow_errors=config.execution_allow_errors,
    )
    # Threads, which only wait for their kernels: within one process no two kernels get one port.
    with (
        progress_message(f"executing {len(chapters)} notebooks, {jobs} at a time"),
        _threads_of_a_kernel(max(1, _cores() // jobs)),
        ThreadPoolExecutor(jobs) as pool,
    ):
        running = {
            pool.submit(execute, notebook, cwd=str(path.parent)): path
            for path, notebook in chapters.items()
        }
        for done in as_completed(running):
            _keep(cache, running[done], done.result())


def _keep(cache: JupyterCacheAbstract, path: Path, result: ExecutionResult) -> None:
    if result.err is not None:
        logger.info("%s failed after %.0f s", path.stem, result.time)
        return
    bundle = CacheBundleIn(result.nb, str(path), data={"execution_seconds": result.time})
    cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
    logger.info("%s took %.0f s", path.stem, result.time)


def _is_excluded(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(PurePosixPath(path.as_posix()).match(pattern) for pattern in patterns)


def _is_cached(cache: JupyterCacheAbstract, notebook: nbformat.NotebookNode) -> bool:
    try:
        cache.match_cache_notebook(notebook)
    except KeyError:
        return False
    return True


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _threads_of_a_kernel(number: int) -> Iterator[None]:
    """Kernels that start in here share the cores, unless the environment says otherwise."""
    if THREADS in os.environ:
        yield
        return
    os.environ[THREADS] = str(number)
    try:
        yield
    finally:
        del os.environ[THREADS]
