"""Reading and downloading data."""

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from runs.errors import InputError, check_regular, describe, expand_home, is_system_error


@contextlib.contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn every exception while reading data into an `InputError` of one line.

    If the operating system refused something, the line says that. Any other exception means that
    the content is damaged.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        problem = describe(error)
        if is_system_error(error):
            raise InputError(f"dataset {path}: cannot read it: {problem}") from None
        raise InputError(
            f"dataset {path}: not a valid {kind} ({problem}); delete it and fetch or make it again"
        ) from None


@contextlib.contextmanager
def enough_memory(path: Path) -> Iterator[None]:
    """Turn a MemoryError into an `InputError` of one line."""
    try:
        yield
    except MemoryError as error:
        raise InputError(f"dataset {path}: {describe(error)}") from None


def is_file(path: Path) -> bool:
    """Whether the file exists; raises `InputError` for a FIFO or if the system refuses access."""
    try:
        check_regular(path)
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise InputError(f"dataset {path}: cannot open it: {describe(error)}") from None
    return True


def check_file(path: Path) -> None:
    """Raise `InputError` unless it is a regular file: opening a FIFO would wait forever."""
    if not is_file(path):
        raise InputError(f"dataset {path}: there is no such file")


def is_folder(path: Path) -> bool:
    """Whether the folder exists; raises `InputError` if the system refuses access."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise InputError(f"dataset {path}: cannot open it: {describe(error)}") from None


def data_directory(variable: str, default: str) -> Path:
    """The folder that an environment variable names, or the default; ~ is the user's home."""
    return Path(expand_home(os.environ.get(variable) or default, variable))


# ---------------------------------------------------------------------------- formats


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file. Arrays of objects are refused: unpickling them could run code."""
    check_file(path)
    with reading(path, ".npz file"), np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def read_hdf5(path: Path, keys: list[str]) -> dict[str, np.ndarray]:
    """The arrays of an HDF5 file whose names are in `keys`."""
    check_file(path)
    with reading(path, "HDF5 file"), h5py.File(path, "r") as file:
        check_self_contained(file, path)
        return {key: file[key][:] for key in keys if key in file}


def check_self_contained(file: h5py.File, path: Path) -> None:
    """Raise `InputError` if an HDF5 file links to other files or needs a filter not installed.

    Called before anything is read, since opening an external link opens the other file.
    """

    def is_external_link(name: bytes, link: h5py.h5l.LinkInfo) -> object:
        is_local = link.type in (h5py.h5l.TYPE_HARD, h5py.h5l.TYPE_SOFT)
        return None if is_local else name

    def check_dataset(name: bytes) -> None:
        item = h5py.h5o.open(file.id, name)
        if isinstance(item, h5py.h5d.DatasetID):
            check_storage(item.get_create_plist(), name.decode(errors="replace"), path)

    name = file.id.links.visit(is_external_link, info=True)
    if name is not None:
        refuse_other_file(name.decode(errors="replace"), path)
    h5py.h5o.visit(file.id, check_dataset)


def check_storage(properties: h5py.h5p.PropDCID, name: str, path: Path) -> None:
    """Raise `InputError` if a dataset's rows lie in other files or need a missing filter."""
    if properties.get_external_count() or properties.get_layout() == h5py.h5d.VIRTUAL:
        refuse_other_file(name, path)
    for index in range(properties.get_nfilters()):
        code, _, _, filter_name = properties.get_filter(index)
        if not h5py.h5z.filter_avail(code):
            label = filter_name.decode(errors="replace") or "no name"
            raise InputError(
                f"dataset {path}: {name} is compressed by HDF5 filter {code} ({label}), which is "
                "not installed here; install it (`pip install hdf5plugin` has many, "
                "HDF5_PLUGIN_PATH names their folder) or repack the file with h5repack"
            )


def refuse_other_file(name: str, path: Path) -> None:
    raise InputError(
        f"dataset {path}: {name} lies in another file, expected all data in this one; copy it in "
        "with h5repack or h5py"
    )


# ---------------------------------------------------------------------------- downloads


def download(url: str, file: Path) -> None:
    """Fetch `url` to `file`, which only exists once complete; raises OSError or ValueError."""
    import pooch

    pooch.get_logger().setLevel("WARNING")  # it logs the hash of every download
    try:
        downloader = pooch.HTTPDownloader(progressbar=True, timeout=30)
        pooch.retrieve(url, None, file.name, file.parent, downloader=downloader)
    except BaseException:  # a signal, too, can come in the middle of a progress bar
        print(file=sys.stderr)
        raise


def download_error(task: str, url: str, file: Path, error: Exception) -> InputError:
    return InputError(
        f"dataset: cannot download {url} to {file} ({error}); download it elsewhere and put it "
        f"there, or make data with `python tools/make_dataset.py {task}` and pass it with "
        "--dataset_path"
    )
