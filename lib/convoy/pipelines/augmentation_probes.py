"""Augmentation on cached views: a linear probe that learns from drawn views beside the eval view, for each policy."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import pyarrow as pa

from convoy.cluster.session import ray_session
from convoy.core.progress import Progress
from convoy.pipelines.augmentation_outcomes import NamedPolicy, PolicyOutcome
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.feature_plan import ExtractionConfig, ManyPolicies, holding_features
from convoy.pipelines.features import FeatureJob
from convoy.pipelines.probe_judging import ProbeBench, ProbeRows
from convoy.storage.feature_cache import FeatureCache
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.vision.head_config import HeadConfig

# Of one batch in all of its views; a worker holds three such batches.
_MOST_BATCH_BYTES = 128 * 2**20
# One that is not told is made smaller where there are many views.
_USUAL_BATCH = 32
# The eval view, and the first drawn one.
_JUDGED_VIEWS = 2

# Some policies, and the job that draws their views.
PartJob = tuple[Sequence[NamedPolicy], FeatureJob]


class ViewProbes:
    """Probes on one tap of one backbone, on some rows of a dataset, with `views` drawn views of each policy."""

    def __init__(
        self,
        store: ObjectStore,
        manifest: Manifest,
        rows: ProbeRows,
        request: ManyPolicies,
        extraction: ExtractionConfig,
        head: HeadConfig,
    ) -> None:
        """`request` names dataset, backbone, tap and views; its policies are those of each call."""
        self._store, self._manifest, self._rows = store, manifest, rows
        self._request, self._extraction = request, extraction
        self._bench = ProbeBench(FeatureCache(store), rows, head, num_classes=len(manifest.classes))

    def outcomes(
        self, backbone: BackboneRecord, policies: Sequence[NamedPolicy], *, progress: Progress
    ) -> list[PolicyOutcome]:
        """What each policy does, in their order; views that are cached already are not drawn again."""
        (tap,) = self._request.taps
        learnt, judged = self.jobs(backbone, policies)
        jobs = [job for _, job in (*learnt, *judged)]
        with ray_session() if any(job.plan().missing for job in jobs) else nullcontext():
            for number, job in enumerate(jobs, start=1):
                progress.stage(f"drawing views, part {number} of {len(jobs)}")
                job.ensure(progress=progress)
        eval_set = jobs[0].set_id(tap)
        plain = self._bench.fit([eval_set], eval_set)
        without_N = self._bench.predict(plain, eval_set)
        outcomes = []
        for policy, job in ((policy, job) for part, job in learnt for policy in part):
            progress.stage(f"probing {policy}")
            views = [job.set_id(tap, view, policy.policy) for view in range(1, self._request.views)]
            probe = self._bench.fit([eval_set, *views], eval_set)
            outcomes.append(
                PolicyOutcome(
                    policy=policy,
                    labels_N=self._rows.judged.labels_N,
                    without_N=without_N,
                    with_N=self._bench.predict(probe, eval_set),
                    drawn_N=self._bench.predict(plain, views[0]),
                )
            )
        return outcomes

    def jobs(
        self, backbone: BackboneRecord, policies: Sequence[NamedPolicy]
    ) -> tuple[list[PartJob], list[PartJob]]:
        """Some policies each with the job of their views: of the rows to learn from, and of those that judge.

        Of the latter only the first drawn view is looked at.
        """
        learnt = self._jobs(backbone, policies, self._rows.train_table, self._request.views)
        return learnt, self._jobs(backbone, policies, self._rows.judged_table, _JUDGED_VIEWS)

    def _jobs(
        self, backbone: BackboneRecord, policies: Sequence[NamedPolicy], rows: pa.Table, views: int
    ) -> list[PartJob]:
        """As many policies at once as a worker can hold: an image is decoded once a part."""
        batch_size = self._extraction.batch_size or _USUAL_BATCH
        view_bytes = batch_size * 3 * backbone.preset.crop_px**2
        most = max((_MOST_BATCH_BYTES // view_bytes - 1) // (views - 1), 1)
        extraction = holding_features(self._extraction, backbone)
        jobs = []
        for start in range(0, len(policies), most):
            part = policies[start : start + most]
            first, *further = [named.policy for named in part]
            request = self._request.model_copy(
                update={"views": views, "augmentation": first, "policies": tuple(further)}
            )
            job = FeatureJob(self._store, self._manifest, backbone, request, extraction, rows=rows)
            jobs.append((part, job))
        return jobs
