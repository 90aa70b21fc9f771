"""The library of LoRA files that were read: what is read again, what is shared, and what is forgotten."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dialect_files import build
from hand_made import CPU, KINDS, style
from kontextd_models import LoraLimits
from kontextd_models.errors import LoraFileError
from kontextd_models.lora import library
from kontextd_models.lora.adapter import Adapter
from kontextd_models.lora.layout import Layout
from kontextd_models.lora.library import Library, moved
from kontextd_models.lora.reading import read_adapter
from safetensors.torch import save_file
from torch import Tensor

BUDGET = 10**6


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are really read, in order."""
    seen: list[Path] = []

    def reading(path: Path, layout: Layout, limits: LoraLimits, name: str) -> Adapter:
        seen.append(path)
        return read_adapter(path, layout, limits, name)

    monkeypatch.setattr(library, "read_adapter", reading)
    return seen


@pytest.fixture
def write(tmp_path: Path, tiny_layout: Layout) -> Callable[..., Path]:
    def make(name: str = "ink.safetensors", seed: int = 0, rank: int = 1) -> Path:
        file = build(tiny_layout, "diffusers", seed=seed, rank=rank, only=lambda name: "single" in name)
        save_file(file.tensors, tmp_path / name)
        return tmp_path / name

    return make


def open_library(layout: Layout, budget: int = BUDGET) -> Library:
    return Library(layout, LoraLimits(), budget, CPU)


def test_a_file_is_read_once(tiny_layout: Layout, write: Callable[..., Path], reads: list[Path]) -> None:
    shelf, path = open_library(tiny_layout), write()
    (first, was_cached), (second, is_cached) = shelf.read(path), shelf.read(path)
    assert (was_cached, is_cached) == (False, True)
    assert first is second
    assert reads == [path]


def test_one_file_under_two_paths_is_there_once(
    tiny_layout: Layout, write: Callable[..., Path], tmp_path: Path, reads: list[Path]
) -> None:
    shelf, path = open_library(tiny_layout, BUDGET), write()
    copied, linked = Path(shutil.copy(path, tmp_path / "copy.safetensors")), tmp_path / "link.safetensors"
    linked.symlink_to(path)
    adapters = [shelf.read(one)[0] for one in (path, copied, linked, copied)]
    assert all(adapter is adapters[0] for adapter in adapters)
    assert reads == [path, copied]


@pytest.mark.parametrize("way", ["in place", "replaced", "in place, its time set back"])
def test_a_file_that_changed_under_its_name_is_noticed(
    tiny_layout: Layout, write: Callable[..., Path], tmp_path: Path, way: str
) -> None:
    shelf, path, other = open_library(tiny_layout), write(), write("other.safetensors", seed=1)
    before, times = shelf.read(path)[0], path.stat()
    assert other.stat().st_size == times.st_size
    let_time_pass(path)
    if way == "replaced":
        os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
        other.replace(path)
    else:
        path.write_bytes(other.read_bytes())
    if way.endswith("set back"):
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    after, was_cached = shelf.read(path)
    assert not was_cached
    assert after.key != before.key


def let_time_pass(since: Path) -> None:
    """By the clock of the files, which a kernel moves on every few milliseconds."""
    probe = since.with_name("probe")
    while True:
        probe.write_bytes(b"x")
        if probe.stat().st_mtime_ns > since.stat().st_mtime_ns:
            return


def test_what_a_file_held_while_it_changed_under_the_reader_is_not_taken_for_its_new_content(
    tiny_layout: Layout, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, path, other = open_library(tiny_layout), write(), write("other.safetensors", seed=1)

    def reading(path: Path, layout: Layout, limits: LoraLimits, name: str) -> Adapter:
        adapter = read_adapter(path, layout, limits, name)
        if other.exists():
            other.replace(path)
        return adapter

    monkeypatch.setattr(library, "read_adapter", reading)
    before = shelf.read(path)[0]
    after, was_cached = shelf.read(path)
    assert not was_cached
    assert after.key != before.key
    assert shelf.read(path) == (after, True)


def test_the_least_recently_used_are_forgotten_beyond_the_budget(
    tiny_layout: Layout, write: Callable[..., Path], reads: list[Path]
) -> None:
    first, second, third = (write(f"{seed}.safetensors", seed) for seed in range(3))
    size = read_adapter(first, tiny_layout, LoraLimits()).size_bytes
    shelf = open_library(tiny_layout, 2 * size)
    for path in (first, second, first, third):
        shelf.read(path)
    reads.clear()
    assert [shelf.read(path)[1] for path in (first, third, second)] == [True, True, False]
    assert reads == [second]


def test_one_that_is_larger_than_the_budget_is_read_each_time(
    tiny_layout: Layout, write: Callable[..., Path], reads: list[Path]
) -> None:
    shelf, path = open_library(tiny_layout, 100), write()
    assert [shelf.read(path)[1] for _ in range(2)] == [False, False]
    assert len(reads) == 2


def test_a_file_that_is_gone_is_an_error_even_if_it_was_read(tiny_layout: Layout, write: Callable[..., Path]) -> None:
    shelf, path = open_library(tiny_layout), write()
    shelf.read(path)
    path.unlink()
    with pytest.raises(LoraFileError, match=r"ink\.safetensors cannot be read: No such file"):
        shelf.read(path)


def test_a_path_that_leads_nowhere_is_an_error_of_the_file(tiny_layout: Layout, tmp_path: Path) -> None:
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    library = Library(tiny_layout, LoraLimits(), 2**20, torch.device("cpu"))
    for path in (loop, tmp_path / "a\0b", tmp_path / ("x" * 300)):
        with pytest.raises(LoraFileError, match=r"cannot be read: .* Give a file that is there\.") as caught:
            library.read(path)
        assert str(tmp_path) not in str(caught.value)


def test_only_so_many_paths_are_remembered(
    tiny_layout: Layout, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_MAX_PATHS", 3)
    shelf, path = open_library(tiny_layout), write()
    links = [tmp_path / f"{number}.safetensors" for number in range(5)]
    for link in links:
        os.link(path, link)
    for link in links:
        shelf.read(link)
    assert [shelf.read(link)[1] for link in links[2:]] == [True] * 3
    assert shelf.read(links[0])[1] is False


def test_moving_an_adapter_moves_every_tensor_once_and_keeps_what_it_is(tiny_pipeline: object) -> None:
    held = style(tiny_pipeline, 1, *KINDS)
    moves: list[Tensor] = []

    def move(tensor: Tensor) -> Tensor:
        moves.append(tensor)
        return tensor.clone()

    other = moved(held, move)
    assert (other.key, other.coverage, other.deltas.keys()) == (held.key, held.coverage, held.deltas.keys())
    ours, theirs = tensors_of(held), tensors_of(other)
    assert len(ours) == len(moves)
    for one, same in zip(ours, theirs, strict=True):
        assert torch.equal(one, same)
        assert one.data_ptr() != same.data_ptr()


def test_what_parts_share_is_moved_once(tiny_layout: Layout, tmp_path: Path) -> None:
    """kohya has one down matrix for q, k and v."""
    file = build(tiny_layout, "kohya", only=lambda name: "double_blocks_0_img_attn_qkv" in name)
    save_file(file.tensors, tmp_path / "kohya.safetensors")
    held, moves = read_adapter(tmp_path / "kohya.safetensors", tiny_layout, LoraLimits()), []
    other = moved(held, lambda tensor: moves.append(tensor) or tensor.clone())
    assert len(other.deltas) == 3
    assert len(moves) == 4  # one down, three ups
    downs = {deltas[0].form.down.data_ptr() for deltas in other.deltas.values()}
    assert len(downs) == 1


def test_on_the_cpu_adapters_are_where_they_are_merged(tiny_layout: Layout, write: Callable[..., Path]) -> None:
    shelf = Library(tiny_layout, LoraLimits(), BUDGET, CPU, BUDGET)
    adapter = shelf.read(write())[0]
    assert shelf.on_device([adapter]) == [adapter]


def test_on_a_device_as_many_adapters_of_a_request_stay_as_the_budget_has_room_for(tiny_pipeline: object) -> None:
    """With torch's device without memory in the place of a GPU; an adapter made by hand says it has 1000 bytes."""

    def where(adapters: list[Adapter]) -> list[str]:
        return [tensors_of(adapter)[-1].device.type for adapter in adapters]

    shelf = Library({}, LoraLimits(), BUDGET, torch.device("meta"), 2500)
    held = [style(tiny_pipeline, seed, "low-rank", every=9) for seed in range(4)]
    assert where(shelf.on_device(held)) == ["meta", "meta", "cpu", "cpu"]
    first = shelf.on_device(held[:1])[0]
    assert shelf.on_device(held[:1])[0] is first
    shelf.on_device(held[2:3])  # for which the one that was used longest ago has to go, the second
    assert shelf.on_device(held[:1])[0] is first
    shelf.release_device()
    assert shelf.on_device(held[:1])[0] is not first
    assert where(held) == ["cpu"] * 4


def tensors_of(adapter: Adapter) -> list[Tensor]:
    found: list[Tensor] = []

    def look(value: object) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple):
            for one in value:
                look(one)

    for deltas in adapter.deltas.values():
        for delta in deltas:
            look(delta.magnitude)
            for value in vars(delta.form).values():
                look(value)
    return found
