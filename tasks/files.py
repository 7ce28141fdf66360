"""Reading and downloading data."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pooch

from runs.errors import InputError

pooch.get_logger().setLevel("WARNING")  # it would tell the hash of every download


@contextlib.contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever is raised within into `InputError`: a broken file raises what it amounts to."""
    try:
        yield
    except MemoryError as error:
        raise InputError(f"dataset {path}: too little memory to read it ({error})") from None
    except Exception as error:
        raise InputError(
            f"dataset {path}: not a whole {kind} ({error}); delete it and fetch or make it again"
        ) from None


def download(url: str, file: Path) -> None:
    """Fetch `url` to `file`, which is there only when it is whole; raises OSError or ValueError."""
    try:
        downloader = pooch.HTTPDownloader(progressbar=True, timeout=30)
        pooch.retrieve(url, None, file.name, file.parent, downloader=downloader)
    except BaseException:  # a signal, too, comes in the middle of a progress bar
        print(file=sys.stderr)
        raise


def download_error(task: str, url: str, file: Path, error: Exception) -> InputError:
    return InputError(
        f"dataset: cannot download {url} to {file} ({error}); fetch it elsewhere and put it "
        f"there, or make data with `python tools/make_dataset.py {task}` and name it with "
        "--dataset_path"
    )
