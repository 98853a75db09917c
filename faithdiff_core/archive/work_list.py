"""The list of all inputs of a run, in a temporary database: the names of a million images do not stay in memory."""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..images.formats import same_name
from ..images.listing import Entry
from ..images.masks import mask_key, mask_taken_twice, match_mask, no_mask
from ..images.names import apart, folded_stem, result_name
from .manifest import Row
from .storage import is_url

_SCHEMA = """
CREATE TABLE work (id INTEGER PRIMARY KEY, source BLOB UNIQUE, input BLOB, name BLOB, folded TEXT, stem TEXT,
                   stamp TEXT, mask BLOB NOT NULL DEFAULT x'', finished INTEGER NOT NULL DEFAULT 0);
CREATE TABLE texts (stem BLOB, suffix TEXT, stamp TEXT, PRIMARY KEY (stem, suffix)) WITHOUT ROWID;
CREATE TABLE masks (key TEXT PRIMARY KEY, address BLOB, stamp TEXT, image BLOB) WITHOUT ROWID;
CREATE TABLE present (name BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE rows (name BLOB PRIMARY KEY, state TEXT, settings TEXT, stamp TEXT, row TEXT) WITHOUT ROWID;
CREATE INDEX stems ON work (stem);
"""

_KNOWN = "SELECT 1 FROM rows WHERE rows.name = work.name AND rows.state = 'done'"
_FINISHED = f"""
UPDATE work SET finished = 1 WHERE whole(work.name)
    AND EXISTS ({_KNOWN} AND rows.settings = ? AND rows.stamp = work.stamp)
"""
_OPEN = f"""
SELECT id, source, name, stamp, mask,
       EXISTS (SELECT 1 FROM present WHERE present.name = work.name) AND NOT EXISTS ({_KNOWN})
FROM work WHERE NOT finished AND id > ? ORDER BY id LIMIT 1000
"""
_NEXT = "SELECT id, source FROM work WHERE id > ? ORDER BY id LIMIT 1000"


@dataclass(frozen=True)
class Item:
    """An input that is to be worked on.

    Attributes:
        id: its number in the run.
        source: address of the image.
        name: of the result, relative to the output folder, with slashes.
        stamp: see `Row`.
        unknown_result: there is a file under the result's name of which the manifest says nothing.
        thumbnail: small images of it are wanted for the summary page.
        mask: address of its mask, or empty.
    """

    id: int
    source: str
    name: str
    stamp: str
    unknown_result: bool = False
    thumbnail: bool = False
    mask: str = ""


class WorkList:
    """Inputs, results that are there, and the manifest's rows, each a table."""

    def __init__(self) -> None:
        handle, self._path = tempfile.mkstemp(prefix="faithdiff-", suffix=".sqlite")
        os.close(handle)
        self._base = sqlite3.connect(self._path, isolation_level=None)
        # The database lives no longer than the run, so nothing is lost with it.
        self._base.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -32768;")
        self._base.executescript(_SCHEMA)
        self._base.create_function("stem_of", 1, lambda blob: _blob(os.path.splitext(_name(blob))[0]))

    def close(self) -> None:
        """Remove the database."""
        self._base.close()
        os.unlink(self._path)

    def add(self, entries: Iterable[Entry]) -> None:
        """Take inputs in; one that is listed twice is taken once."""
        self._insert(
            "INSERT OR IGNORE INTO work (source, input, stem, stamp) VALUES (?, ?, ?, ?)",
            ((_blob(e.address), _blob(e.name), _key(folded_stem(Path(e.name))), e.stamp) for e in entries),
        )

    def add_texts(self, entries: Iterable[Entry], suffixes: Sequence[str]) -> None:
        """Take in captions: an image with a new caption is to be done again.

        Args:
            entries: files; those with other endings are left out.
            suffixes: what the names of captions end in.
        """
        rows = (
            (_blob(entry.address[: -len(suffix)]), suffix, entry.stamp)
            for entry in entries
            for suffix in suffixes
            if entry.address.lower().endswith(suffix)
        )
        self._insert("INSERT OR REPLACE INTO texts VALUES (?, ?, ?)", rows)

    def set_mask(self, mask: Entry) -> None:
        """Take in the mask of the only image."""
        self._base.execute(
            "UPDATE work SET mask = ?, stamp = stamp || ?", (_blob(mask.address), _mask_stamp(mask.stamp))
        )

    def add_masks(self, masks: str, entries: Iterable[Entry]) -> None:
        """Give every image its mask, as `find_masks` does.

        Args:
            masks: the folder, for messages.
            entries: its files.

        Raises:
            SettingsError: an image has no mask, or one would serve several images.
            ImageError: two masks have the same name.
        """
        longest = 0
        for entry in entries:
            key = mask_key(PurePosixPath(entry.name))
            longest = max(longest, len(key))
            text = _key("/".join(key))
            if other := self._base.execute("SELECT address FROM masks WHERE key = ?", (text,)).fetchone():
                raise same_name(*sorted((_name(other[0]), entry.address)))
            self._base.execute("INSERT INTO masks VALUES (?, ?, ?, NULL)", (text, _blob(entry.address), entry.stamp))
        last = 0
        while found := self._base.execute(_NEXT, (last,)).fetchall():
            for number, source in found:
                self._choose_mask(number, _name(source), masks, longest)
            last = found[-1][0]

    def _choose_mask(self, number: int, source: str, masks: str, longest: int) -> None:
        def find(key: tuple[str, ...]) -> Any:
            query = "SELECT key, address, stamp, image FROM masks WHERE key = ?"
            return self._base.execute(query, (_key("/".join(key)),)).fetchone()

        path = PurePosixPath(source) if is_url(source) else Path(source).absolute()
        mask = match_mask(path, find, longest)
        if mask is None:
            raise no_mask(source, masks)
        key, address, stamp, image = mask
        if image is not None:
            raise mask_taken_twice(_name(address), _name(image), source)
        self._base.execute("UPDATE masks SET image = ? WHERE key = ?", (_blob(source), key))
        changed = (address, _mask_stamp(stamp), number)
        self._base.execute("UPDATE work SET mask = ?, stamp = stamp || ? WHERE id = ?", changed)

    def add_results(self, names: Iterable[str]) -> None:
        """Take in the names of files that are in the output folder."""
        self._insert("INSERT OR IGNORE INTO present VALUES (?)", ((_blob(name),) for name in names))

    def add_rows(self, rows: Iterable[Row]) -> None:
        """Take in rows of the manifest, a newer one in the place of an older."""
        self._insert(
            "INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?)",
            (
                (_blob(row["name"]), row.get("state"), row.get("settings"), row.get("stamp"), json.dumps(row))
                for row in rows
                if isinstance(row.get("name"), str)
            ),
        )

    def name_results(self, suffix: str) -> None:
        """Give every input the name of its result, as `result_names` does.

        Raises:
            SettingsError: several images would get one name.
        """
        base = self._base
        base.create_function(
            "named", 2, lambda blob, alone: _blob(result_name(Path(_name(blob)), suffix, alone=bool(alone)).as_posix())
        )
        base.create_function("folded", 1, lambda blob: _key(_name(blob).casefold()))
        with _transaction(base):
            others = "SELECT 1 FROM work AS other WHERE other.stem = work.stem AND other.id <> work.id"
            base.execute(f"UPDATE work SET name = named(input, NOT EXISTS ({others}))")
            base.execute("UPDATE work SET folded = folded(name)")
            base.execute("CREATE INDEX folds ON work (folded)")
            twice = "SELECT folded FROM work GROUP BY folded HAVING count(*) > 1"
            same = [
                (number, Path(_name(name)), Path(_name(given)))
                for number, name, given in base.execute(f"SELECT id, name, input FROM work WHERE folded IN ({twice})")
            ]
            same.sort(key=lambda each: each[2])
            for (number, _, _), name in zip(same, apart([name for _, name, _ in same], self._is_taken), strict=True):
                key = name.as_posix()
                base.execute(
                    "UPDATE work SET name = ?, folded = ? WHERE id = ?", (_blob(key), _key(key.casefold()), number)
                )
            base.execute("CREATE INDEX names ON work (name)")  # without it, every row would be looked for in all
            captions = "SELECT stamp FROM texts WHERE texts.stem = stem_of(work.source) ORDER BY suffix"
            added = f"(SELECT '+' || group_concat(stamp, '+') FROM ({captions}))"
            base.execute(f"UPDATE work SET stamp = stamp || coalesce({added}, '')")

    def _is_taken(self, folded: str) -> bool:
        return self._one("SELECT EXISTS (SELECT 1 FROM work WHERE folded = ?)", _key(folded)) == 1

    def overwritten(self, target: Callable[[str], str]) -> str:
        """The address of an input that a result would overwrite; empty if there is none.

        Args:
            target: gives the address of a result.
        """
        self._base.create_function("target", 1, lambda blob: _blob(target(_name(blob))))
        found = self._base.execute(
            "SELECT source FROM work WHERE EXISTS (SELECT 1 FROM work AS o WHERE target(work.name) = o.source) LIMIT 1"
        ).fetchone()
        return _name(found[0]) if found else ""

    def mark_finished(self, settings: str, names: Callable[[str], Sequence[str]]) -> int:
        """Mark the inputs whose results are there, made of the same image with these settings; gives their number.

        Args:
            settings: their digest.
            names: gives all files that must be there, by the name of the result.
        """
        there = "SELECT 1 FROM present WHERE name = ?"

        def whole(blob: bytes) -> bool:
            return all(self._base.execute(there, (_blob(name),)).fetchone() for name in names(_name(blob)))

        self._base.create_function("whole", 1, whole)
        return self._base.execute(_FINISHED, (settings,)).rowcount

    def outdated(self) -> int:
        """Number of open inputs whose results are there, made with other settings or of another content."""
        present = "EXISTS (SELECT 1 FROM present WHERE present.name = work.name)"
        return self._one(f"SELECT count(*) FROM work WHERE NOT finished AND {present} AND EXISTS ({_KNOWN})")

    def finish(self, row: Row) -> bool:
        """Put a row down; False if its input is not among the open ones (it was done twice, say)."""
        self.add_rows([row])
        done = self._base.execute("UPDATE work SET finished = 1 WHERE name = ? AND NOT finished", (_blob(row["name"]),))
        return done.rowcount == 1

    def open_items(self, thumbnail_every: int = 0) -> Iterator[Item]:
        """What is to be done, in the order of the listing.

        Args:
            thumbnail_every: every how-many-th item shall have small images; 0 for none.
        """
        last = 0
        while found := self._base.execute(_OPEN, (last,)).fetchall():
            for number, source, name, stamp, mask, unknown in found:
                thumbnail = bool(thumbnail_every) and number % thumbnail_every == 0
                yield Item(number, _name(source), _name(name), stamp, bool(unknown), thumbnail, _name(mask))
            last = found[-1][0]

    def counts(self) -> tuple[int, int]:
        """Numbers of all inputs and of the open ones."""
        return self._one("SELECT count(*) FROM work"), self._one("SELECT count(*) FROM work WHERE NOT finished")

    def rows(
        self, states: tuple[str, ...] = ("done", "failed", "waiting"), where: str = "1", order: str = "work.name"
    ) -> Iterator[Row]:
        """The last row of every input; one with the state `waiting` where there is none.

        Args:
            states: which rows.
            where, order: conditions on the tables `work` and `rows`.
        """
        query = f"""SELECT work.name, work.source, work.stamp, rows.row FROM work LEFT JOIN rows USING (name)
                    WHERE coalesce(rows.state, 'waiting') IN ({", ".join("?" * len(states))}) AND {where}
                    ORDER BY {order}"""
        for name, source, stamp, row in self._base.execute(query, states):
            yield json.loads(row) if row else _waiting(_name(name), _name(source), stamp)

    def other_rows(self) -> Iterator[Row]:
        """Rows of results that are there, made by runs over other inputs into the same folder."""
        query = """SELECT row FROM rows WHERE state = 'done' AND EXISTS (SELECT 1 FROM present WHERE name = rows.name)
                   AND NOT EXISTS (SELECT 1 FROM work WHERE work.name = rows.name) ORDER BY name"""
        for (row,) in self._base.execute(query):
            yield json.loads(row)

    def totals(self) -> dict[str, int]:
        """Number of inputs by state."""
        query = "SELECT coalesce(rows.state, 'waiting'), count(*) FROM work LEFT JOIN rows USING (name) GROUP BY 1"
        return dict(self._base.execute(query).fetchall())

    def sums(self) -> dict[str, float]:
        """Of all inputs: seconds of work, bytes read and written, and the results' pixels."""
        fields = {name: f"json_extract(row, '$.{name}')" for name in ("seconds", "bytes_read", "bytes_written")}
        fields["pixels"] = "json_extract(row, '$.width') * json_extract(row, '$.height')"
        columns = ", ".join(f"coalesce(sum({field}), 0)" for field in fields.values())
        found = self._base.execute(f"SELECT {columns} FROM work JOIN rows USING (name)").fetchone()
        return dict(zip(fields, map(float, found), strict=True))

    def by_worker(self) -> list[tuple[str, int, float]]:
        """Of every worker: its name, number of images, and seconds an image."""
        query = """SELECT json_extract(row, '$.worker'), count(*), avg(json_extract(row, '$.seconds'))
                   FROM work JOIN rows USING (name) GROUP BY 1"""
        return self._base.execute(query).fetchall()

    def _one(self, query: str, *values: Any) -> int:
        return int(self._base.execute(query, values).fetchone()[0])

    def _insert(self, statement: str, values: Iterable[tuple[Any, ...]]) -> None:
        with _transaction(self._base):
            self._base.executemany(statement, values)


class _transaction:  # noqa: N801
    """Many changes as one: each alone would be written at once."""

    def __init__(self, base: sqlite3.Connection) -> None:
        self._base = base

    def __enter__(self) -> None:
        self._base.execute("BEGIN")

    def __exit__(self, kind: object, *_: object) -> None:
        self._base.execute("COMMIT")


def _waiting(name: str, source: str, stamp: str) -> Row:
    return {"name": name, "source": source, "state": "waiting", "stamp": stamp}


def _mask_stamp(stamp: str) -> str:
    """What a mask adds to the stamp of its image."""
    return f"~{stamp}"


def _blob(name: str) -> bytes:
    """A name for the database, whose texts are UTF-8: names of files may be anything."""
    return name.encode("utf-8", "surrogateescape")


def _name(blob: bytes) -> str:
    return blob.decode("utf-8", "surrogateescape")


def _key(text: str) -> str:
    """A text to be compared with others alone."""
    return text.encode("utf-8", "surrogateescape").hex()
