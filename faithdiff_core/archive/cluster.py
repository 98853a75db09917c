"""Workers in several processes and on several machines, which Ray Data runs: an actor pool, one pipeline an actor.

Ray Data hands out the images, starts actors that died again, and repeats what was on lost machines. The list of images
lies in the output folder, in parts of some hundred, so that neither the driver nor Ray holds all of it.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from ..errors import FaithDiffError, MissingPackageError, SettingsError, install_extra
from .storage import is_url, join, remove_folder, write_lines
from .task import Task
from .work_list import Item
from .worker import Report

LISTS = ".faithdiff-lists"
"""Folder in the output folder for the list of images; removed at the end."""

_PART = 500
"""Images in a part of the list."""

_PASS = 10_000
"""Images that Ray gets at once: it keeps some 11 KB of the driver's memory for each until all of them are done."""

_TASK_RETRIES = 2
"""How often Ray gives an image to another worker when its worker died: an image may be what kills them."""

_ROUNDS = 3
"""How often images are given out that came back from no worker."""


class Cluster:
    """A connection to Ray, while work goes on.

    Args:
        workers: number of processes on this machine, `ray`, or `ray:ADDRESS`.
        gpus: of a worker; None for 1 where there are GPUs and they are wanted, else 0.
        task: what is done to every image.
        out: the output folder, path or URL; all machines must see it.
        overwrite: results that are there do not count.

    Raises:
        MissingPackageError: Ray is not installed.
        SettingsError: no Ray runs there, or there is less than one worker needs.
    """

    def __init__(self, workers: int | str, gpus: float | None, task: Task, out: str, overwrite: bool = False) -> None:
        try:
            import ray.data
        except ModuleNotFoundError as error:
            raise MissingPackageError(f"--workers {workers} needs Ray; {install_extra('cluster')}.") from error
        if gpus is not None and not (0 <= gpus <= 1 or (gpus < 1e6 and gpus == int(gpus))):
            raise SettingsError(
                f"--gpus-per-worker must be between 0 and 1, or a whole number (Ray shares no more than one GPU), got "
                f"{gpus:g}."
            )
        self._ray = ray
        self._task, self._out, self._overwrite = task, out, overwrite
        self._lists = join(out if is_url(out) else os.path.abspath(out), f"{LISTS}/{uuid.uuid4().hex[:12]}")
        cpus = _connect(workers)
        try:
            self._plan_workers(workers, gpus, task.wants_gpu, cpus)
        except BaseException:
            ray.shutdown()
            raise

    def _plan_workers(self, workers: int | str, gpus: float | None, wants_gpus: bool, cpus: float) -> None:
        there = self._ray.cluster_resources()
        all_gpus = there.get("GPU", 0.0)
        self.gpus = (1.0 if wants_gpus and all_gpus else 0.0) if gpus is None else gpus
        self.cpus = cpus
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        most = sum(places(node, cpus, self.gpus) for node in nodes)
        self.size = most if isinstance(workers, str) else workers
        if not 1 <= self.size <= most:
            raise SettingsError(
                f"--workers {workers} with {self.gpus:g} GPU(s) each: Ray has {all_gpus:g} GPU(s) and "
                f"{there.get('CPU', 0):g} CPU(s) on {len(nodes)} machine(s), enough for {most} worker(s). Give fewer "
                f"workers or another --gpus-per-worker."
            )

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def reports(self, items: Callable[[], Iterator[Item]]) -> Iterator[Report]:
        """Give the open items out to the workers, and yield what became of them; for `Archive.run`.

        Args:
            items: the items whose reports have not been yielded.

        Raises:
            FaithDiffError: the models cannot be loaded, or a worker does not see the output folder.
        """
        try:
            for number in range(_ROUNDS):
                still_open = items()
                folder = join(self._lists, str(number))
                while parts := list(_write_lists(folder, itertools.islice(still_open, _PASS))):
                    if number:
                        sys.stderr.write("some workers or machines were lost; their images are done again\n")
                    yield from self._round(folder, parts)
            yield from map(self._lost, items())
        finally:
            remove_folder(join(self._out, LISTS))

    def _round(self, folder: str, parts: list[tuple[str, int]]) -> Iterator[Report]:
        """One pass of Ray Data over lists of items. Those that kill their worker every time do not come back."""
        from .ray_data import REPORT, ListedItems, WorkingActor

        data = self._ray.data
        with warnings.catch_warnings():
            # Some of these options are removed in Ray 2.64; the extra `cluster` stays below.
            warnings.simplefilter("ignore")
            # One reader: it is fast, and each is a process of its own. It need not wait until its lines are taken: by
            # default Ray lets it be a few lines ahead, and then the workers wait for the driver's next look at it.
            source = data.read_datasource(
                ListedItems(parts),
                num_cpus=0,
                concurrency=1,
                override_num_blocks=len(parts),
                ray_remote_args={"_generator_backpressure_num_objects": -1},
            )
            done = source.map_batches(
                WorkingActor,
                fn_constructor_args=(self._task, self._out, folder, self._overwrite, os.getcwd()),
                batch_size=1,
                batch_format="pyarrow",
                compute=data.ActorPoolStrategy(size=self.size, max_tasks_in_flight_per_actor=2),
                num_cpus=self.cpus,
                num_gpus=self.gpus or None,
                max_restarts=-1,
                max_task_retries=_TASK_RETRIES,
            )
        for batch in done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for text in batch[REPORT].to_pylist():
                yield _report(json.loads(text))

    def _lost(self, item: Item) -> Report:
        times = _ROUNDS * (_TASK_RETRIES + 1)
        return Report(
            {
                "name": item.name,
                "source": item.source,
                "state": "failed",
                "error": f"its worker died each of {times} times at most: it needs more memory than the machine has, "
                f"or its decoder crashes",
                "settings": self._task.digest,
                "stamp": item.stamp,
                "worker": "",
                "seconds": 0.0,
            }
        )


def places(node: Mapping[str, float], cpus: float, gpus: float) -> int:
    """How many workers a machine has place for; a worker is on one machine, and a part of a GPU on one GPU.

    Args:
        node: what Ray counts there: `CPU` and `GPU`.
        cpus, gpus: of a worker. GPUs are a whole number, or a part of one.
    """
    tiny = 1e-6  # a third of a GPU is there three times
    most = int(node.get("CPU", 0.0) / cpus + tiny)
    if gpus:
        each = int(node.get("GPU", 0.0) + tiny)
        most = min(most, each // int(gpus) if gpus >= 1 else each * int(1 / gpus + tiny))
    return most


def _connect(workers: int | str) -> float:
    """Start Ray on this machine, or connect to it; CPUs of a worker.

    Raises:
        SettingsError: there is no Ray to connect to.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    cpus = 1
    if isinstance(workers, int):
        every = os.cpu_count() or 1
        cpus = max(1, every // workers)
        options |= {"address": "local", "num_cpus": max(every, workers * cpus), "include_dashboard": False}
    else:
        options["address"] = workers.partition(":")[2] or "auto"
        if options["address"].startswith("//"):
            raise SettingsError(
                f"--workers {workers}: Ray's client protocol is not supported. Run the command on a machine of the "
                f"cluster, with --workers ray."
            )
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(
            f"--workers {workers}: no Ray cluster answers ({reason}). Start one with `ray start --head`."
        ) from error
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # lost workers are expected, and told of in our words
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1
    context.target_max_block_size = 1  # a block for each image: no more than one is lost with a worker
    # It shares memory out among the steps of a dataset anew for every block, which is half of the driver's work, and
    # here a block is a line of text.
    context.op_resource_reservation_enabled = False
    return cpus


def _write_lists(folder: str, items: Iterator[Item]) -> Iterator[tuple[str, int]]:
    """Write items into files of a folder; their addresses and numbers of lines."""
    for number in itertools.count():
        if not (chunk := list(itertools.islice(items, _PART))):
            return
        address = join(folder, f"{number:06d}.jsonl")
        write_lines(address, (json.dumps(asdict(item)) for item in chunk))
        yield address, len(chunk)


def _report(found: dict[str, Any]) -> Report:
    if "fatal" in found:
        raise (SettingsError if found["kind"] == "settings" else FaithDiffError)(found["fatal"])
    return Report(found["row"], tuple(found["thumbnails"]))
