"""What is asked for and what this device can do, of precision, compilation, attention, kernels. Knows no weights.

A wish that cannot be had is met by the nearest thing, and comes with a note: what, why, and what runs instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kontextd_models.acceleration.preset import Preset, StepKind
from kontextd_models.acceleration.table import PresetTable
from kontextd_models.errors import InvalidValue
from kontextd_models.records import EngineConfig, MemoryMode

PRECISIONS, COMPILE, ATTENTION, KERNELS = (
    ("auto", "full", "fp8"),
    ("auto", "on", "off"),
    ("auto", "native", "cudnn", "flash", "fa3"),
    ("auto", "on", "off"),
)
_FP8_CAPABILITY = (8, 9)  # Ada and Hopper; see kontextd_kernels.fp8_linear
_ON_DEVICE = (MemoryMode.RESIDENT, MemoryMode.ENCODERS_OFF)
_BY_REFERENCE = "fp8 on the CPU is worked out by its reference: a GPU's numbers, slower than full precision"
_SETTLED_IN_FULL = (
    "precision fp8 was asked for, and {} was settled with full: the fidelity of its presets was measured in full "
    "precision"
)
_KEEPS_NOTHING = (
    "presets are to keep the reference's keys and values, and in the memory mode {} blocks stream through the device: "
    "these steps run in full."
)


@dataclass(frozen=True)
class Device:
    """`capability` is CUDA's compute capability; None for the CPU."""

    capability: tuple[int, int] | None
    in_bfloat16: bool

    @property
    def multiplies_fp8(self) -> bool:
        return self.capability is not None and self.capability >= _FP8_CAPABILITY and self.in_bfloat16

    def __str__(self) -> str:
        if self.capability is None:
            return "the CPU"
        dtype = "" if self.in_bfloat16 else " in float32"
        return f"a device of compute capability {self.capability[0]}.{self.capability[1]}{dtype}"


@dataclass(frozen=True)
class ExecutionPlan:
    """How the blocks are to run. "auto" of `attention` and `kernels` is settled once the model is loaded, by trying."""

    fp8: bool = False
    compiled: bool = False
    attention: str = "native"
    kernels: str = "off"
    notes: tuple[str, ...] = ()

    @property
    def precision(self) -> str:
        return "fp8" if self.fp8 else "full"


def choose_precision(config: EngineConfig, table: PresetTable, device: Device) -> tuple[bool, str]:
    """Whether the blocks run in float8, and a note; "auto" is what the table of presets was settled with.

    Raises `InvalidValue`.
    """
    asked = _one_of("precision", config.precision, PRECISIONS)
    if asked == "full" or (asked == "auto" and table.precision != "fp8"):
        return False, ""
    of_table = _SETTLED_IN_FULL.format(table.file.name) if table.precision == "full" else ""
    if device.multiplies_fp8:
        return True, of_table
    if asked == "fp8" and device.capability is None:
        return True, "; ".join(filter(None, (_BY_REFERENCE, of_table)))
    why = "was asked for" if asked == "fp8" else f"is what {table.file.name} was settled with"
    return False, (
        f"precision fp8 {why}, and {device} has no fast product for it: the blocks run in full precision. It takes "
        f"CUDA, bfloat16 and compute capability {_FP8_CAPABILITY[0]}.{_FP8_CAPABILITY[1]}."
    )


def plan_execution(
    config: EngineConfig,
    precision: tuple[bool, str],
    device: Device,
    mode: MemoryMode,
    *,
    keeps_reference: bool = False,
) -> ExecutionPlan:
    """The rest of the plan, once the memory mode is known. `keeps_reference`: a preset would. Raises `InvalidValue`."""
    fp8, note = precision
    compiled, of_compiling = _choose_compile(_one_of("compile", config.compile, COMPILE), device, mode)
    of_keeping = "" if mode in _ON_DEVICE or not keeps_reference else _KEEPS_NOTHING.format(mode.value)
    attention, of_attention = _choose_attention(_one_of("attention", config.attention, ATTENTION), device, mode)
    kernels, of_kernels = _choose_kernels(_one_of("kernels", config.kernels, KERNELS), device, mode, compiled)
    notes = note, of_keeping, of_compiling, of_attention, of_kernels
    return ExecutionPlan(fp8, compiled, attention, kernels, tuple(filter(None, notes)))


def reuses_reference(rows: Iterable[Preset]) -> bool:
    """Whether any preset, for any number of steps, keeps the reference's keys and values."""
    return any(row.reuse_reference or any(StepKind.CACHED in mask for mask in row.masks.values()) for row in rows)


def _choose_compile(asked: str, device: Device, mode: MemoryMode) -> tuple[bool, str]:
    if asked == "off" or (asked == "auto" and device.capability is None):
        return False, ""
    if mode in _ON_DEVICE:
        return True, ""
    note = (
        f"compilation was asked for, and in the memory mode {mode.value} blocks stream through the device uncompiled."
    )
    return False, note if asked == "on" else ""


def _choose_attention(asked: str, device: Device, mode: MemoryMode) -> tuple[str, str]:
    if device.capability is not None and mode in _ON_DEVICE:
        return asked, ""
    if asked in ("auto", "native"):
        return "native", ""
    where = "on the CPU" if device.capability is None else f"in the memory mode {mode.value}"
    return "native", f"attention {asked} was asked for, and {where} there is only torch's own: native."


def _choose_kernels(asked: str, device: Device, mode: MemoryMode, compiled: bool) -> tuple[str, str]:
    """By themselves in compiled blocks only: uncompiled ones may have to be diffusers' to the bit."""
    if asked == "off":
        return "off", ""
    if mode not in _ON_DEVICE:
        note = f"kernels were asked for, and in the memory mode {mode.value} blocks run as diffusers has them."
        return "off", note if asked == "on" else ""
    if asked == "auto":
        return ("auto" if compiled and device.capability is not None else "off"), ""
    if device.capability is None:
        return "on", "kernels on the CPU are worked out by their references: a GPU's numbers, and slower"
    return "on", ""


def _one_of(field: str, asked: str, choices: tuple[str, ...]) -> str:
    if asked not in choices:
        raise InvalidValue(f"{field} is {asked!r}; it must be {', '.join(choices[:-1])} or {choices[-1]}.", field=field)
    return asked
