"""A precision of `auto` on a cluster: what its workers compute fast, asked once for a dataset."""

from __future__ import annotations

from pathlib import Path

import pytest

from convoy.cluster.growth import GPUS_VARIABLE
from convoy.core.errors import ConfigError
from convoy.pipelines import device_settings
from convoy.pipelines.device_settings import (
    foresee_precision,
    settle_batch_size,
    settle_precision,
)
from convoy.pipelines.feature_plan import (
    COMPILE_PAYS_FROM_S,
    CompileChoice,
    ExtractionConfig,
    PrecisionChoice,
    compile_decision,
)
from convoy.storage.local_store import LocalStore
from convoy.vision.engine_options import NetworkDevice, Precision, device_here
from made_devices import made_device

AUTO = ExtractionConfig()
# On two cores; of the first a GPU needs the last.
LONG_S, SHORT_S = COMPILE_PAYS_FROM_S * made_device().speed, COMPILE_PAYS_FROM_S - 1


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[NetworkDevice]:
    """What the workers of a cluster will say, one after the other."""
    answers: list[NetworkDevice] = []
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.delenv(GPUS_VARIABLE, raising=False)
    monkeypatch.setattr(device_settings, "find_device", lambda: answers.pop(0))
    return answers


def test_a_cluster_is_asked_once_for_a_dataset(store: LocalStore, answers: list[NetworkDevice]) -> None:
    """So a job that finds nothing to do need not wait for Ray, and features stay of one precision."""
    answers += [made_device(Precision.BF16)]
    first, again = (settle_precision(store, "digits", AUTO) for _ in range(2))
    assert first == again
    assert first.extraction.precision is PrecisionChoice.BF16
    assert first.notes == ("precision bf16: NVIDIA H100 computes bf16 natively",)
    assert not answers


def test_other_datasets_and_jobs_that_ask_for_gpus_are_answered_for_themselves(
    store: LocalStore, answers: list[NetworkDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, t4, h100 = made_device(Precision.FP32, is_gpu=False), made_device(Precision.FP32), made_device()
    answers += [cpu, t4, h100]
    on_cpus = settle_precision(store, "digits", AUTO)
    of_others = settle_precision(store, "letters", AUTO)
    monkeypatch.setenv(GPUS_VARIABLE, "4")
    on_gpus = settle_precision(store, "digits", AUTO)
    found = [one.extraction.precision.value for one in (on_cpus, of_others, on_gpus)]
    assert found == ["fp32", "fp32", "bf16"]


def test_what_a_config_says_holds_and_nobody_is_asked(
    store: LocalStore, answers: list[NetworkDevice]
) -> None:
    told = ExtractionConfig(precision=PrecisionChoice.FP32)
    assert settle_precision(store, "digits", told) == (told, ())
    assert foresee_precision(store, "digits", told) == (told, ())


def test_a_batch_that_is_not_told_is_that_of_the_device_that_was_asked_before(
    store: LocalStore, answers: list[NetworkDevice]
) -> None:
    answers += [made_device()]
    assert settle_batch_size(store, "digits", ExtractionConfig(batch_size=5), 224) == 5
    assert answers, "what is told needs no device"
    settle_precision(store, "digits", AUTO)
    assert settle_batch_size(store, "digits", AUTO, 224) == 256


@pytest.mark.parametrize(
    ("num_crops", "expected"), [(1, 256), (6, 256), (2 * 6, 256), (72, 32), (2 * 72, 16)]
)
def test_many_crops_of_an_image_make_batches_smaller(
    store: LocalStore, answers: list[NetworkDevice], num_crops: int, expected: int
) -> None:
    """A worker holds three of them, of 2.6 GiB each if it were 256 images in 72 crops."""
    answers += [made_device()]
    assert settle_batch_size(store, "digits", AUTO, 224, num_crops=num_crops) == expected


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (made_device(Precision.BF16), {32: 256, 224: 256, 299: 128, 600: 32}),
        (made_device(Precision.FP32), {32: 64, 224: 64, 299: 32}),
        (made_device(Precision.FP32, is_gpu=False), {28: 128, 96: 128, 160: 32, 224: 32, 384: 8, 5000: 1}),
    ],
)
def test_the_larger_the_images_the_fewer_are_in_a_batch(
    device: NetworkDevice, expected: dict[int, int]
) -> None:
    assert {crop_px: device.batch_size(crop_px) for crop_px in expected} == expected


def test_a_plan_asks_nobody_and_says_so(store: LocalStore, answers: list[NetworkDevice]) -> None:
    foreseen = foresee_precision(store, "digits", AUTO)
    assert foreseen.extraction.precision.value == device_here().precision.value
    assert "the job itself asks a worker of the cluster" in foreseen.notes[0]
    answers += [made_device()]
    assert settle_precision(store, "digits", AUTO) == foresee_precision(store, "digits", AUTO)


def test_without_a_cluster_it_is_what_this_machine_computes_fast(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    here = device_here()
    for settle in (settle_precision, foresee_precision):
        extraction, notes = settle(store, "digits", AUTO)
        assert (extraction.precision.value, notes) == (here.precision.value, (here.precision_note,))
    # Another machine may go on with the workspace.
    assert not list(store.list_objects())


@pytest.mark.parametrize(
    ("choice", "forecast_s", "has_compiler", "expected"),
    [
        (CompileChoice.AUTO, LONG_S, True, True),
        (CompileChoice.AUTO, LONG_S, False, False),
        (CompileChoice.AUTO, LONG_S, None, False),
        (CompileChoice.ALWAYS, SHORT_S, True, True),
        # Nobody could be asked: who insists has a reason.
        (CompileChoice.ALWAYS, SHORT_S, None, True),
    ],
)
def test_networks_are_compiled_where_the_workers_can(
    choice: CompileChoice, forecast_s: float, has_compiler: bool | None, expected: bool
) -> None:
    device = made_device(has_compiler=has_compiler)
    compiled, reason = compile_decision(choice, forecast_s, lambda: device)
    assert compiled is expected
    assert reason.startswith(
        "compiled"
        if expected
        else "eager: no gcc or clang with Python's headers (python3-dev) was found beside NVIDIA H100"
    )


@pytest.mark.parametrize(
    "device", [made_device(), made_device(Precision.FP32), made_device(is_gpu=False, num_cpus=64)]
)
def test_a_faster_device_must_have_more_to_do_before_compiling_pays(device: NetworkDevice) -> None:
    enough_s = COMPILE_PAYS_FROM_S * device.speed
    assert compile_decision(CompileChoice.AUTO, enough_s, lambda: device)[0]
    compiled, reason = compile_decision(CompileChoice.AUTO, enough_s - device.speed, lambda: device)
    assert not compiled
    assert reason == "eager: forecast of 399 s forward is less than 400 s"


def no_question() -> NetworkDevice:
    raise AssertionError


@pytest.mark.parametrize("choice", [CompileChoice.NEVER, CompileChoice.AUTO])
def test_who_would_not_compile_anyway_asks_nobody(choice: CompileChoice) -> None:
    assert compile_decision(choice, SHORT_S, no_question)[0] is False


def test_a_network_that_must_be_compiled_and_cannot_is_refused() -> None:
    cpu = made_device(name="the CPU", is_gpu=False, has_compiler=False)
    with pytest.raises(
        ConfigError,
        match=r"there is no g\+\+ or clang\+\+ with Python's headers \(python3-dev\) beside the CPU",
    ):
        compile_decision(CompileChoice.ALWAYS, SHORT_S, lambda: cpu)


def test_a_plan_leaves_the_compiler_open_where_it_asks_nobody() -> None:
    assert compile_decision(CompileChoice.AUTO, LONG_S, lambda: None)[1].endswith(
        "if the workers have a compiler"
    )
