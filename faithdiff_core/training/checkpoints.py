"""The output folder of a run: its identity, its checkpoints, and what may differ when it goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..atomic import write_atomically
from ..errors import SaveError, SettingsError
from .config import TrainConfig

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in the output folder."""

RUN_FILE = "run.json"
"""What run the output folder holds; in each checkpoint, what run that belongs to."""

EARLIER = "earlier"
"""Folder to which `resume: false` moves the run that was in the output folder."""

MUTABLE = frozenset(
    {
        "output",
        "workers",
        "checkpoint_every",
        "keep",
        "resume",
        "log_every",
        "tensorboard",
        "validation",
        "save_precision",
        "gradient_checkpointing",
        "data.on_bad",
        "data.check",
        "data.max_bad",
    }
)
"""Settings that may differ between a checkpoint and the run that goes on from it."""

COMPARED_OTHERWISE = frozenset(
    {"base", "init", "stages", "batch", "accumulate", "data.folder", "data.lq_folder", "data.huggingface"}
)
"""Settings that name a place, compared by what is there; and those that are compared by what they come to."""

EDGE = 65536
"""Bytes at the beginning and the end of a file that go into its fingerprint."""

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class TrainState:
    """Where a run is: the stage's index in the configuration, and the steps done in it."""

    stage: int = 0
    step: int = 0

    def state_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.stage, self.step = state["stage"], state["step"]


@dataclasses.dataclass(frozen=True)
class RunIdentity:
    """What makes a run this run.

    Attributes:
        run: a random name, given when it begins.
        config: its settings, as JSON has them.
        processes: how many take part.
        distributed: how they share the work, in accelerate's words.
        base, init: fingerprints of the base model and of the file that it starts from.
    """

    run: str
    config: dict[str, Any]
    processes: int
    distributed: str
    base: str
    init: str | None

    @property
    def samples_per_step(self) -> int:
        """Batch size, accumulated batches and processes multiplied."""
        return int(self.config["batch"]) * int(self.config["accumulate"] or 1) * self.processes


def as_plain(config: TrainConfig) -> dict[str, Any]:
    """A configuration as JSON has it."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return plain


def new_identity(config: TrainConfig, processes: int, distributed: str) -> RunIdentity:
    """The identity of a run that begins now."""
    init = None if config.init is None else fingerprint(config.init)
    return RunIdentity(uuid.uuid4().hex[:12], as_plain(config), processes, distributed, fingerprint(config.base), init)


def fingerprint(path: Path) -> str:
    """What is in a weights file, or in the weights files of a folder, wherever it is: sizes, beginnings and ends."""
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in (".safetensors", ".bin") and f.is_file())
    digest = hashlib.sha256()
    for file in files:
        if not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(EDGE))
            stream.seek(max(0, size - EDGE))
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def named_checkpoints(output: Path) -> list[Path]:
    """The checkpoints of an output folder that were written to the end, oldest first."""
    return sorted(p for p in (output / CHECKPOINTS).glob("stage*") if p.is_dir())


def read_identity(folder: Path) -> dict[str, Any] | None:
    """What an output folder or a checkpoint says about its run; None where it says nothing."""
    try:
        values = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) and "run" in values else None


def own_checkpoints(output: Path, run: str) -> list[Path]:
    """The checkpoints of a run, oldest first; those that name no run belong to the one in the folder."""
    return [c for c in named_checkpoints(output) if (read_identity(c) or {"run": run})["run"] == run]


def going_on(output: Path, now: RunIdentity, resume: bool) -> tuple[RunIdentity, list[Path]]:
    """Find the run in an output folder that a configuration goes on with; reads only.

    Returns:
        The identity to use, and the checkpoints to try, newest first (empty for a run that begins).

    Raises:
        SettingsError: the folder holds another run, or one whose settings would learn something else.
    """
    found = named_checkpoints(output)
    record = read_identity(output)
    if not resume or not (found or record):
        return now, []
    run = record["run"] if record else (read_identity(found[-1]) or {"run": now.run})["run"]
    own = own_checkpoints(output, run)[::-1]
    if own:
        then = read_identity(own[0]) or {}
        check_same_run(own[0], _config_of(own[0], then), then, now)
    elif record is not None and any(output.glob("stage*.safetensors")):
        check_same_run(output, record["config"], record, now)
    elif found:
        raise SettingsError(
            f"{output} holds checkpoints of another run. Choose another output folder, or set `resume: false`, which "
            f"moves them to {output / EARLIER}."
        )
    return dataclasses.replace(now, run=run), own


def _config_of(checkpoint: Path, record: dict[str, Any]) -> dict[str, Any]:
    if "config" in record:
        return dict(record["config"])
    values: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return values


def check_same_run(where: Path, then: dict[str, Any], record: dict[str, Any], now: RunIdentity) -> None:
    """Compare the settings of a checkpoint with those at hand.

    Args:
        where: the checkpoint, for messages.
        then: its settings.
        record: what it says about its run besides; empty for one that says nothing.
        now: the run at hand.

    Raises:
        SettingsError: they differ in something that changes what is learned.
    """
    old, new = _flat(then), _flat(now.config)
    different = sorted(k for k in new if not _may_differ(k) and (k not in old or old[k] != new[k]))
    different += [name for name in ("base", "init") if name in record and record[name] != getattr(now, name)]
    if not _lengthened(then["stages"], now.config["stages"], where):
        different.append("stages")
    if different:
        raise SettingsError(
            f"{where} was made with other settings ({', '.join(different)}). Restore them, choose another output "
            f"folder, or set `resume: false` to begin again, which moves what is there to {EARLIER}/."
        )
    processes = int(record.get("processes", len(list(where.glob("random_states_*.pkl"))) or now.processes))
    samples = int(then["batch"]) * int(then["accumulate"] or 1) * processes
    if samples != now.samples_per_step:
        raise SettingsError(
            f"{where} was made by {processes} process(es) with batch {then['batch']} and accumulate "
            f"{then['accumulate']}, {samples} samples a step; now it would be {now.processes} process(es) with batch "
            f"{now.config['batch']} and accumulate {now.config['accumulate']}, {now.samples_per_step} samples. Change "
            f"`batch` or `accumulate`, or the number of processes, so that the product is {samples}."
        )
    distributed = record.get("distributed", now.distributed)
    sharded = {"DEEPSPEED", "FSDP"} & {distributed, now.distributed}
    if sharded and (distributed != now.distributed or processes != now.processes):
        raise SettingsError(
            f"{where} was made by {processes} process(es) under {distributed}, and cannot be read by {now.processes} "
            f"under {now.distributed}: its optimizer is kept in pieces. Start it as before."
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def _may_differ(name: str) -> bool:
    parts = name.split(".")
    return any(".".join(parts[: i + 1]) in MUTABLE | COMPARED_OTHERWISE for i in range(len(parts)))


def _lengthened(then: list[dict[str, Any]], now: list[dict[str, Any]], where: Path) -> bool:
    """Whether stages are the same but for steps of the present one or later ones, or for stages added at the end."""
    try:
        place = json.loads((where / "place.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        place = {"stage": 0, "step": 0}
    if len(now) < len(then):
        return False
    for index, (old, new) in enumerate(zip(then, now, strict=False)):
        if {**old, "steps": 0} != {**new, "steps": 0}:
            return False
        if index < place["stage"] and old["steps"] != new["steps"]:
            return False
        if index == place["stage"] and new["steps"] < place["step"]:
            return False
    return True


def problem_of(checkpoint: Path) -> str | None:
    """What makes a checkpoint unusable, or None: files that are missing, too short or without their directory."""
    record = read_identity(checkpoint) or {}
    for name, size in record.get("files", {}).items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            return f"{name} is missing" if found is None else f"{name} has {found} of {size} bytes"
    if not (checkpoint / "place.json").is_file():
        return "place.json is missing"
    for file in sorted(checkpoint.rglob("*")):
        if file.suffix in (".bin", ".pkl", ".pt") and not zipfile.is_zipfile(file):
            return f"{file.name} is corrupted or truncated"
        if file.suffix == ".safetensors" and (text := _safetensors_problem(file)):
            return f"{file.name} is corrupted or truncated ({text})"
    return None


def _safetensors_problem(file: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt"):
            return None
    except (SafetensorError, OSError) as error:
        return str(error).splitlines()[0]


def usable(checkpoints: list[Path]) -> Path | None:
    """The first checkpoint that is whole; those before it are set aside by name, with a message."""
    for checkpoint in checkpoints:
        text = problem_of(checkpoint)
        if text is None:
            return checkpoint
        aside = checkpoint.with_name(f".{checkpoint.name}.corrupted")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        logger.warning("%s: %s; it is now %s, and the one before it is tried", checkpoint, text, aside.name)
    return None


def remove_leftovers(output: Path) -> None:
    """Remove what an interrupted write left in an output folder."""
    for left in [*output.glob(".*.unfinished"), *(output / CHECKPOINTS).glob(".*.unfinished")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
        logger.info("removed %s, which an interrupted write had left", left)


def set_apart(output: Path) -> None:
    """Move the run in an output folder into a folder of its own below `EARLIER`."""
    record = read_identity(output)
    moved = [p for p in (output / CHECKPOINTS, output / RUN_FILE, output / "samples", output / "logs") if p.exists()]
    moved += output.glob("stage*.safetensors")
    if not moved:
        return
    target = output / EARLIER / (record["run"] if record else uuid.uuid4().hex[:12])
    target.mkdir(parents=True, exist_ok=True)
    for path in moved:
        os.replace(path, target / path.name)
    logger.warning("`resume: false`: the run that was in %s is now in %s", output, target)


def claim(output: Path, identity: RunIdentity, setup: dict[str, Any]) -> None:
    """Write into the output folder whose it is, and how the run is set up."""
    output.mkdir(parents=True, exist_ok=True)
    with saving(output / RUN_FILE):
        write_atomically(
            output / RUN_FILE, json.dumps(dataclasses.asdict(identity) | {"setup": setup}, indent=1).encode()
        )


@contextmanager
def saving(target: Path, needed: int = 0) -> Iterator[None]:
    """Name what cannot be written, whatever the library says that fails at it.

    Args:
        target: file or folder that is written.
        needed: its size in bytes, as far as it is known; checked against the free space first.

    Raises:
        SaveError: there is not enough space, or writing failed.
    """
    from safetensors import SafetensorError

    existing = next(p for p in (target, *target.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise SaveError(f"{target} cannot be written: it takes {_size(needed)}, and {_size(free)} are free.")
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        needs = f"; it takes about {_size(needed)}" if needed else ""
        raise SaveError(
            f"{target} cannot be written: {first}{needs}, and {_size(shutil.disk_usage(existing).free)} are free."
        ) from error


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def save_checkpoint(
    accelerator: Any, output: Path, identity: RunIdentity, state: TrainState, keep: int, needed: int
) -> Path:
    """Write a checkpoint beside the others and give it its name last, so that a named one is whole.

    Args:
        accelerator: has the model, the optimizer and what else belongs to the state. All processes call this.
        output: the run's folder.
        identity: of the run, whose older checkpoints are pruned.
        state: where the run is.
        keep: how many checkpoints stay.
        needed: bytes that it takes, about.

    Raises:
        SaveError: it cannot be written. The older ones are as they were, and what was written of it is removed.
    """
    name = f"stage{state.stage:02d}-{state.step:08d}"
    folder = output / CHECKPOINTS
    unfinished = folder / f".{name}.unfinished"
    main = accelerator.is_main_process
    try:
        with saving(folder / name, needed if main else 0):
            if main:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(unfinished))
            accelerator.wait_for_everyone()
            if main:
                _write_records(unfinished, identity, state)
                _replace(unfinished, folder / name)
    except SaveError as error:
        if main:
            shutil.rmtree(unfinished, ignore_errors=True)
        kept = [c.name for c in own_checkpoints(output, identity.run)]
        has = f"The checkpoint(s) {', '.join(kept)} are whole" if kept else "There is no older checkpoint"
        raise SaveError(f"{error} {has}. Make space, and start the same command again.") from error
    if main:
        for old in own_checkpoints(output, identity.run)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder / name


def _write_records(folder: Path, identity: RunIdentity, state: TrainState) -> None:
    files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    (folder / "place.json").write_text(json.dumps(state.state_dict()))
    (folder / "config.json").write_text(json.dumps(identity.config, indent=1))
    (folder / RUN_FILE).write_text(json.dumps(dataclasses.asdict(identity) | {"files": files}, indent=1))


def _replace(made: Path, target: Path) -> None:
    """Give a folder its name; one that has the name already goes only after that."""
    old = target.with_name(f".{target.name}.old.unfinished")
    if target.exists():
        os.rename(target, old)
    os.replace(made, target)
    shutil.rmtree(old, ignore_errors=True)
