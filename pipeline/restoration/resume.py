"""A restored video on the way to its file: a finished part per chunk, and the state after the last one.

    <folder>/000012_480480.nut    pictures; the number is the time stamp of the first
    <folder>/state.safetensors    what the restoration needs to continue, and the parts before it

A killed job continues after the parts that the state knows; later ones are written again, with the same
content. For the full autoencoder at 1080p the state is gigabytes, so it is saved rarely enough to leave 98%
of the time to the restoration. Parts are always cut at the same places, so that a result does not depend on
when its job was killed.
"""

import os
import time
from collections.abc import Callable, Mapping

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.store import storage
from pipeline.video.muxing import VideoPart

_STATE = "state.safetensors"
_NAMES = "segments"  # the key of the parts' names in the state, as stored since 0.1.0
_SHARE_OF_TIME = 0.02


class RestoredParts:
    """The parts of one video below a folder URL, made in one way (`fingerprint`)."""

    def __init__(self, url: str, fingerprint: str, work_folder: str) -> None:
        """work_folder: local, for files before they are published."""
        self.url = url
        self._fingerprint = fingerprint
        self._work_folder = work_folder
        self._names: list[str] = []
        self._saved_at, self._save_s = float("-inf"), 0.0

    def load(self) -> dict[str, Tensor] | None:
        """The state that an earlier job left, if its parts exist and were made with the same settings.

        Otherwise whatever is there is removed.
        """
        state_url = storage.join(self.url, _STATE)
        if storage.exists(state_url):
            with (
                storage.local_copy(state_url, self._work_folder) as path,
                safe_open(path, framework="pt") as file,
            ):
                about = file.metadata()
                names = about[_NAMES].split()
                there = {os.path.basename(url) for url, _, _ in storage.list_files(self.url)}
                if about["fingerprint"] == self._fingerprint and there.issuperset(names):
                    self._names = names
                    return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.remove()
        return None

    def put(self, path: str, first_pts: int) -> None:
        """Take a finished part, a local file, over."""
        name = f"{len(self._names):06d}_{first_pts}{os.path.splitext(path)[1]}"
        storage.put_file(path, storage.join(self.url, name))
        self._names.append(name)

    def save(self, state: Callable[[], Mapping[str, Tensor]]) -> None:
        """Make the segments so far permanent, with the state after them, if a save is due."""
        start = time.monotonic()
        if (start - self._saved_at) * _SHARE_OF_TIME < self._save_s:
            return
        local = os.path.join(self._work_folder, _STATE)
        about = {"fingerprint": self._fingerprint, _NAMES: " ".join(self._names)}
        save_file(dict(state()), local, metadata=about)
        storage.put_file(local, storage.join(self.url, _STATE))
        self._saved_at = time.monotonic()
        self._save_s = self._saved_at - start

    def local(self) -> list[VideoPart]:
        """All parts, as local files."""
        found = []
        for name in self._names:
            url = storage.join(self.url, name)
            path = storage.path_of(url)
            if not url.startswith("file://"):
                path = os.path.join(self._work_folder, name)
                storage.fetch(url, path)
            found.append(VideoPart(path, int(os.path.splitext(name)[0].split("_")[1])))
        return found

    def remove(self) -> None:
        """Remove parts and state."""
        self._names = []
        storage.remove_folder(self.url)
