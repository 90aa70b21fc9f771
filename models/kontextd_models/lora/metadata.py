"""What a LoRA file says of itself: base model, title, trigger words. Knows trainers' keys; believes and needs none.

The texts are a stranger's: they are made printable and short here, and nothing is decided by them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kontextd_models.weight_files import clipped

# Keys by what they say, best first: modelspec (Stability-AI/ModelSpec), `ss_` (kohya's sd-scripts), ai-toolkit's own.
_TITLE = ("modelspec.title", "ss_output_name", "name")
_BASE_MODEL = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name")
_TRAINER = ("ss_network_module", "software", "modelspec.implementation")
_TRIGGERS = ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_word", "instance_prompt")
_TOP_TAGS = 10


@dataclass(frozen=True)
class Description:
    """Empty where a file does not say. `tags`: the commonest of the captions it was trained on, commonest first."""

    title: str = ""
    base_model: str = ""
    trainer: str = ""
    trigger_words: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    steps: int | None = None


def description_of(metadata: Mapping[str, str]) -> Description:
    triggers = (word.strip() for word in _first(metadata, _TRIGGERS).split(","))
    return Description(
        title=_first(metadata, _TITLE),
        base_model=_first(metadata, _BASE_MODEL),
        trainer=_first(metadata, _TRAINER),
        trigger_words=tuple(word for word in triggers if word),
        tags=_tags(_json(metadata.get("ss_tag_frequency", ""))),
        steps=_steps(metadata),
    )


def _first(metadata: Mapping[str, str], keys: Iterable[str]) -> str:
    for key in keys:
        text = _text(metadata.get(key, ""))
        if text:
            return text
    return ""


def _text(value: str) -> str:
    """The value, or the name within it: ai-toolkit's `software` is {"name": …}. The trainers' "None" says nothing."""
    parsed = _json(value)
    if isinstance(parsed, dict):
        value = str(parsed.get("name", ""))
    elif isinstance(parsed, list):
        value = ", ".join(str(part) for part in parsed)
    elif isinstance(parsed, str):
        value = parsed
    return "" if value.strip() in ("", "None", "null") else clipped(value.strip())


def _tags(frequency: object) -> tuple[str, ...]:
    """{folder: {tag: count}} → tags."""
    counts: Counter[str] = Counter()
    for folder in frequency.values() if isinstance(frequency, dict) else ():
        for tag, count in folder.items() if isinstance(folder, dict) else ():
            if type(count) is int:
                counts[tag.strip()] += count
    return tuple(clipped(tag) for tag, _ in counts.most_common(_TOP_TAGS) if tag)


def _steps(metadata: Mapping[str, str]) -> int | None:
    info = _json(metadata.get("training_info", ""))
    found = info.get("step") if isinstance(info, dict) else _json(metadata.get("ss_steps", ""))
    return found if type(found) is int else None


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
