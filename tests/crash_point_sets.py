"""Which crash points are those of which kind of job."""

from __future__ import annotations

from convoy.core.crash_points import CrashPoint

# The steps of a fit of a first head, of a training with checkpoints, of a search, and of a retraining, each of which
# comes by them alone; all others are those of any run that commits parts.
FIT_CRASH_POINTS = frozenset({CrashPoint.HEAD_POINT_KEPT})
TRAINING_CRASH_POINTS = frozenset(
    {
        CrashPoint.TRAINING_STEP,
        CrashPoint.CHECKPOINT_WRITTEN,
        CrashPoint.CHECKPOINT_RECORDED,
        CrashPoint.WEIGHTS_WRITTEN,
        CrashPoint.TRAINING_RECORDED,
    }
)
SEARCH_CRASH_POINTS = frozenset({CrashPoint.TRIAL_DRAWN, CrashPoint.TRIAL_TRAINED, CrashPoint.TRIAL_RECORDED})
RETRAIN_CRASH_POINTS = frozenset(
    {
        CrashPoint.RETRAIN_PLANNED,
        CrashPoint.ALIASES_CHOSEN,
        CrashPoint.ALIASES_MOVED,
        CrashPoint.RETRAIN_DECIDED,
    }
)
