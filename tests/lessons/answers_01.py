"""Right answers to the exercises of lesson 1, and classic mistakes with words of what the self-check says."""

import hashlib
from collections import Counter
from itertools import product
from pathlib import Path

import torch

from genailab_helpers.radiographs import read_radiograph


def of_test(train, test):
    return max(Counter(test).values()) / len(test)


def in_training(train, test):
    return max(Counter(train).values()) / len(train)


def one_over_classes(train, test):
    return 1 / len({*train, *test})


def by_training_size(train, test):
    return test.count(Counter(train).most_common(1)[0][0]) / len(train)


def constant(train, test):
    return test.count(Counter(train).most_common(1)[0][0]) / len(test)


def by_name(path):
    return Path(path).name


def by_bytes(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def by_mean(path):
    return float(read_radiograph(path).mean())


def by_corner(path):
    return read_radiograph(path)[:, :, :6].numpy().tobytes()


def by_sorted_values(path):
    return read_radiograph(path).flatten().sort().values.numpy().tobytes()


def without_shape(path):
    return read_radiograph(path).numpy().tobytes()


def as_list(path):
    return read_radiograph(path).tolist()


def fingerprint(path):
    image = read_radiograph(path)
    return tuple(image.shape), image.numpy().tobytes()


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def slide(a, b, reach, mirrors=(False, True), size=abs, offsets=None):
    middle = a[:, reach:-reach, reach:-reach]
    height, width = middle.shape[1:]
    return max(size(correlation(middle, image[:, down:down + height, right:right + width]))
               for image in (b.flip(-1) if mirror else b for mirror in mirrors)
               for down, right in offsets or product(range(2 * reach + 1), repeat=2))


def signed(a, b, reach):
    return slide(a, b, reach, size=float)


def without_mirror(a, b, reach):
    return slide(a, b, reach, mirrors=(False,))


def rightwards_only(a, b, reach):
    return slide(a, b, reach, offsets=[(reach, reach + k) for k in range(reach + 1)])


def rolled(a, b, reach):
    return max(abs(correlation(a, image.roll((down, right), (1, 2)))) for image in (b, b.flip(-1))
               for down, right in product(range(-reach, reach + 1), repeat=2))


def too_far(a, b, reach):
    return slide(a, b, reach + 1)


def always_one(a, b, reach):
    return 1.0


def known_in(patients, splits, seen, count=None):
    known = {p for p, part in zip(patients, splits, strict=True) if part in seen}
    tested = [p for p, part in zip(patients, splits, strict=True) if part == "test"]
    return sum(p in known for p in tested) / (count or len(tested))


def by_all(patients, splits):
    return known_in(patients, splits, {"train"}, len(patients))


def with_val(patients, splits):
    return known_in(patients, splits, {"train", "val"})


def by_patients(patients, splits):
    tested = {p for p, part in zip(patients, splits, strict=True) if part == "test"}
    known = {p for p, part in zip(patients, splits, strict=True) if part == "train"}
    return len(tested & known) / len(tested)


def any_second_image(patients, splits):
    tested = [p for p, part in zip(patients, splits, strict=True) if part == "test"]
    return sum(patients.count(p) > 1 for p in tested) / len(tested)


def clean_ones(patients, splits):
    return 1 - known_in(patients, splits, {"train"})


def leaked(patients, splits):
    return known_in(patients, splits, {"train"})


MISTAKES = [
    ("1.1", of_test, "most frequent label of the test set"), ("1.1", in_training, "accuracy in training"),
    ("1.1", one_over_classes, "one over the number of classes"),
    ("1.1", by_training_size, "divided by the training images"),
    ("1.2", by_name, "name of the file"), ("1.2", by_bytes, "bytes of the files"),
    ("1.2", by_mean, "a mean or a histogram"), ("1.2", by_corner, "use every pixel"),
    ("1.2", by_sorted_values, "forgets where a pixel was"),
    ("1.2", without_shape, "lost the shape"), ("1.2", as_list, "key for a dictionary"),
    ("1.3", signed, "sign of the correlation"), ("1.3", without_mirror, "mirror image"),
    ("1.3", rightwards_only, "all four directions"), ("1.3", rolled, "comes back on the other side"),
    ("1.3", too_far, "further than reach"), ("1.3", always_one, "two different images"),
    ("1.4", by_all, "divided by all images"), ("1.4", with_val, "patients of val as known"),
    ("1.4", by_patients, "you counted patients; count images"),
    ("1.4", any_second_image, "a second image in test is no leak"), ("1.4", clean_ones, "clean")]
RIGHT = {"1.1": constant, "1.2": fingerprint, "1.3": slide, "1.4": leaked}
