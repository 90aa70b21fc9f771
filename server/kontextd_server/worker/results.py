"""What the engine made, as files and as the stored result. Knows pictures, files and fal's output; knows no jobs."""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from PIL import Image

from kontextd_server.files import FileStore, Label
from kontextd_server.files.errors import FileStoreError
from kontextd_server.pictures import EncodedPicture, PictureFormat, encode
from kontextd_server.store import Success, Work
from kontextd_server.wire.outputs import StoredImage, StoredOutput
from kontextd_server.wire.schema import FluxKontextLoraInput, KontextdReport, PresetReport, SizeReport
from kontextd_server.worker.edit import Edited

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptResult:
    """`success` is what the job store keeps; `keys` are the files that belong to it."""

    success: Success
    keys: tuple[str, ...]


class ResultKeeper:
    """Keeps results in the file store, or, where nothing may stay, in the body itself.

    `lifetime_s` is the operator's: callers can ask for less, not for more. None leaves it to the file store.
    """

    def __init__(self, files: FileStore, version: str, lifetime_s: float | None) -> None:
        self._files, self._version, self._lifetime_s = files, version, lifetime_s

    def keep(self, edited: Edited, *, owner: str, transient: bool, expire_s: float | None = None) -> KeptResult:
        """Encode and store, for `expire_s` where the caller asked for that. Raises `FileStoreError`, and then nothing
        was kept."""
        began = time.monotonic()
        images: list[StoredImage] = []
        lifetime_s = min((s for s in (expire_s, self._lifetime_s) if s is not None), default=None)
        kept = None if transient or edited.wanted.sync_mode else Label(lifetime_s=lifetime_s, owner=owner)
        try:
            for image, seed in zip(edited.done.images, edited.done.seeds, strict=True):
                images.append(self._keep_image(image, seed, edited.wanted, kept))
        except BaseException:
            self.forget(_keys(images))
            raise
        output = _output(edited, tuple(images), time.monotonic() - began, self._version)
        body = json.dumps(output.to_json(), allow_nan=False).encode()
        return KeptResult(Success(body, edited.done.timings["total"], _work(edited)), _keys(images))

    def forget(self, keys: Iterable[str]) -> None:
        """Delete files of a result that nobody will read."""
        for key in keys:
            try:
                self._files.delete(key)
            except FileStoreError as error:  # it goes when it expires
                log.warning("the file %s of a result that was thrown away cannot be deleted: %s", key, error)

    def _keep_image(
        self, image: Image.Image, seed: int, wanted: FluxKontextLoraInput, kept: Label | None
    ) -> StoredImage:
        """As a file, `kept` so long and for its owner; None puts the picture itself into the result."""
        picture = encode(image, PictureFormat(wanted.output_format.value))
        file_name = f"kontext-{seed}.{picture.content_type.removeprefix('image/')}"
        key = None
        if kept is not None:
            label = replace(kept, file_name=file_name, content_type=picture.content_type)
            key = self._files.put([picture.data], label).key
        return StoredImage(
            width=image.width,
            height=image.height,
            content_type=picture.content_type,
            file_name=file_name,
            file_size=len(picture.data),
            file_key=key,
            data_uri=_data_uri(picture) if kept is None else None,
        )


def _output(edited: Edited, images: tuple[StoredImage, ...], save_s: float, version: str) -> StoredOutput:
    done = edited.done
    return StoredOutput(
        images=images,
        timings={**done.timings, "fetch": edited.fetch_s, "save": save_s, "inference": done.timings["total"]},
        seed=done.seeds[0],
        has_nsfw_concepts=done.has_nsfw_concepts,
        prompt=edited.wanted.prompt,
        report=_report(edited, version).model_dump(mode="json", exclude_none=True),
    )


def _report(edited: Edited, version: str) -> KontextdReport:
    done = edited.done
    return KontextdReport(
        loras=list(edited.loras),
        preset=PresetReport(
            name=done.preset.name.value, full=done.preset.full, cached=done.preset.cached, skipped=done.preset.skipped
        ),
        cache_hits=dict(done.cache_hits),
        seeds=list(done.seeds),
        size=SizeReport(
            asked=done.size.asked, planned=(done.size.width, done.size.height), reason=done.size.reason or None
        ),
        version=version,
    )


def _work(edited: Edited) -> Work:
    done, hits = edited.done, edited.done.cache_hits
    is_merged = hits.get("loras", False)  # already: then nothing was done
    return Work(
        images=len(done.images),
        prompt_hit=hits.get("prompt"),
        reference_hit=hits.get("reference"),
        lora_hit=None if edited.lora_load_s is None else hits.get("loras"),
        lora_load_s=edited.lora_load_s,
        merge_s=None if is_merged else done.timings.get("merge") or None,
    )


def _data_uri(picture: EncodedPicture) -> str:
    return f"data:{picture.content_type};base64,{base64.b64encode(picture.data).decode('ascii')}"


def _keys(images: Iterable[StoredImage]) -> tuple[str, ...]:
    return tuple(image.file_key for image in images if image.file_key is not None)
