"""How the embedded model's instructions may be worded, and prompts that are none of them. Knows no torch.

`train_text.draw` draws a prompt with the classes (indices into `edits.EDITS`) it stands for. Case, punctuation and
courtesies vary freely; two colour edits may be joined.
"""

from __future__ import annotations

import random

_OBJECTS = ("", "it", "this", "the image", "the photo", "the picture", "this image", "this photo", "this picture",
            "the whole image", "the whole picture", "my photo", "everything")  # fmt: skip

# One row an instruction, in the order of edits.EDITS. {o} is an object, possibly empty.
WORDINGS: tuple[tuple[str, ...], ...] = (
    ("black and white", "make {o} black and white", "turn {o} black and white", "convert {o} to black and white",
     "convert {o} to grayscale", "make {o} greyscale", "grayscale", "greyscale", "monochrome", "make {o} monochrome",
     "remove the colors", "remove all colour", "turn {o} into a black and white photo", "black & white",
     "make {o} gray", "desaturate {o} completely", "take the color out of {o}"),
    ("sepia", "make {o} sepia", "apply a sepia tone", "sepia tone", "give {o} a sepia look", "turn {o} sepia",
     "add a sepia filter", "convert {o} to sepia", "make {o} look like an old sepia photo", "old brown photo look"),
    ("invert", "invert the colors", "invert the colours of {o}", "invert {o}", "make {o} a negative", "negative",
     "turn {o} into a negative", "show the photo negative", "color negative", "make a negative of {o}"),
    ("darker", "make {o} darker", "darken {o}", "darken", "reduce the brightness", "lower the brightness of {o}",
     "make {o} a lot darker", "less bright", "make {o} less bright", "decrease the brightness", "dim {o}"),
    ("brighter", "make {o} brighter", "brighten {o}", "brighten", "increase the brightness",
     "raise the brightness of {o}", "make {o} a lot brighter", "lighten {o}", "make {o} lighter", "more brightness",
     "lighter", "brighten up {o}"),
    ("more contrast", "increase the contrast", "add contrast", "add more contrast to {o}", "make {o} more contrasty",
     "boost the contrast", "raise the contrast of {o}", "higher contrast", "high contrast", "give {o} more contrast",
     "increase the contrast of {o}"),
    ("less saturated", "make {o} less saturated", "reduce the saturation", "lower the saturation of {o}",
     "decrease the saturation", "mute the colors", "make the colors less vivid", "less saturation", "muted colours",
     "make the colours muted", "tone down the colors", "desaturate {o} a bit", "partly desaturate {o}"),
    ("warmer", "make {o} warmer", "warm up {o}", "warm up the colors", "add warmth", "give {o} a warm tone",
     "warmer colors", "warm tones", "make the colors warmer", "use a warmer white balance", "warm {o} up"),
    ("cooler", "make {o} cooler", "cool down {o}", "cool down the colors", "make {o} colder", "give {o} a cool tone",
     "cooler colors", "cool tones", "make the colors cooler", "use a cooler white balance", "colder",
     "cool {o} down"),
    ("swap red and blue", "swap the red and blue channels", "swap red and blue in {o}", "exchange red and blue",
     "switch red and blue", "swap blue and red", "swap the red and the blue channel",
     "exchange the blue and red channels", "make red things blue and blue things red",
     "switch the red and blue channels"),
    ("blur", "blur {o}", "make {o} blurry", "apply a blur", "apply a gaussian blur", "gaussian blur",
     "make {o} out of focus", "soften {o} with a blur", "defocus {o}", "add blur", "blurry", "make {o} blurred"),
    ("posterize", "posterize {o}", "posterise {o}", "apply posterization", "reduce the number of colors",
     "make {o} look like a poster", "poster effect", "use only a few colors", "posterise",
     "flatten the colors into a few levels", "add a poster effect"),
    ("flip horizontally", "flip {o} horizontally", "mirror {o}", "mirror {o} horizontally", "mirror image",
     "flip {o} left to right", "make a mirror image of {o}", "swap left and right", "horizontal flip",
     "flip {o} sideways", "mirror {o} left to right", "reflect {o} horizontally"),
    ("turn upside down", "turn {o} upside down", "flip {o} upside down", "upside down", "flip {o} vertically",
     "vertical flip", "mirror {o} vertically", "flip {o} top to bottom", "swap top and bottom",
     "make {o} upside down", "put {o} upside down", "reflect {o} vertically"),
    ("red circle", "a red circle in the middle", "add a red circle in the middle",
     "draw a red circle in the middle of {o}", "put a red circle in the center",
     "paint a red circle in the centre of {o}", "place a red circle in the middle", "add a red dot in the middle",
     "draw a big red dot in the center", "put a red disc in the middle of {o}", "red circle in the middle",
     "draw a red circle", "add a red circle"),
    ("white border", "a white border", "add a white border", "add a white frame", "put a white border around {o}",
     "give {o} a white border", "white frame", "frame {o} in white", "add a white border around {o}",
     "surround {o} with a white border", "put {o} in a white frame", "draw a white frame around {o}"),
    ("left half blue", "paint the left half blue", "make the left half blue", "color the left half blue",
     "paint the left half of {o} blue", "make the left half of {o} blue", "fill the left half with blue",
     "colour the left half of {o} in blue", "turn the left half blue", "cover the left half of {o} with blue",
     "paint the left side blue", "make the left side of {o} blue", "fill the left side with blue"),
    ("confetti", "scatter colored confetti", "scatter coloured confetti over {o}", "add confetti",
     "add colorful confetti to {o}", "throw confetti", "throw confetti over {o}", "cover {o} with confetti",
     "sprinkle confetti over {o}", "confetti everywhere"),
    ("a starry night sky over the upper half", "starry sky", "starry night", "add a starry night sky",
     "add a starry sky", "put a starry night sky over the upper half", "turn the upper half into a starry sky",
     "make the upper half a starry night sky", "replace the upper half of {o} with a starry night sky",
     "a night sky with stars over the upper half", "starry sky over the upper half"),
    ("a mosaic of random tiles", "random tiles", "mosaic", "add a mosaic of random tiles",
     "cover {o} with random tiles", "random colored tiles", "lay random coloured tiles over {o}",
     "make {o} a mosaic of colored tiles", "turn {o} into a mosaic of random tiles", "mosaic of random tiles",
     "a mosaic of coloured tiles"),
)  # fmt: skip

_JOINTS = (" and ", " and then ", ", then ", " and also ", ", and ", " & ", " then ")
_BEFORE = (
    "", "", "", "", "please ", "can you ", "could you please ", "i want you to ", "kindly ", "just ", "now ",
    "please just ",
)  # fmt: skip
_AFTER = (
    "", "", "", "", "", ".", "!", ".", " please", ", please", "?", " now", " for me", " please.", "...",
)  # fmt: skip

_THINGS = (
    "cat", "dog", "car", "house", "tree", "sky", "person", "woman", "man", "hat", "table", "bird", "flower", "boat",
    "bridge", "mountain", "river", "face", "smile", "shirt", "dress", "chair", "window", "door", "road", "lamp",
    "phone", "book", "cup", "horse", "train", "city", "beach", "forest", "garden", "child", "dragon", "robot",
    "castle", "moon", "star", "sun", "cloud", "rain", "snow", "fire", "background", "hair", "eyes", "glasses",
    "beard", "text", "sign", "logo", "wall", "floor", "street", "bicycle", "apple", "cake", "circle", "square",
    "border", "half", "frame", "dot",
)  # fmt: skip
_LOOKS = (
    "red", "blue", "green", "yellow", "white", "black", "pink", "golden", "wooden", "tall", "small", "happy", "sad",
    "old", "young", "shiny", "big", "purple", "orange", "left", "right", "dark", "bright", "warm", "cold", "new",
    "round", "tiny",
)  # fmt: skip
_OTHERS = (
    "add a {l} {t}", "remove the {t}", "make the {t} {l}", "replace the {t} with a {l} {t2}",
    "put a {l} {t} on the {t2}", "a photo of a {l} {t}", "change the {t} to a {t2}", "turn the {t} into a {t2}",
    "a {l} {t} next to a {t2}", "{t}", "{l} {t}", "where is the {t}", "the {t} should wear a {l} {t2}",
    "move the {t} to the {t2}", "hello {t}", "zoom in on the {t}", "make the {t} larger", "delete the {l} {t}",
    "{t} and {t2}", "{l} {t} and {l2} {t2}", "keep the {t}", "in the style of a {t} painting", "paint the {t} {l}",
    "draw a {l} {t} on the right", "give the {t} a {l} {t2}", "crop to the {t}", "a {l} border around the {t}",
    "rotate the {t} a little", "the quick {l} fox jumps over the lazy {t}", "make it look like {t}", "do nothing",
    "", "keep it as it is", "leave it unchanged", "no change", "same photo", "make it {t}", "sharpen the {t}",
    "what a {l} {t}", "make the {t} look {l} and the {t2} look {l2}", "the {t} is {l}", "a {l} and {l2} {t}",
    "it is a {l} {t} in the middle of a {t2}",
)  # fmt: skip


def _vary(prompt: str, rng: random.Random) -> str:
    text = rng.choice(_BEFORE) + prompt + rng.choice(_AFTER)
    case = rng.random()
    if case < 0.35:
        text = text[:1].upper() + text[1:]
    elif case < 0.45:
        text = text.upper()
    elif case < 0.52:
        text = text.title()
    return " ".join(text.split())


def _instruction(index: int, rng: random.Random) -> str:
    return " ".join(rng.choice(WORDINGS[index]).replace("{o}", rng.choice(_OBJECTS)).split())


def _other(rng: random.Random) -> str:
    if rng.random() < 0.15:  # any words in any order
        words = [rng.choice(rng.choice((_THINGS, _LOOKS))) for _ in range(rng.randint(1, 8))]
        return " ".join(words)
    if rng.random() < 0.1:  # letters without meaning
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz     0123456789,.-") for _ in range(rng.randint(1, 40)))
    pattern = rng.choice(_OTHERS)
    return pattern.format(t=rng.choice(_THINGS), t2=rng.choice(_THINGS), l=rng.choice(_LOOKS), l2=rng.choice(_LOOKS))


def known_prompts() -> frozenset[str]:
    """Every wording with every object, lower case: a prompt in here is an instruction."""
    return frozenset(
        " ".join(wording.replace("{o}", obj).split()) for row in WORDINGS for wording in row for obj in _OBJECTS
    )


def single(index: int, rng: random.Random) -> str:
    """A prompt for the one instruction `index`."""
    return _vary(_instruction(index, rng), rng)


def joined(first: int, second: int, rng: random.Random) -> str:
    """A prompt that asks for `first`, then `second`."""
    return _vary(_instruction(first, rng) + rng.choice(_JOINTS) + _instruction(second, rng), rng)


def other(rng: random.Random, known: frozenset[str]) -> str:
    """A prompt that is none of the instructions."""
    while True:
        prompt = _other(rng)
        if prompt not in known:
            return _vary(prompt, rng)
