"""The plot of time against fidelity, read back as XML."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from kontextd_server.report.plot import Gate, Mark, plot

SVG = "{http://www.w3.org/2000/svg}"
MARKS = [
    Mark(40, 31.5, "regular", "regular & co", "regular"),
    Mark(20, 27.0, "high", "high", "high"),
    Mark(100, math.inf, "none", "none", "none"),
    Mark(60, 29.0, "dot", "a <row>"),
]


def drawn(*arguments: object) -> ElementTree.Element:
    text = plot(*arguments)  # type: ignore[arg-type]
    return ElementTree.fromstring(text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def circles(svg: ElementTree.Element) -> dict[str, tuple[float, float]]:
    return {
        str(circle.findtext(f"{SVG}title")): (float(circle.get("cx", "")), float(circle.get("cy", "")))
        for circle in svg.iter(f"{SVG}circle")
    }


def test_left_is_faster_up_is_more_faithful_and_equal_stands_over_all() -> None:
    found = circles(drawn(MARKS))
    assert found["high"][0] < found["regular & co"][0] < found["a <row>"][0] < found["none"][0]
    assert found["none"][1] < found["regular & co"][1] < found["a <row>"][1] < found["high"][1]


def test_everything_lies_within_the_picture() -> None:
    svg = drawn([*MARKS, Mark(180, 12.0, "dot", "slow and poor")], MARKS[:2], [Gate(35, "regular", "gate")])
    width, height = map(float, svg.get("viewBox", "").split()[2:])
    for x, y in circles(svg).values():
        assert 0 < x < width
        assert 0 < y < height


def test_the_front_leads_through_its_points_and_each_gate_has_its_line() -> None:
    svg = drawn(MARKS, [MARKS[1], MARKS[0]], [Gate(31, "regular", "31 dB"), Gate(28, "high", "28 dB")])
    (line,) = svg.iter(f"{SVG}polyline")
    found = circles(svg)
    assert [tuple(map(float, pair.split(","))) for pair in line.get("points", "").split()] == [
        found["high"],
        found["regular & co"],
    ]
    gates = [line for line in svg.iter(f"{SVG}line") if "gate" in line.get("class", "")]
    high, low = sorted(float(gate.get("y1", "")) for gate in gates)
    assert found["regular & co"][1] < high < low < found["high"][1]


def test_labels_of_neighbours_do_not_cover_each_other() -> None:
    marks = [Mark(50 + step / 2, 30.0, "regular", str(step), "regular, no LoRA") for step in range(4)]
    svg = drawn(marks)
    places = [
        (float(text.get("x", "")), float(text.get("y", "")))
        for text in svg.iter(f"{SVG}text")
        if text.text == "regular, no LoRA"
    ]
    assert len(places) == 4
    for index, (x, y) in enumerate(places):
        assert all(abs(x - other) > 120 or abs(y - line) > 13 for other, line in places[index + 1 :])


@pytest.mark.parametrize("marks", [[], [Mark(100, math.inf, "none", "none", "none")], [Mark(50, 30, "dot", "one")]])
def test_few_points_are_a_plot_too(marks: list[Mark]) -> None:
    svg = drawn(marks)
    assert len(list(svg.iter(f"{SVG}circle"))) == len(marks)
    assert len([text for text in svg.iter(f"{SVG}text") if re.fullmatch(r"\d+", text.text or "")]) > 10
