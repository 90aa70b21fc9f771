"""Settings from the environment: what is said, what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from kontextd_models import EngineConfig, MemoryMode
from kontextd_server.settings import SettingError, Settings, describe, read_settings, variable


def test_without_variables_an_engine_is_configured_as_by_default() -> None:
    assert read_settings({"PATH": "/bin"}) == Settings()
    assert Settings().engine_config() == EngineConfig()


def test_every_variable_reaches_the_engine() -> None:
    config = read_settings(
        {
            "KONTEXTD_MODEL": "/models/kontext",
            "KONTEXTD_DEVICE": "cuda:1",
            "KONTEXTD_DTYPE": "float32",
            "KONTEXTD_MEMORY_MODE": "group_offload",
            "KONTEXTD_MAX_AREA": "1048576",
            "KONTEXTD_PROMPT_CACHE_MIB": "1",
            "KONTEXTD_REFERENCE_CACHE_MIB": "0",
            "KONTEXTD_SAFETY_CHECKERS": "embedded, /models/falconsai",
            "KONTEXTD_SAFETY_THRESHOLD": "0.5",
            "KONTEXTD_SAFETY_CHECK_INPUTS": "yes",
            "KONTEXTD_SAFETY_FORCED": "1",
            "KONTEXTD_SAFETY_TIME_LIMIT_S": "2.5",
        }
    ).engine_config()
    assert (config.model, config.device, config.dtype) == (Path("/models/kontext"), "cuda:1", "float32")
    assert (config.memory_mode, config.max_area) == (MemoryMode.GROUP_OFFLOAD, 1048576)
    assert (config.prompt_cache_bytes, config.reference_cache_bytes) == (2**20, 0)
    assert config.safety.checkers == ("embedded", "/models/falconsai")
    assert (config.safety.threshold, config.safety.check_inputs, config.safety.forced) == (0.5, True, True)
    assert config.safety.time_limit_s == 2.5


@pytest.mark.parametrize(
    ("name", "text", "remedy"),
    [
        ("KONTEXTD_DTYPE", "float16", "use one of auto, bfloat16, float32"),
        ("KONTEXTD_MEMORY_MODE", "small", "use one of auto, resident"),
        ("KONTEXTD_MAX_AREA", "0", "above 0"),
        ("KONTEXTD_PROMPT_CACHE_MIB", "-1", "0 or above"),
        ("KONTEXTD_SAFETY_THRESHOLD", "nan", "from 0 to 1"),
        ("KONTEXTD_SAFETY_THRESHOLD", "80", "from 0 to 1"),
        ("KONTEXTD_SAFETY_TIME_LIMIT_S", "inf", "above 0"),
        ("KONTEXTD_SAFETY_FORCED", "maybe", "use 1 or 0"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_remedy(name: str, text: str, remedy: str) -> None:
    with pytest.raises(SettingError, match=remedy) as caught:
        read_settings({name: text})
    assert name in str(caught.value)
    assert repr(text) in str(caught.value)


def test_a_mistyped_variable_is_refused_and_the_right_one_named() -> None:
    with pytest.raises(SettingError, match="did you mean KONTEXTD_SAFETY_FORCED"):
        read_settings({"KONTEXTD_SAFTEY_FORCED": "1"})


def test_an_empty_variable_counts_as_absent() -> None:
    assert read_settings({"KONTEXTD_MODEL": "", "KONTEXTD_DEVICE": " "}) == Settings()


def test_every_setting_is_documented() -> None:
    documented = [line.split()[0] for line in describe().splitlines()]
    assert documented == [variable(name) for name in Settings.__dataclass_fields__]
    assert all(len(line.split()) > 2 for line in describe().splitlines())


def test_every_setting_is_in_the_documents_with_its_default() -> None:
    text = (Path(__file__).parents[2] / "docs/cli.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(KONTEXTD_\w+)` \| (.*?) \|", text, re.M))
    assert list(rows) == [variable(name) for name in Settings.__dataclass_fields__]
    for name in Settings.__dataclass_fields__:
        default = getattr(Settings(), name)
        if default is not None:  # what stands for None is a phrase
            assert rows[variable(name)].strip("`") == shown(default), name


def shown(default: object) -> str:
    if isinstance(default, bool | float):
        return f"{default:g}"
    return ",".join(default) if isinstance(default, tuple) else str(default)
