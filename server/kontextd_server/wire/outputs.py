"""A result as it is kept, and as a reader gets it. Knows fal's output and URLs; knows no store and no pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kontextd_server.wire.addresses import Bases


@dataclass(frozen=True)
class StoredImage:
    """An image as it is kept: `file_key` is a file of ours, or `data_uri` the picture itself."""

    width: int
    height: int
    content_type: str
    file_name: str
    file_size: int
    file_key: str | None = None
    data_uri: str | None = None

    def render(self, bases: Bases) -> dict[str, object]:
        """With a URL that this reader can use."""
        if self.file_key is None and self.data_uri is None:
            raise ValueError(f"{self.file_name} has neither a file key nor a data URI.")
        return {
            "url": self.data_uri if self.file_key is None else bases.file_url(self.file_key),
            "width": self.width,
            "height": self.height,
            "content_type": self.content_type,
            "file_name": self.file_name,
            "file_size": self.file_size,
        }


@dataclass(frozen=True)
class StoredOutput:
    """An output as it is kept. `report` is the object `kontextd` of the answer."""

    images: tuple[StoredImage, ...]
    timings: Mapping[str, float]
    seed: int
    has_nsfw_concepts: tuple[bool, ...]
    prompt: str
    report: Mapping[str, object] | None = None

    def render(self, bases: Bases, *, with_report: bool = True) -> dict[str, object]:
        """The body of a result, of a sync run and of the last event of a stream."""
        body: dict[str, object] = {
            "images": [image.render(bases) for image in self.images],
            "timings": dict(self.timings),
            "seed": self.seed,
            "has_nsfw_concepts": list(self.has_nsfw_concepts),
            "prompt": self.prompt,
        }
        return body | ({"kontextd": dict(self.report)} if with_report and self.report is not None else {})

    def to_json(self) -> dict[str, object]:
        return {**vars(self), "images": [vars(image) for image in self.images]}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> StoredOutput:
        """What `to_json` made, also after a trip through JSON."""
        kept: dict[str, Any] = dict(data)  # Any: each value has the type of its field
        images = tuple(StoredImage(**image) for image in kept.pop("images"))
        return cls(images=images, has_nsfw_concepts=tuple(kept.pop("has_nsfw_concepts")), **kept)
