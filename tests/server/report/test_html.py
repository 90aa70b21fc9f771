"""Pages, tables and pictures inside them: nothing of a prompt becomes markup, and nothing is fetched."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

import numpy as np
from kontextd_server.report.html import Column, facts, heading, page, paragraph, section, table
from kontextd_server.report.pictures import AMPLIFIED, LONGEST_SIDE, difference, figure, inlined
from PIL import Image

EVIL = '<script>alert("1")</script> & co'


class Tags(HTMLParser):
    """All tags of a text, and what is left of it without them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_what_a_caller_wrote_stays_text() -> None:
    parts = [
        paragraph(EVIL, "note"),
        heading(EVIL, EVIL),
        facts({EVIL: EVIL}),
        table([Column(EVIL), Column("x", "number")], [[EVIL, "1"]], strong=[0]),
        figure("data:,", EVIL, EVIL, EVIL),
    ]
    read = Tags(page(EVIL, EVIL, [section(EVIL, *parts)]))
    assert read.open == []
    assert "script" not in read.names
    assert read.text.count(EVIL) == 3 + 1 + 1 + 2 + 2 + 2 + 2


def test_a_row_that_stands_out_is_marked_and_numbers_lean_right() -> None:
    text = table([Column("a"), Column("b", "number")], [["x", "1"], ["y", "2"]], strong=[1])
    assert '<tr class="strong"><td>y</td><td class="number">2</td></tr>' in text
    assert "<tr><td>x</td>" in text


def test_a_picture_is_within_the_page_and_no_larger_than_shown() -> None:
    picture = Image.linear_gradient("L").resize((2000, 500)).convert("RGB")
    kind, _, data = inlined(picture).partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as shown:
        assert shown.size == (LONGEST_SIDE, LONGEST_SIDE // 4)
    assert picture.size == (2000, 500)


def test_a_difference_is_amplified_and_equal_is_black() -> None:
    one = np.full((4, 5, 3), 100, np.uint8)
    other = one.copy()
    other[0, 0], other[1, 1] = (103, 100, 98), (200, 100, 100)
    found = np.asarray(difference(Image.fromarray(one), Image.fromarray(other)))
    assert found[0, 0].tolist() == [3 * AMPLIFIED, 0, 2 * AMPLIFIED]
    assert found[1, 1].tolist() == [255, 0, 0]
    assert not found[2:].any()
