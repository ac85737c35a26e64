"""Hashes that identify the weights behind scores and metrics; imports no network library."""

import hashlib
from pathlib import Path

from pipeline.store import hashing, storage

_CLIP_CONFIG = "open_clip_config.json"


def file_hash(url: str) -> str:
    """The sha256 of a file; ValueError if there is none."""
    found = storage.sha256(url)
    if found is None:
        raise ValueError(f"there is no file {url}")
    return found


def clip_hash(source: str, key: str) -> str:
    """Identify a CLIP's weights: a hash of a folder's files, or the commit of a hub model.

    source: an absolute folder in open_clip's form or the id of a Hugging Face model. key: the config's name
    for it, used in the ValueError that is raised if it is neither.
    """
    folder = Path(source)
    if folder.is_dir():
        if not folder.is_absolute():
            raise ValueError(f"{key}: {source} is relative; write an absolute folder, the same on every node")
        if not (folder / _CLIP_CONFIG).is_file():
            raise ValueError(f"{key}: {source} holds no {_CLIP_CONFIG}: no CLIP in open_clip's form")
        hashes = []
        for path in sorted(folder.iterdir()):
            if path.is_file():
                with path.open("rb") as file:
                    hashes.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
        return hashing.fingerprint(files=hashes)
    from huggingface_hub import hf_hub_download  # slow to import
    from huggingface_hub.errors import HfHubHTTPError

    try:
        downloaded = hf_hub_download(source, _CLIP_CONFIG)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{key}: {source} is neither a folder nor a model that the Hugging Face hub gives: {reason}"
        ) from None
    return f"{source}@{Path(downloaded).parent.name}"  # .../snapshots/<commit>/open_clip_config.json
