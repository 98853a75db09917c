"""What runs inside Ray: the source of the items, and the actor that works on them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from ..errors import FaithDiffError, SettingsError
from .storage import is_folder, read_lines
from .task import Task
from .work_list import Item
from .worker import Worker

ITEM, REPORT = "item", "report"
"""Columns of the tables that go to the actors and come back; each value is a JSON text."""


class ListedItems(Datasource):
    """Items in files of the output folder; each file is read by a task, on whatever machine.

    Args:
        parts: addresses of the files, each with the number of its lines.
    """

    def __init__(self, parts: Sequence[tuple[str, int]]) -> None:
        self._parts = parts

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        return [
            ReadTask(
                partial(_read_part, address),
                BlockMetadata(num_rows=lines, size_bytes=300 * lines, input_files=None, exec_stats=None),
            )
            for address, lines in self._parts
        ]


def _read_part(address: str) -> Iterable[pa.Table]:
    yield pa.table({ITEM: list(read_lines(address))})


class WorkingActor:
    """Works on items on a GPU, or a part of one, with models that are loaded when it starts.

    Args:
        task, out, overwrite: see `Worker`.
        lists: folder with the lists of items.
        here: working directory of the command.

    What keeps every image from being done (a model that is not there, an output folder that this machine does not
    see) comes back in the place of the first report, since Ray would start the actor again and again.
    """

    def __init__(self, task: Task, out: str, lists: str, overwrite: bool, here: str) -> None:
        node = ray.get_runtime_context().get_node_id()
        name = f"{platform.node()}/{node[:6]}/{os.getpid()}"
        self._fatal: dict[str, str] = {}
        if os.path.isdir(here):  # the command's paths may be relative, and a cluster's workers start somewhere else
            os.chdir(here)
        try:
            if not is_folder(lists):
                raise SettingsError(
                    f"The worker {name} does not see the output folder {out}. Give a folder that all machines share, "
                    f"or a URL."
                )
            self._work: Callable[[Item], Any] = Worker(task, out, name, overwrite).work
        except FaithDiffError as error:
            kind = "settings" if isinstance(error, SettingsError) else "other"
            self._fatal = {"fatal": str(error), "kind": kind}

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.table({REPORT: [self._one(text) for text in batch[ITEM].to_pylist()]})

    def _one(self, text: str) -> str:
        if self._fatal:
            return json.dumps(self._fatal)
        return json.dumps(asdict(self._work(Item(**json.loads(text)))))
