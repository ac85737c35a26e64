"""Ids, seeds and fingerprints: hashes that are the same on every machine and in every run."""

import hashlib
import json
from typing import Any

CONTRACT_VERSION = 1


def fingerprint(**determinants: Any) -> str:
    """16 hex digits over everything that determines the content of rows (but not which rows exist)."""
    text = json.dumps({"contract": CONTRACT_VERSION, **determinants}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stable_hash(*parts: object) -> int:
    """A 63-bit integer of the parts, the same on every machine and run: ids, seeds and shards use it."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def stable_id(*parts: object) -> str:
    """16 hex digits of the parts."""
    return f"{stable_hash(*parts):016x}"
