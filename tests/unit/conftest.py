"""Unit tests compare with plain loops on the CPU: a GPU is hidden from them, before torch is asked for one."""

from __future__ import annotations

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
