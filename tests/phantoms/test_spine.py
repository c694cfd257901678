"""Spines: signs with chance of their own, masks where the image shows them."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from genailab_helpers.phantoms.raters import THRESHOLDS, consensus, rater_ceiling, simulate_raters
from genailab_helpers.phantoms.solids import joined
from genailab_helpers.phantoms.spine import (
    DISCS,
    SIGNS,
    STRUCTURES,
    VERTEBRAE,
    SpineAnatomy,
    projection,
    render_spines,
    sample_spines,
)


def trace(anatomy: SpineAnatomy) -> tuple[Tensor, dict[str, Tensor]]:
    line_integral, parts = projection(anatomy, 128, with_parts=True)(slice(None))
    return line_integral, {name: joined(torch.zeros_like(line_integral), parts[name]) for name in parts}


def average(anatomy: SpineAnatomy, **values: Any) -> SpineAnatomy:
    """Take chance out of the signs, and place everybody alike before the detector."""
    still = {f.name: 0.0 for f in dataclasses.fields(anatomy) if f.name.endswith(("_image", "_local"))}
    return anatomy.changed(**(still | {"shift_x": 0.0, "shift_y": 0.0, "lean": 0.0, "posture": 0.0,
                                       "magnification": 1.12} | values))


def test_signs_are_a_matter_of_degree_and_each_has_its_own_chance() -> None:
    anatomy = sample_spines(6000, 3)
    severity = anatomy.severity.sort().values
    uniform = (torch.arange(6000) + 0.5) / 6000
    assert (severity - uniform).abs().max() < 1.95 / 6000**0.5  # Kolmogorov: once in a thousand
    grade = torch.bucketize(anatomy.severity, torch.tensor(THRESHOLDS))
    signs = anatomy.signs()
    for name in SIGNS:
        sign = signs[name].abs().flatten(1).mean(1)
        assert (torch.stack([sign[grade == k].mean() for k in range(5)]).diff() > 0).all(), name
        # in every single sign, the higher of two neighbouring grades shows less than the lower one at times
        for k in range(4):
            assert sign[grade == k].quantile(0.9) > sign[grade == k + 1].quantile(0.1), (name, k)
    alike = anatomy.changed(severity=0.6)
    signs = torch.stack([sign.abs().flatten(1).mean(1) for sign in alike.signs().values()])
    assert (signs.std(1) > 0.1 * signs.mean(1)).all()
    assert (torch.corrcoef(signs) - torch.eye(len(SIGNS))).abs().max() < 5 / 6000**0.5  # five standard errors


def test_masks_are_where_the_path_lengths_are() -> None:
    anatomy = sample_spines(8, 4)
    masks, lengths = render_spines(anatomy, 128, masks=True).masks, trace(anatomy)[1]
    assert all(torch.equal(masks[name], lengths[name] > 0) for name in masks)
    assert not (masks["discs"] & masks["vertebrae"]).any()
    assert not (masks["disc_loss"] & ~masks["discs"]).any()
    for part in ("sclerosis", "misalignment"):
        assert not (masks[part] & ~masks["vertebrae"]).any()


@pytest.mark.parametrize("sign", ["osteophytes", "sclerosis"])
def test_a_sign_is_marked_where_it_changes_the_image(sign: str) -> None:
    anatomy = sample_spines(12, 4).changed(severity=0.8)
    lines, lengths = trace(anatomy)
    shown = (lines - trace(anatomy.changed(**{f"{sign}_image": -9.0}))[0]).abs() > 0.02
    mask = lengths[sign] > 0

    def found(mask: Tensor) -> float:
        return float((shown & mask).sum() / mask.sum())

    assert found(mask) > 0.9
    assert max(found(mask.roll(shift, axes)) for axes in (1, 2) for shift in (-2, 2)) < 0.85


def test_vertebrae_and_discs_are_marked_where_the_image_shows_them() -> None:
    anatomy = sample_spines(12, 4).changed(severity=0.2, photons=1e9, gas=0.0)
    rendered = render_spines(anatomy, 128, masks=True)
    image = rendered.images[:, 0].numpy()
    local = torch.from_numpy(image - ndimage.gaussian_filter(image, (0, 5, 5)))

    def contrast(shift: int, axis: int) -> float:
        bodies, discs = (local[rendered.masks[name].roll(shift, axis)].mean() for name in STRUCTURES)
        return float(bodies - discs)

    moved = [contrast(shift, axis) for axis in (1, 2) for shift in (-2, 2)]
    assert contrast(0, 1) > 0.08
    assert contrast(0, 1) > 1.1 * max(moved)


@pytest.mark.parametrize("sign", SIGNS)
def test_masks_grow_with_their_sign_alone(sign: str) -> None:
    local = {"slip_local": 1.5, "misalignment_local": torch.tensor([1.0, -1.0]).repeat(DISCS)[:DISCS + 1]}
    anatomy = average(sample_spines(4, 4), severity=0.0, **local)
    bare = {f"{other}_image": 0.0 for other in SIGNS}
    areas = []
    for chance in (0.1, 0.6, 1.2):
        masks = render_spines(anatomy.changed(**(bare | {f"{sign}_image": chance})), 160, masks=True).masks
        areas.append({name: masks[name].sum((1, 2)) for name in masks})
        assert all(not masks[other].any() for other in SIGNS if other != sign)
    assert not areas[0][sign].any()  # there, but not to be seen
    assert (areas[2][sign] > 0).all()
    if sign == "disc_loss":  # the narrower the disc the less there is to mark
        assert all((low["discs"] > high["discs"]).all() for low, high in itertools.pairwise(areas))
    elif sign != "slip":
        assert all((low[sign] <= high[sign]).all() for low, high in itertools.pairwise(areas))


def test_a_slip_moves_the_vertebrae_above_and_below_apart() -> None:
    local = torch.zeros(1, DISCS)
    local[0, VERTEBRAE.index("L4")] = 2.0  # L4 on L5
    anatomy = average(sample_spines(1, 4), severity=0.0, lordosis=0.0)
    slipped = anatomy.changed(slip_image=1.0, slip_local=local)
    before, after = (render_spines(a, 160, masks=True).masks for a in (anatomy, slipped))
    assert not before["slip"].any()
    step = round(float(torch.nonzero(after["slip"][0])[:, 0].float().mean()))

    def left_edge(masks: dict[str, Tensor], row: int) -> float:
        columns = [torch.nonzero(line)[:, 0] for line in masks["vertebrae"][0, row - 3:row + 4]]
        return float(np.mean([float(c.min()) for c in columns if len(c)]))

    moved = [left_edge(after, step + d) - left_edge(before, step + d) for d in (-13, 13)]
    expected = 160 * 1.12 * float(slipped.signs()["slip"][0, VERTEBRAE.index("L4")]) / 26
    assert expected > 2
    assert moved[1] - moved[0] == pytest.approx(expected, abs=1.0)


def test_vertebrae_are_counted_and_hollow_behind() -> None:
    masks = render_spines(average(sample_spines(5, 4), severity=0.0), 192, masks=True).masks
    for bodies in masks["vertebrae"].numpy():
        labels, _ = ndimage.label(bodies)
        sizes = ndimage.sum_labels(bodies, labels, range(1, labels.max() + 1))
        places = ndimage.center_of_mass(bodies, labels, 1 + np.flatnonzero(sizes > 200))
        assert 6 <= len(places) <= 8
        columns = [x for _, x in sorted(places)]
        foremost = int(np.argmin(columns))  # the patient faces the viewer's left
        assert 0 < foremost < len(columns) - 1
        assert columns[-1] - columns[foremost] > 8


def test_small_images_average_finer_ones() -> None:
    anatomy = sample_spines(4, 1).changed(photons=1e12, scatter=0.0, blur=0.0)
    beam = torch.exp(-projection(anatomy, 96, with_parts=False)(slice(None))[0])
    line = -torch.nn.functional.avg_pool2d(beam[:, None], 3)[:, 0].log()
    # the display only rises, so equal line integrals mean equal order of pixels
    for image, expected in zip(render_spines(anatomy, 32).images.flatten(1), line.flatten(1), strict=True):
        assert (image[expected.argsort()].diff() > -0.02).all()


def agreement(first: Any, second: Any) -> float:
    return float(cohen_kappa_score(first, second, weights="quadratic"))


def disc_heights(masks: dict[str, Tensor]) -> np.ndarray:
    """Measure the five lowest discs and the mean vertebra with a ruler; 0 where a disc is gone."""
    heights = []
    for discs, bodies in zip(masks["discs"].numpy(), masks["vertebrae"].numpy(), strict=True):
        labels, n = ndimage.label(discs)
        found = []
        for i in range(1, n + 1):
            place = np.argwhere(labels == i)
            if len(place) >= 8:  # a bar of length L has the variance L^2 / 12 along itself
                length = np.sqrt(12 * np.linalg.eigvalsh(np.cov(place.T))[-1])
                found.append((place[:, 0].mean(), len(place) / length))
        lowest = [height for _, height in sorted(found)[::-1][:5]]
        heights.append([*lowest, *[0.0] * (5 - len(lowest)), np.sqrt(bodies.mean())])
    return np.array(heights)


def best_thresholds(value: np.ndarray, grade: np.ndarray) -> np.ndarray:
    """Find the four rising thresholds with the best balanced accuracy, by dynamic programming."""
    cuts = np.append(np.unique(np.quantile(value, np.linspace(0, 1, 101))), np.inf)
    below = np.array([(value[grade == k, None] < cuts).mean(0) for k in range(5)])
    score, steps = below[0], []
    for k in range(1, 5):
        table = np.where(cuts[:, None] >= cuts, score + below[k][:, None] - below[k], -np.inf)
        steps.append(table.argmax(1))
        score = table.max(1)
    places = [len(cuts) - 1]
    for step in steps[::-1]:
        places.append(step[places[-1]])
    return cuts[places[:0:-1]]


@pytest.mark.slow
def test_no_sign_tells_alone_and_all_together_do() -> None:
    anatomy = sample_spines(2000, 12)
    severity_grade = np.digitize(anatomy.severity.numpy(), THRESHOLDS)
    truth = consensus(simulate_raters(anatomy.severity, seed=12)).numpy()
    masks = render_spines(anatomy, 128, masks=True).masks
    areas = np.stack([masks[name].float().mean((1, 2)).numpy() for name in SIGNS], 1)

    def learned(measured: np.ndarray) -> float:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        return agreement(truth[1000:], model.fit(measured[:1000], truth[:1000]).predict(measured[1000:]))

    spurs = areas[:, SIGNS.index("osteophytes")]
    rule = np.digitize(spurs[1000:], best_thresholds(spurs[:1000], severity_grade[:1000]))
    assert 0.35 < balanced_accuracy_score(severity_grade[1000:], rule) <= 0.75
    assert 0.3 < learned(disc_heights(masks)) <= 0.75
    assert 0.85 <= learned(np.sqrt(areas)) <= rater_ceiling()
    healthy, worn = spurs[severity_grade == 0], spurs[severity_grade == 3]
    assert np.quantile(healthy, 0.9) > worn.min()  # a healthy spine may have spurs, a worn one fewer
