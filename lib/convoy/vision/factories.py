"""Networks of the user's own: the function that makes one, and a digest of the code that it is written in."""

from __future__ import annotations

import difflib
import importlib
import inspect
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convoy.core.errors import ConfigError, VersionMismatch
from convoy.core.fingerprints import digest_bytes
from convoy.vision.backbone_config import TIMM, TORCHVISION, BackboneConfig, is_factory


def load_factory(arch: str) -> Callable[..., Any]:
    """The function that `package.module:factory` names; ConfigError if it cannot be imported.

    Importing it runs its code: a config is as trusted as a program.
    """
    module_name, _, function_name = arch.partition(":")
    try:
        factory: Callable[..., Any] = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise unusable_factory(arch, error) from error
    return factory


def unusable_factory(arch: str, error: Exception) -> ConfigError:
    """The error of a factory that cannot be imported or called, with the library that may have been meant."""
    next_step = "name an importable package.module:function that returns a torch.nn.Module"
    if (meant := _misspelt_library(arch, error)) is not None:
        next_step = f"write {meant} if that is meant; else {next_step}"
    return ConfigError(f"the factory cannot be used: {error}", where=arch, next_step=next_step)


def _misspelt_library(arch: str, error: Exception) -> str | None:
    """The architecture with the right prefix, where nothing is called like its package, and nearly so a library."""
    prefix, _, name = arch.partition(":")
    if not isinstance(error, ModuleNotFoundError) or error.name != prefix.partition(".")[0]:
        return None
    close = difflib.get_close_matches(prefix.lower() + ":", (TORCHVISION, TIMM), n=1)
    return close[0] + name if close else None


def with_pinned_code(config: BackboneConfig) -> BackboneConfig:
    """A config that says by which code its factory makes the network; that of any other architecture as it is.

    Raises VersionMismatch if the config is pinned to other code than there is here.
    """
    if not is_factory(config.arch):
        return config
    source = _source_file(config.arch)
    found = digest_bytes(source.read_bytes()).hex()
    if config.code_digest not in (None, found):
        raise VersionMismatch(
            f"the code of '{config.arch}' is not that by which this network was made",
            where=f"{source} on {socket.gethostname()}",
            next_step="give all nodes the same file. If you changed it, bring the former one back, and put the new"
            " network into a module of its own",
        )
    return config.model_copy(update={"code_digest": found})


def _source_file(arch: str) -> Path:
    """The file in which a factory is written, also where the module that names it only imports it."""
    factory = load_factory(arch)
    is_defined = inspect.isfunction(factory) or inspect.isclass(factory)
    module = sys.modules[factory.__module__ if is_defined else arch.partition(":")[0]]
    source = Path(getattr(module, "__file__", None) or "")
    if not source.is_file():
        raise ConfigError(
            "the code of the factory cannot be read, and what it computes could not be told from what it computed",
            where=arch,
            next_step="name a factory of a module that lies in a file",
        )
    return source
