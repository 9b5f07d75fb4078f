"""maskloss/report/curves.py: which curves are drawn, by the coordinates in the SVG."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from maskloss.report.curves import (
    _f1_over,
    compared_curves,
    forest_plot,
    loss_curves,
    precision_curves,
    threshold_curves,
)

BLUE, RED = "#2563eb", "#dc2626"
TRAINING = [
    {"step": 10, "loss": 4.0, "loss_mask": 2.0, "learning_rate": 0.1, "seconds": 1.0},
    {"step": 20, "loss": 3.0, "loss_mask": 1.5, "learning_rate": 0.1, "seconds": 2.0},
    {"step": 40, "loss": 1.0, "loss_mask": 0.5, "learning_rate": 0.1, "seconds": 3.0},
]
EVALUATIONS = [{"step": 20, "loss": {"loss": 3.5, "loss_mask": 1.0}}, {"step": 40, "loss": {"loss": 1.5}}]


def panels(svg: str) -> dict[str, str]:
    """Split an SVG into its panels, by their titles."""
    parts = re.split(r'<g id="axes_\d+">', svg)[1:]
    titles = [re.findall(r"<!-- (.*?) -->", part) for part in parts]
    return {
        next(title for title in found if title.startswith("loss")): part
        for found, part in zip(titles, parts, strict=True)
        if any(title.startswith("loss") for title in found)
    }


def lines(svg: str, color: str | None = None) -> list[Any]:
    """Return the coordinates of the plotted lines of a panel, (V, 2) each."""
    found = []
    for path, style in re.findall(r'<path d="(M [^"]+)" clip-path="[^"]+" style="([^"]+)"', svg):
        # The grid's lines are gray, and have the same clip path.
        if "stroke: #b0b0b0" not in style and (color is None or f"stroke: {color}" in style):
            found.append(np.array(re.findall(r"[ML] (\S+) (\S+)", path), dtype=float))
    return found


def assert_proportional(places: Any, values: Any) -> None:
    """Check that places on the page are a linear function of values."""
    places, values = np.asarray(places), np.asarray(values, dtype=float)
    scale = (places[-1] - places[0]) / (values[-1] - values[0])
    np.testing.assert_allclose(places - places[0], scale * (values - values[0]), atol=0.01)


def test_every_term_has_a_panel_with_its_curve() -> None:
    svg = loss_curves(TRAINING, [])
    assert svg.startswith("<svg")
    assert list(panels(svg)) == ["loss", "loss_mask"]
    for key, panel in panels(svg).items():
        (curve,) = lines(panel, BLUE)
        assert_proportional(curve[:, 0], [10, 20, 40])
        assert_proportional(curve[:, 1], [line[key] for line in TRAINING])
        # y points down in an SVG, and the loss falls.
        assert curve[0, 1] < curve[-1, 1]
        assert lines(panel, RED) == []


def test_validation_losses_are_red_and_on_the_scale_of_the_training_losses() -> None:
    panel = panels(loss_curves(TRAINING, EVALUATIONS))["loss"]
    (training,), (validation,) = lines(panel, BLUE), lines(panel, RED)
    assert_proportional([*training[:, 0], *validation[:, 0]], [10, 20, 40, 20, 40])
    assert_proportional([*training[:, 1], *validation[:, 1]], [4, 3, 1, 3.5, 1.5])


def test_a_term_is_validated_where_it_was_evaluated() -> None:
    panel = panels(loss_curves(TRAINING, EVALUATIONS))["loss_mask"]
    # A line of one point is a path of one point; its marker is drawn beside it.
    assert [len(curve) for curve in lines(panel, RED)] == [1]


def test_a_single_step_is_drawn_as_a_marker() -> None:
    def markers(svg: str) -> int:
        return len(re.findall(rf'<use [^>]*style="fill: {BLUE}', svg))

    assert markers(panels(loss_curves(TRAINING[:1], []))["loss"]) == 1
    assert markers(panels(loss_curves(TRAINING, []))["loss"]) == 0


@pytest.mark.parametrize(("lowest", "from_zero"), [(0.5, True), (-0.5, False)])
def test_the_axis_starts_at_zero_unless_a_loss_is_negative(lowest: float, from_zero: bool) -> None:
    history = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": lowest}]
    (panel,) = panels(loss_curves(history, [])).values()
    labels = re.findall(r"<!-- (\S*\d) -->", panel.split('id="matplotlib.axis_2"')[1])
    assert (labels[0] in ("0.0", "0.00")) == from_zero


def test_the_same_run_gives_the_same_curves_on_any_day() -> None:
    assert "<dc:date>" not in loss_curves(TRAINING, EVALUATIONS)


# Of several variants.


def constant(value: float, steps: tuple[int, ...] = (1, 2)) -> list[dict[str, Any]]:
    return [{"step": step, "loss": value * step, "seconds": 1.0} for step in steps]


def test_a_variants_curve_is_the_mean_of_its_seeds_at_each_step() -> None:
    # At step 3, only the second seed of "b" has a loss.
    histories = {"a": [constant(1.0), constant(3.0)], "b": [constant(5.0), constant(7.0, (1, 2, 3))]}
    (panel,) = panels(compared_curves(histories)).values()
    first, second = lines(panel)
    assert_proportional([*first[:, 0], *second[:, 0]], [1, 2, 1, 2, 3])
    assert_proportional([*first[:, 1], *second[:, 1]], [2, 4, 6, 12, 21])


def test_terms_of_only_some_variants_have_a_panel_and_the_legend_names_all_variants() -> None:
    extra = [{**line, "loss_extra": 1.0} for line in constant(1.0)]
    svg = compared_curves({"plain": [constant(1.0)], "with extra": [extra]})
    assert list(panels(svg)) == ["loss", "loss_extra"]
    legend = svg[svg.index('id="legend_1"') :]
    assert re.findall(r"<!-- (.*?) -->", legend) == ["plain", "with extra"]


def test_more_variants_than_colors_have_other_line_styles() -> None:
    (panel,) = panels(compared_curves({f"v{i}": [constant(1.0 + i)] for i in range(12)})).values()
    styles = re.findall(r'clip-path="[^"]+" style="(fill: none; [^"]+)"', panel)
    drawn = [style for style in styles if "stroke: #b0b0b0" not in style]
    assert len(drawn) == 12
    assert ["stroke-dasharray" in style for style in drawn] == [False] * 10 + [True] * 2
    assert len(set(drawn)) == 12


def test_a_forest_plot_has_a_panel_per_metric_and_a_line_per_variant() -> None:
    intervals = {
        "mask AP": {"dice": (1.5, 0.5), "focal": (-2.0, 3.0)},
        "box AP": {"dice": (0.5, 1.0)},
        "boundary AP": {},
    }
    svg = forest_plot(intervals, "bce")
    assert svg.startswith("<svg")
    for text in ("mask AP minus bce", "box AP minus bce", "dice", "focal"):
        assert f"<!-- {text} -->" in svg
    assert "boundary AP" not in svg
    # Better, undecided, worse: the colors of the three intervals.
    assert svg.count("#15803d") > 0
    assert svg.count("#6b7280") > 0
    assert "#b91c1c" not in svg


@pytest.mark.parametrize("last", [2, 3, 40, 90_000])
def test_steps_are_marked_at_integers(last: int) -> None:
    lines = [{"step": step, "segm": {"AP": 0.5}} for step in (last // 2, last)]
    marks = re.findall(
        r'id="xtick_\d+">.*?<!-- (\S+) -->', precision_curves(lines, {"segm": "mask"}), re.DOTALL
    )
    assert len(marks) >= 2
    assert all(re.fullmatch(r"\d+", mark) for mark in marks)


def test_without_differences_there_is_no_forest_plot() -> None:
    assert forest_plot({"mask AP": {}}, "bce") == ""


def test_precision_is_drawn_in_percent_from_two_evaluations_on() -> None:
    lines = [{"step": step, "segm": {"AP": ap}, "bbox": {"AP": None}} for step, ap in ((1, 0.25), (2, 0.5))]
    labels = {"segm": "mask", "bbox": "box"}
    assert precision_curves(lines[:1], labels) == ""
    svg = precision_curves(lines, labels)
    assert "<!-- mask AP -->" in svg
    assert "<!-- box AP -->" in svg
    assert "<!-- 50 -->" in svg


def test_threshold_curves_have_a_line_per_category_and_the_mean() -> None:
    recall = np.linspace(0, 1, 5)
    precision = np.array([[1.0, 1.0, 0.5, 0.0, 0.0], [0.8, 0.8, 0.8, 0.8, 0.4]])
    scores = np.array([[0.9, 0.6, 0.3, 0.0, 0.0], [0.95, 0.8, 0.5, 0.2, 0.1]])
    svg = threshold_curves(["a", "b"], recall, precision, scores)
    left, right = re.split(r'<g id="axes_\d+">', svg)[1:3]
    for panel, length in ((left, 5), (right, None)):
        curves = lines(panel)
        assert len(curves) == 3
        if length:
            assert_proportional(curves[0][:, 1], precision[0])
            assert_proportional(curves[2][:, 1], precision.mean(axis=0))
    assert threshold_curves([], recall, precision[:0], scores[:0]) == ""


def test_f1_over_the_threshold_is_that_of_the_detections_above_it() -> None:
    recall = np.array([0.0, 0.5, 1.0])
    precision, scores = np.array([1.0, 1.0, 0.5]), np.array([0.9, 0.9, 0.4])
    # Above 0.4 and up to 0.9: recall .5, precision 1; up to 0.4: recall 1, precision .5; above 0.9: nothing.
    found = _f1_over(np.array([0.0, 0.4, 0.41, 0.9, 0.91]), recall, precision, scores)
    assert found.tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2 / 3, 0.0])
    found = _f1_over(np.array([0.2, 0.6]), recall, np.array([1.0, 1.0, 0.25]), scores)
    assert found.tolist() == pytest.approx([2 * 0.25 / 1.25, 2 / 3])


NAMES = ["$5_$10 bill", "$x$", r"\$", "$", "_hidden", "猫"]


@pytest.mark.filterwarnings("error::UserWarning")
def test_names_are_drawn_as_they_are() -> None:
    recall, precision = np.linspace(0, 1, 5), np.full((len(NAMES), 5), 0.5)
    history = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    for svg in (
        threshold_curves(NAMES, recall, precision, precision),
        compared_curves({name: [history] for name in NAMES}),
        forest_plot({"AP": dict.fromkeys(NAMES, (1.0, 0.5))}, "$a_$"),
    ):
        # The comment before the paths of a text is the text that is drawn.
        drawn = [text.strip() for text in re.findall(r"<!-- (.*?) -->", svg)]
        assert [name for name in NAMES if name not in drawn] == []
    assert "AP minus $a_$" in drawn
