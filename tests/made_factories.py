"""A network of the user's own, in a module that changes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

CODE = """
from torch import nn

def network(num_classes=3):
    body = [nn.Conv2d(3, {width}, 3), nn.{activation}(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear({width}, num_classes))

def nothing(num_classes=3):
    return None
"""
ARCH = "made_network:network"


def write_factory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, activation: str = "ReLU", width: int = 4
) -> None:
    """Write the module of ARCH, or write it anew, so that it is what a new process would meet."""
    folder.mkdir(exist_ok=True)
    (folder / "made_network.py").write_text(CODE.format(activation=activation, width=width))
    # Python takes compiled code for that of a file that was changed within a second.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "made_network", raising=False)
