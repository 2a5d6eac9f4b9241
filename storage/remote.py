"""Where a sweep's files also lie for machines that share no disk: S3, GCS, or any file system of Arrow's."""

import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from jobs.errors import SpecError, first_line
from storage.durable import DiskFull, StoreError, cannot_write

_FOLDERS = ("logs/", "mlflow.db", "mlartifacts/", "set_aside/")
_OWN = ("lock", "driver", "optuna.attributes.json", *_FOLDERS)
"""What says something about one machine, or is made anew from the rest."""
_MANIFESTS = ("manifest", "scores")
_NEVER_CHANGE = ("artifacts/", "manifest/", "scores/", "tables/")
DRIVERS = "drivers/"
"""Under which drivers see each other; see `storage.lease`."""
_SAME = -1
"""In the place of the time when a file was changed that never is."""


class There(NamedTuple):
    """A file there: its size, and when it was put there, in s since 1970 by the clock over there."""

    bytes: int
    changed: float


class Remote:
    """Copies of a sweep's files under a URI of their own.

    Args:
        uri: Such as `s3://bucket/sweeps/tone_grid-1a2b3c4d`, with the options that Arrow takes behind it.
            Credentials come from the environment or from the machine's role.

    Raises:
        SpecError: If Arrow knows no such file system.
    """

    def __init__(self, uri: str) -> None:
        try:
            self._files, root = FileSystem.from_uri(uri)
        except (OSError, ValueError) as error:
            raise SpecError(
                f"{uri!r} is no place for files: {first_line(error)}; give a URI such as s3://bucket/sweeps"
            ) from error
        self._root = root.rstrip("/")
        self._there: dict[str, int] = {}

    def put(self, folder: Path, path: str, *, to: str | None = None) -> None:
        """Copy a file of a folder there, whole, in the place of an older one.

        Args:
            folder: The sweep's folder.
            path: Of the file in it.
            to: Another path there.

        Raises:
            StoreError: If that fails.
        """
        target = f"{self._root}/{to or path}"
        # In a bucket a file is there once it is whole; moving it would copy it again.
        staging = f"{target}.{uuid.uuid4().hex[:8]}" if isinstance(self._files, LocalFileSystem) else target
        try:
            self._files.create_dir(target.rpartition("/")[0], recursive=True)
            with (folder / path).open("rb") as source, self._files.open_output_stream(staging) as sink:
                shutil.copyfileobj(source, sink)
            if staging != target:
                self._files.move(staging, target)
        except OSError as error:
            raise StoreError(f"cannot write {target}: {first_line(error)}") from error

    def fetch(self, folder: Path, path: str) -> None:
        """Copy a file from there into a folder, whole or not at all, unless the folder has it.

        Raises:
            StoreError: If that fails.
        """
        place = folder / path
        if not place.exists():
            staging = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}")
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                self._copy(path, staging)
                staging.replace(place)
            except OSError as error:
                with suppress(OSError):
                    staging.unlink()
                full = cannot_write(place, error)
                why = f"cannot read {self._root}/{path}: {first_line(error)}"
                raise full if isinstance(full, DiskFull) else StoreError(why) from error
        self._there[path] = _SAME

    def _copy(self, path: str, staging: Path) -> None:
        with self._files.open_input_stream(f"{self._root}/{path}") as source, staging.open("wb") as sink:
            shutil.copyfileobj(source, sink)
            sink.flush()
            os.fsync(sink.fileno())

    def remove(self, path: str) -> None:
        """Remove a file there, if there is one. Raises StoreError if that fails."""
        try:
            self._files.delete_file(f"{self._root}/{path}")
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StoreError(f"cannot remove {self._root}/{path}: {first_line(error)}") from error

    def text(self, path: str) -> str:
        """What a small file there says; "" if there is none."""
        try:
            with self._files.open_input_stream(f"{self._root}/{path}") as source:
                return str(source.read().decode())
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise StoreError(f"cannot read {self._root}/{path}: {first_line(error)}") from error

    def put_new(self, folder: Path, may_write: Callable[[], bool] = lambda: True) -> bool:
        """Copy there what is new or has changed in a sweep's folder.

        A death in between leaves a sweep that is whole as it was at some moment: manifests go last, and no
        entry of them that was not there before anything was copied.

        Args:
            folder: The sweep's folder.
            may_write: Asked before each file.

        Returns:
            Whether it was allowed to the end.

        Raises:
            StoreError: If that fails.
        """
        if self._there and not self.has_sweep():  # somebody has removed everything
            self._there = {}
        if not self._there:
            self._there = {
                path: _SAME
                for path, there in self.files().items()
                if path.startswith(_NEVER_CHANGE) and _size(folder / path) == there.bytes
            }
        entries = sorted(path for name in _MANIFESTS for path in folder.glob(f"{name}/[0-9]*.json"))
        for path in (*_files_of(folder), *entries):
            name = str(path.relative_to(folder))
            if not path.exists():  # its rows are in another file by now
                continue
            changed = path.stat().st_mtime_ns
            if self._there.get(name) not in (_SAME, changed):
                if not may_write():
                    return False
                self.put(folder, name)
                self._there[name] = changed
        return True

    def has_sweep(self) -> bool:
        """Whether a sweep is there. Raises StoreError if that cannot be found out."""
        place = f"{self._root}/sweep.json"
        try:
            return bool(self._files.get_file_info(place).type == FileType.File)
        except OSError as error:
            raise StoreError(f"cannot read {place}: {first_line(error)}") from error

    def check_behind(self, folder: Path) -> None:
        """Refuse to copy a folder over a sweep that somebody else has gone on with.

        Raises:
            SpecError: If there are results there that the folder lacks.
            StoreError: If that cannot be found out.
        """
        for name in _MANIFESTS:
            there = sorted(path for path in self.files(f"{name}/") if path.endswith(".json"))
            # Entries never change and name files that nobody else has: where the latest is the same, all are.
            if there and self.text(there[-1]) != _text(folder / there[-1]):
                raise SpecError(
                    f"{self._root} holds results of this sweep that {folder} lacks: another driver has gone "
                    "on with it; `steersweep fetch` brings all of it into a new folder, to go on there"
                )

    def fetch_all(self, folder: Path) -> int:
        """Copy the whole sweep into a folder; how many files that were.

        Raises:
            SpecError: If no sweep is there.
            StoreError: If that fails.
        """
        paths = [path for path in self.files() if not path.startswith(DRIVERS)]
        if "sweep.json" not in paths:
            raise SpecError(
                f"{self._root} holds no sweep; give the place of one, such as s3://bucket/sweeps/NAME"
            )
        for path in paths:
            self.fetch(folder, path)
        return len(paths)

    def files(self, under: str = "") -> dict[str, There]:
        """Files there, by their paths. Raises StoreError if they cannot be listed."""
        place = f"{self._root}/{under}".rstrip("/")
        try:
            found = self._files.get_file_info(FileSelector(place, recursive=True, allow_not_found=True))
        except OSError as error:
            raise StoreError(f"cannot read {place}: {first_line(error)}") from error
        prefix = self._root.lstrip("/") + "/"
        return {
            info.path.lstrip("/").removeprefix(prefix): There(info.size, (info.mtime_ns or 0) / 1e9)
            for info in found
            if info.type == FileType.File
        }


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def sweep_uri(results: str, sweep: str) -> str:
    """The URI of a sweep's files under that of several; options behind a `?` stay behind it."""
    place, mark, options = results.partition("?")
    return f"{place.rstrip('/')}/{sweep}{mark}{options}"


def _files_of(folder: Path) -> list[Path]:
    """What has to be copied of a folder, but for its manifests."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    without = (*_OWN, *(f"{name}/" for name in _MANIFESTS))
    return [path for path in paths if not str(path.relative_to(folder)).startswith(without)]
