"""Convoy, as a user runs it: `convoy evaluate` of ensembles of random networks, exact, at ten crops."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow.dataset as pads
from evaluate_job import PLAN, CommitteeRates, EvaluateJob, save_joint
from job_processes import ProcessSampler, share_of_others
from measuring import convoy
from our_rate import network_share, steady_rate

from convoy.cluster.session import ray_session
from convoy.core.config import load_config
from convoy.core.crop_policies import MemberOutputs
from convoy.core.progress import Silent
from convoy.pipelines.committees import EnsembleConfig, MemberConfig
from convoy.pipelines.evaluate import EvaluateConfig, EvaluateReport, run_evaluate
from convoy.pipelines.feature_plan import CompileChoice, ExtractionConfig, PrecisionChoice
from convoy.storage.commits import read_records
from convoy.storage.runs import RunFolder
from convoy.storage.stores import open_store

_DATASET = "images"
_NUM_OUTPUTS = 1000


class OursSettings(EvaluateJob):
    """What the networks compute in."""

    precision: PrecisionChoice = PrecisionChoice.AUTO


def run_ours(settings: OursSettings) -> CommitteeRates:
    """The rate of each committee is the steady one, as in the other benchmarks."""
    rates, others, networks = {}, {}, {}
    with TemporaryDirectory(prefix="convoy-bench-evaluate-") as folder, ray_session():
        workspace = str(Path(folder, "workspace"))
        _freeze(settings, Path(folder, "images"), workspace)
        for size in settings.sizes:
            with ProcessSampler() as sampler:
                report = run_evaluate(_config(settings, size, workspace), progress=Silent())
            records = read_records(RunFolder(open_store(workspace), report.run))
            rates[size] = steady_rate(records)
            others[size] = share_of_others(sampler.samples, records)
            networks[size] = network_share(records)
            if size == len(settings.archs):
                save_joint(settings, _probabilities(settings, workspace, report))
    return CommitteeRates(
        num_images=len(settings.paths), images_per_s=rates, others_share=others, network_share=networks
    )


def _freeze(settings: OursSettings, tree: Path, workspace: str) -> None:
    """The images as the test split of a dataset; evaluations want a label, which here means nothing."""
    for path in settings.paths:
        link = tree / "test" / "class_0" / os.path.basename(path)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    convoy("dataset", str(tree), "--name", _DATASET, "--workspace", workspace)


def _config(settings: OursSettings, size: int, workspace: str) -> EvaluateConfig:
    classes = tuple(f"class_{index}" for index in range(_NUM_OUTPUTS))
    backbones = [settings.backbone(place) for place in range(size)]
    members = tuple(
        MemberConfig(
            backbone=backbone.model_copy(update={"preset": settings.preset}),
            classes=classes,
        )
        for backbone in backbones
    )
    return EvaluateConfig(
        workspace=workspace,
        dataset=_DATASET,
        ensemble=EnsembleConfig(members=members),
        crops=PLAN.policy,
        keep=MemberOutputs.NONE,
        extraction=ExtractionConfig(
            precision=settings.precision,
            compile=CompileChoice.ALWAYS if settings.compiled else CompileChoice.NEVER,
            batch_size=settings.batch_size,
        ),
    )


def _probabilities(settings: OursSettings, workspace: str, report: EvaluateReport) -> np.ndarray:
    """The joint probabilities of all images, in the order of their names."""
    rows = pads.dataset(f"{workspace}/runs/{report.run}/predictions").to_table(["sample_id", "logits"])
    names = [os.path.basename(sample_id) for sample_id in rows["sample_id"].to_pylist()]
    logits = dict(zip(names, rows["logits"].to_pylist(), strict=True))
    logits_NK = np.array([logits[os.path.basename(path)] for path in settings.paths])
    return np.exp(logits_NK)


if __name__ == "__main__":
    print(run_ours(load_config(OursSettings, None, sys.argv[1:])).model_dump_json())
