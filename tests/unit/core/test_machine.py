from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from convoy.core import machine
from convoy.core.machine import (
    free_memory_bytes,
    machine_facts,
    peak_memory_bytes,
    read_cpuinfo,
    resident_memory_bytes,
)

MIB = 2**20


def test_facts_tell_what_networks_run_on() -> None:
    facts = machine_facts("A GPU")
    assert facts.gpu == "A GPU"
    assert facts.cpu
    assert facts.num_cpus >= 1
    assert facts == machine_facts("A GPU")
    assert facts != machine_facts(None)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' account of memory")
def test_peak_memory_is_that_since_the_reset() -> None:
    # In a process of its own: how much memory this one took before is anybody's guess.
    script = (
        "from convoy.core.machine import *\n"
        "held = b'x' * (200 << 20); del held\n"
        "first = peak_memory_bytes() - resident_memory_bytes()\n"
        "reset_peak_memory()\n"
        "print(first, peak_memory_bytes() - resident_memory_bytes())\n"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    first, second = map(int, printed.stdout.split())
    assert first >= 190 * MIB
    assert second < 20 * MIB


def test_a_system_that_does_not_say_gives_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("_STATUS", "_CPUINFO", "_CLEAR_REFS", "_MEMINFO"):
        monkeypatch.setattr(machine, name, tmp_path / "nowhere" / "nothing")
    assert resident_memory_bytes() is None
    assert peak_memory_bytes() is None
    assert free_memory_bytes() is None
    assert read_cpuinfo() == {}
    machine.reset_peak_memory()
    assert machine_facts(None).cpu_flags == ()


@pytest.mark.parametrize(("limit", "free"), [("max", 2048 * 1024), (str(10**6), 450_000), ("100", 0)])
def test_free_memory_is_that_of_the_machine_or_of_the_container_where_that_has_less(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, free: int
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  4096 kB\nMemAvailable:  2048 kB\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.stat").write_text("anon 300000\ninactive_file 50000\n")
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert free_memory_bytes() == free
