"""Heads as data: their settings, and what one is rebuilt from. Free of torch."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from convoy.core.config import StrictModel
from convoy.core.errors import ConfigError

# Where the tensors of a head lie in the file of a model.
HEAD_PREFIX = "head."


class HeadKind(StrEnum):
    """The families of heads."""

    SOFTMAX = "softmax"  # multinomial logistic regression
    LINEAR_SVM = "linear_svm"  # one against the rest, squared hinge
    MLP = "mlp"  # one hidden layer


class Selection(StrEnum):
    """What makes one candidate better than another on the validation rows; the second breaks ties.

    The NLL of a linear SVM is that of the softmax of its margins: comparable between its candidates only.
    """

    TOP1_THEN_NLL = "top1_then_nll"
    NLL_THEN_TOP1 = "nll_then_top1"


class Standardisation(StrEnum):
    """What is done to each feature before fitting. It is folded into the weights afterwards."""

    MEAN_STD = "mean_std"  # by the train rows' weighted mean and standard deviation
    NONE = "none"


class MlpConfig(StrictModel):
    """How an MLP head is trained: AdamW on mini-batches, stopped when validation stops improving.

    Those of an epoch have the same size to within one row, at most `batch_rows`.
    """

    hidden_width: PositiveInt = 512
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    epochs: PositiveInt = 50
    patience_epochs: PositiveInt = 5
    learning_rate: PositiveFloat = 1e-3
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-2
    batch_rows: PositiveInt = 512
    seed: int = 0


class HeadConfig(StrictModel):
    """Settings of a head.

    `C` has scikit-learn's meaning for softmax and linear_svm: the objective is C * sum of weighted losses
    + 0.5 * ||W||^2, intercepts not penalised, W in units of standardised features. Several values are tried
    from the strongest regularisation (smallest C) on; an equally good weaker one does not replace it.
    With two classes softmax has two columns: it equals scikit-learn's one-column form at twice the C.
    """

    kind: HeadKind = HeadKind.SOFTMAX
    C: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    selection: Selection = Selection.TOP1_THEN_NLL
    standardisation: Standardisation = Standardisation.MEAN_STD
    max_iterations: PositiveInt = 1000
    # Largest entry of the gradient of the objective / (C * total weight). At 1e-6 probabilities are within
    # 5e-4 of the optimum's on the sets it was measured on.
    gradient_tolerance: PositiveFloat = 1e-6
    mlp: MlpConfig = MlpConfig()


class HeadSpec(StrictModel):
    """All that is needed to rebuild a head's module, beside its tensors."""

    kind: HeadKind
    num_features: PositiveInt
    num_classes: Annotated[int, Field(ge=2)]
    hidden_width: PositiveInt | None = None
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0

    @model_validator(mode="after")
    def _only_an_mlp_has_a_hidden_layer(self) -> Self:
        if (self.hidden_width is not None) != (self.kind is HeadKind.MLP):
            raise ValueError("hidden_width belongs to an mlp head, and to no other")
        return self


def can_choose(config: HeadConfig, *, has_val: bool) -> bool:
    """Whether there is one value of C, or validation rows to choose among several by."""
    return has_val or config.kind is HeadKind.MLP or len(set(config.C)) == 1


def check_choice(config: HeadConfig, *, has_val: bool) -> None:
    """Raise ConfigError where there are several values of C, and no validation rows to choose by."""
    if not can_choose(config, has_val=has_val):
        raise ConfigError(
            f"there are {len(set(config.C))} values of C and no validation rows to choose by",
            where="head.C",
            next_step="give the dataset a val split, or set one value: head.C=[1.0]",
        )
