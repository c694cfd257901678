"""Chests and spines alike: the same bytes however they are rendered, finite far out, wrong wishes named."""

import dataclasses
import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch

from genailab_helpers.phantoms.chest import FINDINGS, STRUCTURES, render_chests, sample_chests
from genailab_helpers.phantoms.spine import SIGNS, render_spines, sample_spines
from genailab_helpers.phantoms.spine import STRUCTURES as SPINE_STRUCTURES


def chests(n: int, seed: int) -> Any:
    return sample_chests(n, seed, FINDINGS, {"marker": 0.5, "text": 0.5, "collimation": 0.5})


def spines(n: int, seed: int) -> Any:
    anatomy = sample_spines(n, seed)
    return anatomy.changed(osteophytes_image=anatomy.osteophytes_image * 8)  # a long spur needs its window


BOTH = pytest.mark.parametrize(("sample", "render"), [(chests, render_chests), (spines, render_spines)])
MASKS = {render_chests: {*STRUCTURES, "lesion", "marker", "text", "border", "collimation"},
         render_spines: {*SPINE_STRUCTURES, *SIGNS}}


@BOTH
@pytest.mark.parametrize("img_size", [32, 100, 128])
def test_same_bytes_in_any_batch(sample: Any, render: Any, img_size: int) -> None:
    anatomy = sample(7, 11)
    whole = render(anatomy, img_size, masks=True)
    for batch_size in (1, 3):
        parts = render(anatomy, img_size, masks=True, batch_size=batch_size)
        assert torch.equal(whole.images, parts.images)
        assert all(torch.equal(whole.masks[name], parts.masks[name]) for name in whole.masks)
    assert torch.equal(render(anatomy, img_size).images, whole.images)  # masks change no pixel


def test_same_bytes_with_any_number_of_threads() -> None:
    code = ("import sys, hashlib, torch; torch.set_num_threads(int(sys.argv[1]));"
            "from genailab_helpers.phantoms.chest import *\nfrom genailab_helpers.phantoms.spine import *\n"
            "for size in (32, 100, 128):\n"
            "    for images in (render_chests(sample_chests(60, 2, FINDINGS), size).images,\n"
            "                   render_spines(sample_spines(40, 2), size).images):\n"
            "        print(hashlib.sha256(images.numpy().tobytes()).hexdigest())\n"
            "print(torch.get_num_threads())")
    printed = [subprocess.run([sys.executable, "-c", code, str(n)], capture_output=True, text=True,
                              check=True).stdout.split() for n in (1, 2, 3)]
    assert len(printed[0]) == 7
    assert printed[0][:6] == printed[1][:6] == printed[2][:6]
    assert [out[-1] for out in printed] == ["1", "2", "3"]  # and the setting is left as it was


def test_masks_of_discs_do_not_depend_on_the_batch_either() -> None:
    anatomy = sample_spines(100, 1)
    whole, parts = (render_spines(anatomy, 96, masks=True, batch_size=size).masks for size in (None, 7))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("name", ["arm_width", "trachea_width", "dome_height", "vessel_width"])
def test_a_size_of_nothing_draws_nothing(name: str) -> None:
    anatomy = sample_chests(2, 3).changed(**{name: 0.0})
    anatomy = dataclasses.replace(anatomy, magnification=anatomy.magnification.requires_grad_())
    images = render_chests(anatomy, 64).images
    images.sum().backward()
    assert torch.isfinite(images).all()
    assert torch.isfinite(anatomy.magnification.grad).all()


def test_a_spine_bent_beyond_a_right_angle_is_drawn_whole() -> None:
    bent = sample_spines(8, 1).changed(lordosis=3.0)
    assert torch.equal(render_spines(bent, 96).images, render_spines(bent, 96, batch_size=1).images)


def test_calls_from_several_threads_leave_the_number_of_threads() -> None:
    code = ("import torch; from threading import Thread; torch.set_num_threads(2)\n"
            "from genailab_helpers.phantoms.chest import *\nchests = sample_chests(60, 2)\n"
            "seen = []\nfor _ in range(4):\n"
            "    calls = [Thread(target=render_chests, args=(chests, 64)) for _ in range(4)]\n"
            "    [call.start() for call in calls]; [call.join() for call in calls]\n"
            "    late = Thread(target=lambda: seen.append(torch.get_num_threads()))\n"
            "    late.start(); late.join()\n"
            "print(seen)")
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[2, 2, 2, 2]"


def test_one_field_may_be_of_double_precision() -> None:
    anatomy = sample_chests(2, 3)
    heart = dataclasses.replace(anatomy, heart_x=anatomy.heart_x.double())
    torch.testing.assert_close(render_chests(heart, 64).images.float(), render_chests(anatomy, 64).images,
                               atol=5e-6, rtol=0)


@BOTH
def test_images_are_the_same_with_slopes_and_can_be_trained_on(sample: Any, render: Any) -> None:
    anatomy = sample(3, 4)
    images = render(anatomy, 64).images
    moved = dataclasses.replace(anatomy, shift_x=anatomy.shift_x.clone().requires_grad_())
    torch.testing.assert_close(render(moved, 64).images.detach(), images, atol=1e-6, rtol=0)
    weight = torch.ones((), requires_grad=True)
    (weight * images).sum().backward()
    assert weight.grad == images.sum()


@BOTH
def test_fewer_bodies_are_the_first_of_many_and_all_differ(sample: Any, render: Any) -> None:
    few, many = sample(4, 9), sample(50, 9)
    for field in dataclasses.fields(few):
        assert torch.equal(getattr(few, field.name), getattr(many, field.name)[:4]), field.name
    images = torch.cat([render(anatomy, 32).images for anatomy in (few, sample(4, 1))])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(images, 2))


@BOTH
@pytest.mark.parametrize("img_size", [16, 97, 224])
def test_shape_range_type(sample: Any, render: Any, img_size: int) -> None:
    rendered = render(sample(3, 1), img_size, masks=True)
    assert rendered.images.shape == (3, 1, img_size, img_size)
    assert rendered.images.dtype == torch.float32
    assert rendered.images.abs().max() <= 1
    assert rendered.images.std() > (0.2 if render is render_chests else 0.15)
    assert set(rendered.masks) == MASKS[render]
    assert all(mask.shape == (3, img_size, img_size) and mask.dtype == torch.bool
               for mask in rendered.masks.values())


@BOTH
@pytest.mark.parametrize(("arguments", "named"), [
    ({"n_samples": 0}, "n_samples"), ({"n_samples": 2.0}, "n_samples"), ({"seed": -1}, "seed"),
    *(({"img_size": size}, "img_size") for size in (0, -1, 15, 3.5, True))])
def test_wrong_wishes_are_named(sample: Any, render: Any, arguments: dict[str, Any], named: str) -> None:
    wanted = {"n_samples": 2, "seed": 0, "img_size": 32} | arguments
    with pytest.raises(ValueError, match=named) as error:
        render(sample(wanted["n_samples"], wanted["seed"]), wanted["img_size"])
    assert "\n" not in str(error.value)


@BOTH
def test_slopes_and_images_are_finite_far_out(sample: Any, render: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    anatomy = sample(60, 2)
    varied = [f for f in dataclasses.fields(anatomy) if f.metadata]
    reach = 12 if render is render_chests else 8  # standard deviations, from end to end
    off = {f.name: (torch.rand(60, *f.metadata["shape"], generator=generator) - 0.5) * reach for f in varied}
    far = {f.name: (f.metadata["mean"] + f.metadata["spread"] * off[f.name]).requires_grad_() for f in varied}
    images = render(dataclasses.replace(anatomy, **far), 32).images
    images.sum().backward()
    assert images.isfinite().all()
    for name, value in far.items():
        assert value.grad is not None, name
        assert value.grad.isfinite().all(), name


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(AttributeError, match="hart_width"):
        sample_chests(1).changed(hart_width=0.2)
