"""Set the audit beside its peers on real images, and write docs/audit_peers.md; a few minutes.

Near duplicates beside DataEval: each of 1,124 images is edited once, by one of the edits of film_edits.py or
by erasing or an affine change; then copies and originals are compared. Wrong labels beside confident learning
(cleanlab): labels are exchanged at random, and both rank the same images by doubt, from the same features.
Needs the extra `bench` and the images that GENAILAB_REAL_DATA names.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from film_edits import EDITS, Edit, edit_images
from measure_lessons import processor
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_predict

from genailab_helpers.datasets.audit import doubt_features, label_probabilities
from genailab_helpers.datasets.duplicates import SIDE, find_duplicates
from genailab_helpers.datasets.folders import read_images
from genailab_helpers.datasets.index import index_images
from genailab_helpers.datasets.shortcuts import folds_by_patient

ROOT = Path(__file__).parents[1]
N_FOLDS = 5  # one of the audit's three times
COPIED = ("00002658_00", "E63574A7", "F4341CE7")  # copies in the set itself, seen by eye
Pairs = set[tuple[int, int]]


def erase(image: Image.Image) -> Image.Image:
    """Blacken a square of a quarter of the side, right of the middle."""
    erased, side = image.copy(), min(image.size) // 4
    erased.paste(0, (image.width // 2, image.height // 2, image.width // 2 + side, image.height // 2 + side))
    return erased


def affine(image: Image.Image) -> Image.Image:
    """Turn by 5 degrees, make a tenth smaller and move by a twentieth, all at once."""
    small = image.resize((round(0.9 * image.width), round(0.9 * image.height)))
    whole = Image.new(image.mode, image.size)
    whole.paste(small, (round(0.1 * image.width), round(0.1 * image.height)))
    return whole.rotate(5, Image.Resampling.BICUBIC)


MORE: dict[str, tuple[Edit, float]] = {"erasing": (erase, 0.0), "affine": (affine, 0.0)}


class Grey:
    """Images as DataEval wants them, read one at a time: (1, H, W) uint8."""

    def __init__(self, files: list[str]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.asarray(Image.open(self.files[index]).convert("L"))[None]


def dataeval_pairs(files: list[str], flag: str) -> Pairs:
    """Pairs of rows that DataEval puts into one group of equal or nearly equal images."""
    from dataeval.flags import ImageStats
    from dataeval.quality import Duplicates

    found = Duplicates(getattr(ImageStats, flag)).evaluate(Grey(files)).data()
    return {pair for group in found["item_indices"].to_list() for pair in combinations(sorted(group), 2)}


def compare_duplicates(root: Path) -> Iterator[str]:
    """Yield the rows of a table: the share of the edits of each kind that each search finds."""
    images = index_images(root)
    n_images, names, edits = len(images), [*EDITS, *MORE], {**EDITS, **MORE}
    with tempfile.TemporaryDirectory() as temporary:
        made = edit_images(images["path"], Path(temporary), names, edits)
        edited = index_images(temporary)
        batch = torch.cat([read_images(some, SIDE)[0] for some in (images, edited)])
        files = [*images["path"], *edited["path"]]
        searches: dict[str, Callable[[], Pairs]] = {
            "ours": lambda: {pair[:2] for pair in find_duplicates(batch)},
            "DataEval": lambda: dataeval_pairs(files, "HASH_DUPLICATES_BASIC"),
            "DataEval, D4": lambda: dataeval_pairs(files, "HASH_DUPLICATES_D4")}
        found, seconds = {}, {}
        for name, search in searches.items():
            began = time.process_time()
            found[name], seconds[name] = search(), time.process_time() - began
    yield f"| edit | images | {' | '.join(searches)} |"
    yield "|---|---|" + "---|" * len(searches)
    for name in names:
        rows = [row for row, edit in enumerate(made) if edit == name]
        recalls = [np.mean([(row, row + n_images) in pairs for row in rows]) for pairs in found.values()]
        yield f"| {name} | {len(rows)} | {' | '.join(f'{recall:.2f}' for recall in recalls)} |"
    copied = [row for row, name in enumerate(images.index) if Path(name).stem.startswith(COPIED)]
    true = set(combinations(copied, 2))
    false = [len({row for pair in pairs - true if pair[1] < n_images for row in pair}) / n_images
             for pairs in found.values()]
    yield f"| **unedited images flagged** | {n_images} | {' | '.join(f'{share:.1%}' for share in false)} |"
    yield f"| processor seconds | | {' | '.join(f'{second:.0f}' for second in seconds.values())} |"


def compare_labels(root: Path, most: int = 600) -> Iterator[str]:
    """Yield the rows of a table: average precision of both rankings where labels were exchanged."""
    from cleanlab.rank import get_label_quality_scores

    images = index_images(root)
    images = images[images["split"].isin(["train", ""])]
    images = images.iloc[np.random.default_rng(0).permutation(len(images))[:most]]
    batch, images = read_images(images, SIDE)
    features, patients = doubt_features(batch), images["patient"].to_numpy(str)
    truth, n_classes = np.unique(images["class"], return_inverse=True)[1], images["class"].nunique()
    folds = folds_by_patient(patients)[:N_FOLDS]

    def judge(labels: np.ndarray, strength: float) -> np.ndarray:
        model = LogisticRegression(C=strength, max_iter=1000)
        return cross_val_predict(model, features, labels, cv=folds, method="predict_proba")

    for share in (0.05, 0.10, 0.20):
        found = []
        for seed in range(5):
            rng = np.random.default_rng(seed)
            wrong = rng.random(len(truth)) < share
            labels = np.where(wrong, (truth + rng.integers(1, n_classes, len(truth))) % n_classes, truth)
            if seed == 0:  # the strength that suits the labels as they are, as one would choose it
                chosen = max((1, 10, 100, 1000), key=lambda c: (judge(labels, c).argmax(1) == labels).mean())
            said = judge(labels, chosen)
            ours = label_probabilities(features, labels, patients)[np.arange(len(labels)), labels]
            found.append((average_precision_score(wrong, -ours),
                          average_precision_score(wrong, 1 - get_label_quality_scores(labels, said))))
        cells = [f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
                 for values in np.transpose(found)]
        yield f"| {root.name}, {len(truth)} images | {share:.0%} | {' | '.join(cells)} |"


def main() -> None:
    """Write the page."""
    folder = os.environ.get("GENAILAB_REAL_DATA", "")
    if not folder:
        sys.exit("skipped: GENAILAB_REAL_DATA names no folder of real images")
    root = Path(folder)
    lines = ["# The audit beside its peers", "",
             f"`python benchmarks/compare_audits.py`, {datetime.now(UTC):%d %B %Y}, {processor()}.", "",
             "Each image of a set of 1,124 real chest radiographs was edited once, and copies were looked "
             "for among originals and edited images. A row is an edit: the share of its copies found.",
             "", *compare_duplicates(root / "covid_1125"), "",
             "Labels exchanged at random: average precision of the ranking by doubt, mean of five draws "
             "(least to greatest); chance is the share that was exchanged. Both rank by the probability that "
             "a logistic regression on the same features gives to a label. Confident learning is cleanlab's "
             "label quality score of five folds by patient, of the strength that predicts the given labels "
             "best. Ours is the mean of three times such folds, of one strong penalty for all sets; these "
             "sets helped to choose it.", "",
             "| images | exchanged | ours | confident learning |", "|---|---|---|---|",
             *compare_labels(root / "covid_1125"), *compare_labels(root / "chest_xray"), ""]
    (ROOT / "docs" / "audit_peers.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
