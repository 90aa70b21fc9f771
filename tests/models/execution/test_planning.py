"""What is asked for and what a device can do, without any device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from kontextd_kernels.fp8_linear import multiplies_fp8
from kontextd_models import Acceleration, EngineConfig, MemoryMode, memory
from kontextd_models.acceleration.preset import Preset
from kontextd_models.acceleration.table import PresetTable
from kontextd_models.errors import InvalidValue
from kontextd_models.execution.planning import (
    Device,
    ExecutionPlan,
    choose_precision,
    plan_execution,
    reuses_reference,
)
from kontextd_models.folder import check_folder

CPU, HOPPER, AMPERE = Device(None, False), Device((9, 0), True), Device((8, 6), True)
IN_FLOAT32 = Device((9, 0), False)


def table(precision: str = "") -> PresetTable:
    return PresetTable({name: Preset() for name in Acceleration}, Path("/models/k/presets.json"), precision=precision)


@pytest.mark.parametrize("device", [CPU, HOPPER, AMPERE])
@pytest.mark.parametrize(("asked", "settled_with"), [("auto", ""), ("auto", "full"), ("full", "fp8")])
def test_full_precision_unless_somebody_wants_float8(device: Device, asked: str, settled_with: str) -> None:
    assert choose_precision(EngineConfig(precision=asked), table(settled_with), device) == (False, "")


@pytest.mark.parametrize(("asked", "settled_with"), [("auto", "fp8"), ("fp8", ""), ("fp8", "fp8")])
def test_float8_where_the_device_multiplies_it(asked: str, settled_with: str) -> None:
    assert choose_precision(EngineConfig(precision=asked), table(settled_with), HOPPER) == (True, "")


@pytest.mark.parametrize("device", [CPU, HOPPER])
def test_float8_with_a_table_settled_in_full_precision_says_where_its_fidelity_comes_from(device: Device) -> None:
    lowered, note = choose_precision(EngineConfig(precision="fp8"), table("full"), device)
    assert lowered
    assert (
        "precision fp8 was asked for, and presets.json was settled with full: the fidelity of its presets was measured "
        "in full precision"
    ) in note
    assert ("slower than full precision; precision fp8" in note) == (device is CPU)
    assert "settled" not in choose_precision(EngineConfig(precision="fp8"), table(), device)[1]
    assert "settled" not in choose_precision(EngineConfig(precision="fp8"), table("full"), AMPERE)[1]


@pytest.mark.parametrize(
    ("device", "said"),
    [(AMPERE, "a device of compute capability 8.6 has no"), (IN_FLOAT32, "compute capability 9.0 in float32 has no")],
)
def test_float8_that_a_gpu_cannot_do_falls_back_with_a_note(device: Device, said: str) -> None:
    lowered, note = choose_precision(EngineConfig(precision="fp8"), table(), device)
    assert not lowered
    assert "precision fp8 was asked for" in note
    assert said in note
    assert "compute capability 8.9" in note
    lowered, note = choose_precision(EngineConfig(), table("fp8"), device)
    assert not lowered
    assert "precision fp8 is what presets.json was settled with" in note


def test_on_the_cpu_float8_runs_where_it_is_asked_for_by_name_and_says_that_it_is_slow() -> None:
    assert choose_precision(EngineConfig(precision="fp8"), table(), CPU)[0] is True
    assert "slower" in choose_precision(EngineConfig(precision="fp8"), table(), CPU)[1]
    lowered, note = choose_precision(EngineConfig(), table("fp8"), CPU)
    assert not lowered
    assert "the CPU has no fast product" in note


def test_the_kernels_and_the_plan_agree_on_what_multiplies_float8() -> None:
    capabilities = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
    planned = [Device(capability, True).multiplies_fp8 for capability in capabilities]
    assert planned == [multiplies_fp8("cuda", capability) for capability in capabilities]


def plan(device: Device, mode: MemoryMode = MemoryMode.RESIDENT, **asked: str) -> ExecutionPlan:
    return plan_execution(EngineConfig(**asked), (False, ""), device, mode)


@pytest.mark.parametrize("mode", [mode for mode in MemoryMode if mode is not MemoryMode.AUTO])
def test_streamed_blocks_say_that_they_keep_no_reference(mode: MemoryMode) -> None:
    def notes(keeps_reference: bool) -> tuple[str, ...]:
        told = plan_execution(EngineConfig(), (False, ""), HOPPER, mode, keeps_reference=keeps_reference)
        return told.notes

    streams = mode in (MemoryMode.GROUP_OFFLOAD, MemoryMode.SEQUENTIAL)
    assert notes(keeps_reference=False) == ()
    assert any("these steps run in full" in note for note in notes(keeps_reference=True)) == streams


def test_the_cpu_runs_as_diffusers_does_unless_told_otherwise() -> None:
    assert plan(CPU) == ExecutionPlan()
    assert plan(CPU, compile="on") == ExecutionPlan(compiled=True)
    (note,) = plan(CPU, attention="cudnn").notes
    assert "on the CPU there is only torch's own" in note
    assert plan(CPU, attention="cudnn").attention == "native"


@pytest.mark.parametrize("mode", [MemoryMode.RESIDENT, MemoryMode.ENCODERS_OFF])
def test_a_gpu_that_holds_the_blocks_compiles_them_and_tries_attention(mode: MemoryMode) -> None:
    assert plan(AMPERE, mode) == ExecutionPlan(compiled=True, attention="auto", kernels="auto")
    assert plan(AMPERE, mode, compile="off", attention="native") == ExecutionPlan()


def test_kernels_come_by_themselves_into_compiled_blocks_on_a_gpu_alone() -> None:
    asked = [("auto", "auto"), ("auto", "off"), ("on", "off"), ("off", "auto")]
    found = [plan(HOPPER, kernels=kernels, compile=compile).kernels for kernels, compile in asked]
    assert found == ["auto", "off", "on", "off"]
    assert plan(CPU, compile="on").kernels == "off"
    on_cpu = plan(CPU, kernels="on")
    assert on_cpu.kernels == "on"
    assert "worked out by their references" in on_cpu.notes[0]
    streamed = plan(HOPPER, MemoryMode.GROUP_OFFLOAD, kernels="on")
    assert streamed.kernels == "off"
    assert "in the memory mode group_offload blocks run as diffusers has them" in streamed.notes[0]


@pytest.mark.parametrize("mode", [MemoryMode.GROUP_OFFLOAD, MemoryMode.SEQUENTIAL])
def test_streamed_blocks_run_as_diffusers_does_and_say_so_where_more_was_asked_for(mode: MemoryMode) -> None:
    assert plan(HOPPER, mode) == ExecutionPlan()
    told = plan(HOPPER, mode, compile="on", attention="fa3")
    assert (told.compiled, told.attention) == (False, "native")
    assert [mode.value in note for note in told.notes] == [True, True]


def test_notes_come_in_order_and_precision_is_told_by_name() -> None:
    told = plan_execution(
        EngineConfig(attention="flash"), (True, "of precision"), Device(None, True), MemoryMode.RESIDENT
    )
    assert told.precision == "fp8"
    assert told.notes[0] == "of precision"
    assert len(told.notes) == 2
    assert ExecutionPlan().precision == "full"


@pytest.mark.parametrize(
    ("field", "value", "choices"),
    [
        ("precision", "int8", "auto, full or fp8"),
        ("compile", "", "auto, on or off"),
        ("attention", "fa2", "flash"),
        ("kernels", "yes", "auto, on or off"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(field: str, value: str, choices: str) -> None:
    config = EngineConfig(**{field: value})
    with pytest.raises(InvalidValue, match=f"{field} is '{value}'; it must be .*{choices}") as refused:
        plan_execution(config, choose_precision(config, table(), CPU), CPU, MemoryMode.RESIDENT)
    assert refused.value.field == field


# Memory.


def test_whether_presets_keep_the_reference_is_seen_from_their_rows() -> None:
    assert not reuses_reference([Preset(), Preset(computed=0.5)])
    assert reuses_reference([Preset(), Preset(reuse_reference=True)])
    assert reuses_reference([Preset(masks={3: "F.c"})])


def test_float8_halves_the_weights_of_the_blocks_and_kept_keys_grow_with_the_area(tiny_folder: Path) -> None:
    folder = check_folder(tiny_folder)
    plain = memory.sizes_of(folder, 2, 64 * 64)
    lowered = memory.sizes_of(folder, 2, 64 * 64, fp8=True, keeps_reference=True)
    assert lowered.transformer + lowered.gone_once_loaded == plain.transformer
    assert 0 < lowered.gone_once_loaded < plain.transformer / 2
    assert lowered.largest_block < plain.largest_block
    assert lowered.outside_blocks == plain.outside_blocks
    blocks = {".".join(name.split(".")[:2]) for name in folder.tensors["transformer"] if "blocks." in name}
    assert plain.kept_reference == 0
    assert lowered.kept_reference == len(blocks) * 2 * (64 * 64 // 256) * folder.token_width * 2
    twice = memory.sizes_of(folder, 2, 2 * 64 * 64, keeps_reference=True)
    assert twice.kept_reference == 2 * lowered.kept_reference


def test_only_modes_whose_blocks_lie_on_the_device_need_room_for_kept_keys() -> None:
    sizes = memory.ModelSizes(10, 5, 1, 3, 2, 1, 4)
    without, with_kept = memory.needs(sizes), memory.needs(replace(sizes, kept_reference=7))
    assert {mode: with_kept[mode] - without[mode] for mode in without} == {
        MemoryMode.RESIDENT: 7,
        MemoryMode.ENCODERS_OFF: 7,
        MemoryMode.GROUP_OFFLOAD: 0,
        MemoryMode.SEQUENTIAL: 0,
    }


def test_host_memory_takes_the_weights_as_they_are_loaded() -> None:
    sizes = memory.ModelSizes(10, 5, 1, 3, 2, 1, 4, gone_once_loaded=8)
    assert memory.host_needs(sizes, MemoryMode.RESIDENT, is_cuda=True) == 18
    assert memory.host_needs(sizes, MemoryMode.RESIDENT, is_cuda=False) == 24
