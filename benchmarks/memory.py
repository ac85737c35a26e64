"""The kernel's figures on a process's memory."""

from pathlib import Path


def status_bytes(name: str, pid: int | str = "self") -> int:
    """A line of /proc/<pid>/status in bytes: VmRSS is the memory now, VmHWM its peak.

    VmHWM is of this program alone; getrusage's ru_maxrss begins with what the parent process once had.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def reset_peak(pid: int | str = "self") -> int:
    """Resident bytes now; also resets the kernel's own peak, which no sampling could miss."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return status_bytes("VmRSS", pid)
