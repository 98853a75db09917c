"""The verdict on each node."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from support.host_sampling import Setup

from .schema import NodeSchema
from .trial import Result, Trial, by_hand, merged_by_hand, tiled, untiled
from .values import CannotMakeError, Values

T = TypeVar("T")

TOLERANCE = 1e-4
"""Largest difference, relative to the largest value, between ways that must give the same."""

AREA = "areas"
HAND = "tiles by hand"
MERGED = "merged predictions"
ONE_TILE = "one tile"
NOTHING = "no effect"

COMPILES = "compiling takes minutes; torch.compile is compared in tests/host/test_compile.py"
"""Why nodes with `compile` in their names are not tried here."""


@dataclass(frozen=True)
class Verdict:
    """What was found for a node.

    Attributes:
        node: its id.
        kind: see `schema.KINDS`.
        status: `right`, `refused` (our error), `host` (the node fails with plain SDXL, too), `listed` (its inputs
            cannot be made), or `wrong`.
        how: what it was compared with, our error, the missing type, or what is wrong.
    """

    node: str
    kind: str
    status: str
    how: str


class _FoundError(Exception):
    """A verdict other than right, from within the comparisons."""

    def __init__(self, status: str, how: str) -> None:
        super().__init__(how)
        self.status, self.how = status, how


class Survey:
    """Gives verdicts.

    Args:
        setup: of the tiny model.
        full: compare defaults and strong settings in every way. Without it the defaults are left out where strong
            settings have an effect that is right, and `tile_batch` 4 and 3 are compared with each other and by hand.
    """

    def __init__(self, setup: Setup, full: bool = False) -> None:
        self.values = Values(setup)
        self.full = full
        self._ours = setup.host.pack_module("faithdiff_core.errors").FaithDiffError
        self._plain: dict[tuple[str, int], Tensor] = {}
        self._functions: dict[Any, Verdict] = {}

    def verdicts(self, schemas: Iterable[NodeSchema]) -> list[Verdict]:
        """All verdicts, in order."""
        return [self.verdict(schema) for schema in schemas]

    def verdict(self, schema: NodeSchema) -> Verdict:
        """Try a node with strong settings and with its defaults.

        Unless the survey is full, a node whose function is another one's (merges of all architectures are one function
        that is given different names) is not tried again.
        """
        node = self.values.host.node_class(schema.id)
        function = node.execute.__func__ if hasattr(node, "define_schema") else getattr(node, node.FUNCTION)
        if function not in self._functions or self.full:
            self._functions[function] = self._tried(schema)
            return self._functions[function]
        twin = self._functions[function]
        return Verdict(schema.id, schema.kind, twin.status, f"has the function of {twin.node}")

    def _tried(self, schema: NodeSchema) -> Verdict:
        if "compile" in schema.id.lower():
            return Verdict(schema.id, schema.kind, "listed", COMPILES)
        found = []
        for strong in (True, False):
            trial = Trial(self.values, schema, strong)
            try:
                found.append(("right", self._compare(trial)))
            except _FoundError as verdict:
                found.append((verdict.status, verdict.how))
            except CannotMakeError as error:
                return Verdict(schema.id, schema.kind, "listed", f"no {error} to try it with")
            if not self.full and found[0] in (("right", HAND), ("right", MERGED)):
                break  # Strong settings act, and are right.
        for status in ("wrong", "refused", "right", "host"):
            hows = [how for found_status, how in found if found_status == status]
            if hows:
                # One setting that is refused, or has an effect, says more than one that is right, or has none.
                hows.sort(key=lambda how: how == NOTHING)
                partly = status == "refused" and len(hows) < len(found)
                return Verdict(schema.id, schema.kind, status, ("with some settings: " if partly else "") + hows[0])
        raise AssertionError(found)

    def _compare(self, trial: Trial) -> str:
        """Compare a trial with itself done in other ways.

        Returns:
            What it was compared with.
        """
        run = self._run
        steps = 2
        if run(trial, "model", trial.stateful):
            steps = 12 if self.full else 4
        if trial.strong and trial.unchanged():
            return NOTHING
        last, first = run(trial, "tiled, tile_batch 4", lambda: tiled(trial, 4, steps))
        if trial.schema.kind in ("MODEL", "CONDITIONING") and torch.equal(last, self._without(trial, steps)):
            return NOTHING
        how = self._by_hand(trial, first, steps)
        # Groups of three and one; what is kept for later then comes from fewer tiles.
        for batch in (3, 2, 1) if self.full or how == ONE_TILE else (3, 1) if steps > 2 else (3,):
            other = run(trial, f"tiled, tile_batch {batch}", partial(tiled, trial, batch, steps))
            self._equal(trial, f"tile_batch {batch} against 4", other[0], last, steps)
        if self.full:
            self._cfg_1(trial, steps)
            self._batch(trial, last, steps)
        if how in (AREA, ONE_TILE) or self.full:
            one = run(trial, "one tile", lambda: tiled(trial, 1, steps, tile=1024))
            whole = run(trial, "untiled", lambda: untiled(trial, steps, covered=True))
            self._equal(trial, "one tile against untiled", one[0], whole[0], steps)
        return how

    def _by_hand(self, trial: Trial, first: Tensor, steps: int) -> str:
        if trial.schema.kind == "CONDITIONING" and any(
            "area" in entry[1] or entry[1].get("set_area_to_bounds")
            for conditioning in trial.conds(None, "A")
            for entry in conditioning
        ):
            return AREA  # The host softens an area inside an image only, so a tile alone gives something else.
        hand = self._run(trial, "tiles by hand", lambda: by_hand(trial, steps))
        apart = difference(first, hand)
        if apart <= TOLERANCE:
            return HAND
        if trial.schema.kind != "LATENT":
            merged = difference(first, self._run(trial, "merged by hand", lambda: merged_by_hand(trial, steps)))
            if merged <= TOLERANCE:
                return MERGED
            apart = min(apart, merged)
        if trial.guides():
            return ONE_TILE  # It predicts on its own within the guidance, which only it can do.
        self._sensitive(trial, "tiles by hand", apart, steps)
        return HAND

    def _cfg_1(self, trial: Trial, steps: int) -> None:
        alone = Trial(trial.values, trial.schema, trial.strong, cfg=1.0)
        one, three = (self._run(alone, "cfg 1", partial(tiled, alone, n, steps)) for n in (1, 3))
        self._equal(alone, "cfg 1, tile_batch 1 against 3", one[0], three[0], steps)

    def _batch(self, trial: Trial, last: Tensor, steps: int) -> None:
        """An image in a batch of two is what it is alone, unless the node mixes the batch with plain SDXL, too."""
        alone = {"tiled": last, "untiled": self._run(trial, "untiled", lambda: untiled(trial, steps))[0]}
        ways: dict[str, Callable[[], Result]] = {
            "tiled": partial(tiled, trial, 3, steps, "AB"),
            "untiled": partial(untiled, trial, steps, "AB"),
        }
        for way, sampled in ways.items():
            try:
                both = self._run(trial, f"{way}, two images", sampled)
            except _FoundError as verdict:
                if verdict.status == "host":
                    continue
                raise
            if both[0].shape[0] != 2 or last.shape[0] != 1:
                continue  # The node made a batch of its own.
            apart = difference(both[0][:1], alone[way])
            if apart > TOLERANCE and not self._mixes(trial, steps):
                self._sensitive(trial, f"{way}, two images against one", apart, steps)

    def _mixes(self, trial: Trial, steps: int) -> bool:
        """Whether an image depends on the others of its batch with plain SDXL; with any settings, since a decision
        that averages over the batch (EasyCache's) often comes out the same."""
        for strong in (trial.strong, not trial.strong):
            plain = Trial(trial.values, trial.schema, strong, faithdiff=False)
            both, one = untiled(plain, steps, which="AB")[0], untiled(plain, steps)[0]
            if difference(both[: one.shape[0]], one) > TOLERANCE:
                return True
        return False

    def _without(self, trial: Trial, steps: int) -> Tensor:
        """The same without the node."""
        key = (trial.schema.kind, steps)
        if key not in self._plain:
            nothing = NodeSchema("", "", (), (), False)
            self._plain[key] = tiled(Trial(self.values, nothing, False), 4, steps)[0]
        return self._plain[key]

    def _equal(self, trial: Trial, what: str, a: Tensor, b: Tensor, steps: int) -> None:
        apart = difference(a, b)
        if apart > TOLERANCE:
            self._sensitive(trial, what, apart, steps)

    def _sensitive(self, trial: Trial, what: str, apart: float, steps: int) -> None:
        """A difference is none of ours where rounding does as much: noise changed by a millionth."""
        plain = tiled(trial, 3, steps)[0]
        rounding = max(difference(tiled(trial, 3, steps, scale=scale)[0], plain) for scale in (1 - 1e-6, 1 + 1e-6))
        if apart > 5 * rounding:
            settings = "strong" if trial.strong else "default"
            raise _FoundError("wrong", f"{what}, {settings} settings: {apart:.1e} apart")

    def _run(self, trial: Trial, what: str, run: Callable[[], T]) -> T:
        """Do it, and tell our errors from the host's."""
        try:
            return run()
        except (CannotMakeError, _FoundError):
            raise
        except self._ours as error:
            raise _FoundError("refused", str(error)) from error
        except Exception as error:
            text = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
            if self._fails_without(trial):
                raise _FoundError("host", text) from error
            raise _FoundError("wrong", f"{what}: {text}") from error

    def _fails_without(self, trial: Trial) -> bool:
        plain = Trial(trial.values, trial.schema, trial.strong, trial.cfg, faithdiff=False)
        for way in (lambda: untiled(plain, 2), lambda: untiled(plain, 2, which="AB"), lambda: by_hand(plain, 2)):
            try:
                way()
            except Exception:
                return True
        return False


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value; what is not a number in both is equal."""
    if a.shape != b.shape:
        return float("inf")
    bad_a, bad_b = ~torch.isfinite(a), ~torch.isfinite(b)
    if not torch.equal(bad_a, bad_b):
        return float("inf")
    a, b = a.masked_fill(bad_a, 0.0), b.masked_fill(bad_b, 0.0)
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
