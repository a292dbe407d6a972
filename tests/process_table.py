"""The processes of this machine, as Linux tells of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """The command line of a process, which Ray replaces by a title for its workers, and who started it."""

    title: str
    parent: int


def process_table() -> dict[int, Process]:
    """All processes by their ids; those that end meanwhile are left out."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        found[int(folder.name)] = Process(title, parent)
    return found


def is_descendant(pid: int, processes: Mapping[int, Process], *, ancestor: int | None = None) -> bool:
    """Whether a process is the ancestor, by default this one, or below it: other tests have some of equal titles."""
    wanted = os.getpid() if ancestor is None else ancestor
    while pid in processes and pid != wanted:
        pid = processes[pid].parent
    return pid == wanted
