"""Where images become batches when nobody says so: it also depends on how they lie."""

from __future__ import annotations

from convoy.cluster.training import WorkerOptions
from convoy.cluster.training_spec import Ingest
from convoy.storage.manifests import Manifest

FUSED_NOTE = (
    "images are prepared by threads of the training workers: they are rows of parquet files, of which processes beside"
    " the training would read a row group for nearly every image; `workers.ingest=split` has it so nevertheless"
)


def settle_ingest(options: WorkerOptions, manifest: Manifest) -> WorkerOptions:
    """The options, fused in place of `auto` where the images are rows of parquet files.

    A preparer of the split ingest reads the rows of one shuffled batch at a time, so nearly each costs a row group; a
    worker's own threads read those of some thousand rows together.
    """
    if options.ingest is not Ingest.AUTO or not _lies_in_row_groups(manifest):
        return options
    return options.model_copy(update={"ingest": Ingest.FUSED})


def _lies_in_row_groups(manifest: Manifest) -> bool:
    # A manifest is of one kind of source, so the first rows speak for all.
    first = next(manifest.iter_batches(["row_index"]))["row_index"]
    return bool(first.null_count < len(first))
