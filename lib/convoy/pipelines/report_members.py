"""Which models made the predictions of a run: by its record, and only where digests prove it."""

from __future__ import annotations

import json
import re

from pydantic import ValidationError

from convoy.core.config import StrictModel
from convoy.core.errors import ConvoyError
from convoy.storage.bundles import MODELS_PREFIX, BundleRef, list_bundles, resolve_bundle
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunRecord
from convoy.vision.backbone_config import BackboneConfig


class PretrainedMember(StrictModel):
    """A network that a config names by its weights: no bundle of the workspace keeps it."""

    network: str
    weights: str
    digest: str


class RunMembers(StrictModel):
    """The references of the bundles, `name@digest`, and pretrained networks; or why neither are known.

    `told` is what the run was told of its model beyond that.
    """

    bundles: list[str]
    told: dict[str, str]
    pretrained: tuple[PretrainedMember, ...] = ()
    gap: str = ""


def members_of_run(store: ObjectStore, record: RunRecord) -> RunMembers | None:
    """The models behind a run's predictions; None for a run that has none."""
    told = {name: record.config.get(name) for name in ("bundle", "model", "ensemble", "crops", "mode")}
    words = {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in told.items()
        if value
    }
    identity = record.identity
    if "model_digest" in identity:
        # Equal models may have several names: that by which the run was told comes first.
        told_name = _name_told(store, record)
        refs = [ref for ref in list_bundles(store) if ref.digest == identity["model_digest"]]
        ref = min(refs, key=lambda ref: ref.name != told_name, default=None)
        if ref is not None:
            return RunMembers(bundles=[str(ref)], told={})
        if record.config.get("model"):
            return _pretrained(record, words)
        gap = f"no bundle of the workspace has the digest {identity['model_digest']}: it was never kept, or removed"
        return RunMembers(bundles=[], told=words, gap=gap)
    if "committee" not in identity:
        return None
    named = record.config.get("ensemble")
    if isinstance(named, list) and named and all(isinstance(one, str) and "@" in one for one in named):
        # A search names the members of its ensembles with their digests.
        return _kept(store, named, words)
    return _rebuilt(store, record, words)


def _name_told(store: ObjectStore, record: RunRecord) -> str:
    """The name of the bundle that a run was told to take, or to write."""
    reference = str(record.config.get("bundle") or record.config.get("name") or "")
    return re.split("[@/]", reference.removeprefix(store.uri(MODELS_PREFIX)), maxsplit=1)[0]


def _pretrained(record: RunRecord, words: dict[str, str]) -> RunMembers:
    """The pretrained network that a run was told to take: its digest is in the run's identity."""
    try:
        backbone = BackboneConfig.model_validate(record.config["model"]["backbone"])
    except (KeyError, TypeError, ValidationError):
        return RunMembers(bundles=[], told=words, gap="its config is of another version of Convoy")
    member = PretrainedMember(
        network=backbone.arch, weights=backbone.weights, digest=record.identity["model_digest"]
    )
    return RunMembers(bundles=[], told={}, pretrained=(member,))


def _kept(store: ObjectStore, references: list[str], words: dict[str, str]) -> RunMembers:
    refs: list[BundleRef] = []
    for reference in references:
        try:
            refs.append(resolve_bundle(store, reference))
        except ConvoyError:
            return RunMembers(bundles=[], told=words, gap=f"{reference} is no bundle of the workspace")
    return RunMembers(bundles=[str(ref) for ref in refs], told={})


def _rebuilt(store: ObjectStore, record: RunRecord, words: dict[str, str]) -> RunMembers:
    """What the run's config names now, if that gives the committee that the run had."""
    # Imports torch, which only committees need.
    from convoy.pipelines.evaluate import EvaluateConfig  # noqa: PLC0415
    from convoy.pipelines.model_choice import chosen_committee  # noqa: PLC0415
    from convoy.pipelines.score_config import ScoreConfig  # noqa: PLC0415

    model: type[EvaluateConfig] | type[ScoreConfig] = (
        ScoreConfig if record.verb == "score" else EvaluateConfig
    )
    try:
        config = model.model_validate(record.config)
        committee = chosen_committee(store, config, config, config.extraction)
    except (ConvoyError, ValidationError) as error:
        reason = (
            error.what if isinstance(error, ConvoyError) else "its config is of another version of Convoy"
        )
        return RunMembers(
            bundles=[], told=words, gap=f"what the run was told names no committee any more: {reason}"
        )
    if committee.digest != record.identity["committee"]:
        return RunMembers(bundles=[], told=words, gap="what the run was told names another model by now")
    bundles = [str(member.bundle) for member in committee.members if member.bundle is not None]
    named: list[BackboneConfig | None] = []
    if config.model is not None:
        named = [config.model.backbone]
    elif config.ensemble is not None:
        named = [member.backbone for member in config.ensemble.members]
    pretrained = tuple(
        PretrainedMember(network=backbone.arch, weights=backbone.weights, digest=member.digest)
        # A bundle's own members are bundles.
        for backbone, member in zip(named, committee.members, strict=False)
        if backbone is not None
    )
    return RunMembers(bundles=bundles, told={}, pretrained=pretrained)
