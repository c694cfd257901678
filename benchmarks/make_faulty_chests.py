"""Render the folder of lesson 1: chest phantoms sorted into classes and splits, with faults planted in them.

    python benchmarks/make_faulty_chests.py data/samples/faulty_chests

Every image is a phantom; the names of people are invented. `planted.json` in the folder is the answer key:
which fault lies in which files.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from genailab_helpers.checkpoints import whole_folder
from genailab_helpers.phantoms.chest import ChestAnatomy, render_chests, sample_chests

SEED = 1895  # the year of the first X-ray image
IMG_SIZE = 112
FOLDERS = {"Normal": "NORMAL", "Pneumonia": "Pneumonia", "COVID": "Covid-19"}
PATIENTS_A_CLASS = 20
IMAGES_OF_A_PATIENT = (1, 2, 2, 3)  # in turn
SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}
FOLLOW_UP = {  # what differs between two images of one patient, as standard deviation
    "shift_x": 0.6, "shift_y": 0.8, "lean": 0.02, "bend": 0.001, "turn": 0.2, "arm_angle": 0.1,
    "diaphragm_y": 0.7, "rib_drop": 0.4, "rib_spacing": 0.08, "clavicle_rise": 0.6, "window": 0.12,
    "contrast": 0.1, "brightness": 0.05, "scatter": 0.1, "magnification": 0.04,
}
STEADY = ("magnification", "scatter", "window", "contrast", "brightness", "trunk_width", "lung_density",
          "shift_x", "shift_y", "lean", "vessel_width", "bone_density", "diaphragm_y", "shoulder_y", "breast")
# what a careful department keeps alike, more than the phantoms of lesson 2 do


def render_images(rng: np.random.Generator) -> tuple[np.ndarray, list[dict[str, str]]]:
    """Render all images, each patient's in a row; return pixels, and class and patient of each image."""
    anatomies, rows = [], []
    for number, finding in enumerate(FOLDERS):
        marks = {"border": 0.95, "text": 0.5} if finding == "COVID" else {"text": 0.1}
        patients = sample_chests(PATIENTS_A_CLASS, SEED + number, finding, confounders=marks)
        counts = [IMAGES_OF_A_PATIENT[i % len(IMAGES_OF_A_PATIENT)] for i in range(PATIENTS_A_CLASS)]
        of_image = np.repeat(np.arange(PATIENTS_A_CLASS), counts)
        images = patients[torch.from_numpy(of_image)]
        moved = {name: getattr(images, name)
                 + spread * torch.from_numpy(rng.standard_normal(getattr(images, name).shape)).float()
                 for name, spread in FOLLOW_UP.items()}
        for name in STEADY:
            centre = ChestAnatomy.__dataclass_fields__[name].metadata["mean"]
            moved[name] = centre + 0.25 * (moved.get(name, getattr(images, name)) - centre)
        images = images.changed(**moved, severity=0.9 + 0.1 * images.severity)
        noise = torch.stack([images.keys[:, 0], torch.arange(len(images)) + 1000 * (number + 1)], dim=1)
        anatomies.append(images.changed(keys=noise))
        rows += [{"class": finding, "patient": f"P{100 * (number + 1) + i}"} for i in of_image]
    anatomy = ChestAnatomy(**{name: torch.cat([getattr(part, name) for part in anatomies])
                              for name in anatomies[0].__dataclass_fields__})
    rendered = render_chests(anatomy, IMG_SIZE).images
    return ((rendered[:, 0] + 1) * 127.5).round().byte().numpy(), rows


def main(output: Path) -> None:
    """Write the folder."""
    rng = np.random.default_rng(SEED)
    pixels, rows = render_images(rng)
    order = rng.permutation(len(rows))
    edges = np.cumsum([round(share * len(rows)) for share in SHARES.values()])[:-1]
    for split, members in zip(SHARES, np.split(order, edges), strict=True):
        for i in members:  # image by image, as one should not: patients land on both sides
            rows[i]["split"] = split
    for place, i in enumerate(rng.permutation(len(rows))):
        suffix = "jpg" if rows[i]["class"] == "COVID" else "png"
        folder = FOLDERS[rows[i]["class"]]
        rows[i]["file"] = f"{rows[i]['split']}/{folder}/film_{place:03d}.{suffix}"

    planted: dict[str, list[str]] = {}
    taken: set[int] = set()

    def pick(finding: str, split: str) -> int:
        """Return an image that no other fault has touched."""
        wanted = {"class": finding, "split": split}
        i = next(i for i in order if i not in taken and wanted.items() <= rows[i].items())
        taken.add(int(i))
        return int(i)

    def beside(i: int, split: str, name: str, finding: str | None = None) -> str:
        return f"{split}/{FOLDERS[finding or rows[i]['class']]}/{name}"

    with whole_folder(output) as root:
        def write(name: str, image: Image.Image, **options: object) -> str:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".jpg":
                options = {"quality": 90, **options}
            image.save(path, **options)  # type: ignore[arg-type]
            return name

        # labels that are wrong: the image lies in another class than the one that was rendered
        for finding, claimed, split in (("Normal", "COVID", "train"), ("COVID", "Normal", "train")):
            i = pick(finding, split)
            rows[i]["file"] = beside(i, split, Path(rows[i]["file"]).name, claimed)
            rows[i]["class"] = claimed
            planted.setdefault("likely mislabelled", []).append(rows[i]["file"])

        images = [Image.fromarray(levels) for levels in pixels]
        deep = pick("Normal", "train")
        grey16 = (pixels[deep].astype(np.uint16) * 257)
        colour, inverted, blank, flat = (pick("Normal", split) for split in ("train", "train", "test", "val"))
        wide, chunk, broken = pick("Pneumonia", "train"), pick("Normal", "test"), pick("Pneumonia", "val")
        images[colour] = images[colour].convert("RGB")
        images[inverted] = Image.fromarray(255 - pixels[inverted])
        images[blank] = Image.new("L", (IMG_SIZE, IMG_SIZE), 0)
        images[flat] = Image.fromarray((120 + (pixels[flat].astype(float) - 128) * 0.03).astype(np.uint8))
        images[wide] = images[wide].resize((2 * IMG_SIZE, IMG_SIZE * 2 // 3))
        for i, image in enumerate(images):
            write(rows[i]["file"], image)
        Image.fromarray(grey16).save(root / rows[deep]["file"])
        note = PngImagePlugin.PngInfo()
        note.add_text("Patient Name", "Maria Muster")
        images[chunk].save(root / rows[chunk]["file"], pnginfo=note)
        whole = (root / rows[broken]["file"]).read_bytes()
        (root / rows[broken]["file"]).write_bytes(whole[:len(whole) // 2])
        planted |= {"mixed depth": [rows[deep]["file"]], "mixed channels": [rows[colour]["file"]],
                    "inverted": [rows[inverted]["file"]], "blank": [rows[blank]["file"]],
                    "low contrast": [rows[flat]["file"]], "odd aspect": [rows[wide]["file"]],
                    "unreadable": [rows[broken]["file"]]}

        # copies
        i = pick("Normal", "train")
        planted["exact duplicate"] = [
            rows[i]["file"], write(beside(i, "train", "copy_of_film.png"), images[i])]
        i = pick("Pneumonia", "train")
        planted["duplicate across splits"] = [
            rows[i]["file"], write(beside(i, "test", "film_900.png"), images[i])]
        i, j = pick("Normal", "train"), pick("Pneumonia", "train")
        brighter = np.clip(255 * (pixels[i] / 255) ** 0.7, 0, 255).astype(np.uint8)
        margin = round(0.04 * IMG_SIZE)
        cropped = Image.fromarray(brighter[margin:-margin, margin:-margin]).resize((IMG_SIZE, IMG_SIZE))
        mirrored = images[j].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        planted["near duplicate across splits"] = [
            rows[i]["file"], write(beside(i, "test", "film_901.png"), cropped),
            rows[j]["file"], write(beside(j, "val", "film_902.png"), mirrored)]
        i = pick("Normal", "train")
        small = images[i].resize((64, 64), Image.Resampling.BILINEAR)
        planted["same name in two splits"] = [
            rows[i]["file"], write(beside(i, "val", Path(rows[i]["file"]).name), small)]
        i = pick("Normal", "train")
        planted["conflicting labels"] = [
            rows[i]["file"], write(beside(i, "train", "film_903.png", "Pneumonia"), images[i])]

        # privacy, strays, and a table that promises too much
        i = pick("Pneumonia", "test")
        person = beside(i, "test", "Mustermann_Erika_1964.png")
        (root / rows[i]["file"]).rename(root / person)
        rows[i]["file"] = person
        planted["personal data"] = [person, rows[chunk]["file"]]
        (root / "val" / "NORMAL" / "todo.txt").write_text("ask the archive for the missing films\n")
        planted["other files"] = ["val/NORMAL/todo.txt"]
        (root / "test" / "NORMAL" / "film_905.png").write_text("<html>404: film not found</html>\n")
        planted["not an image"] = ["test/NORMAL/film_905.png"]
        i = pick("Normal", "train")
        planted["extra class"] = [write("train/unsorted/film_904.png", images[i].rotate(3))]
        gone = ["train/NORMAL/film_998.png", "test/Covid-19/film_999.jpg"]
        planted["absent files"] = gone
        with (root / "films.csv").open("w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["file", "class", "patient"])
            table.writerows(sorted([row["file"], row["class"], row["patient"]] for row in rows))
            table.writerows([name, "Normal" if "NORMAL" in name else "COVID", "P999"] for name in gone)
        splits_of: dict[str, set[str]] = {}
        for row in rows:
            splits_of.setdefault(row["patient"], set()).add(row["split"])
        planted["patient in two splits"] = sorted(
            row["file"] for row in rows if len(splits_of[row["patient"]]) > 1)
        planted["shortcut"] = []  # of the whole set: COVID images are JPEG and mostly carry a border
        (root / "planted.json").write_text(json.dumps(dict(sorted(planted.items())), indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("expected one argument: the folder to write")
    main(Path(sys.argv[1]))
