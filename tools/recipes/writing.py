"""Writes files in D4RL's and OGBench's layouts.

Each file is made in memory and then written at once, since HDF5 crashes on a full disk.
"""

import io
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tools.recipes.common import Rows


def write_hdf5(path: Path, rows: Rows, about: dict[str, Any]) -> None:
    """D4RL's layout; the last row ends an episode."""
    rows["timeouts"][-1] = not rows["terminals"][-1]
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        for name, array in rows.items():
            file.create_dataset(name, data=array, compression="gzip", shuffle=True)
        # Attributes, because D4RL's `sequence_dataset` takes every array for one of transitions.
        file.create_group("metadata").attrs.update(about)
    path.write_bytes(image.getbuffer())


def write_npz(path: Path, rows: Rows, about: dict[str, Any]) -> None:
    """OGBench's layout, with `about` as JSON, which OGBench ignores; the last row is terminal."""
    rows["terminals"][-1] = True
    image = io.BytesIO()
    np.savez_compressed(image, **rows, metadata=json.dumps(about))
    path.write_bytes(image.getbuffer())
