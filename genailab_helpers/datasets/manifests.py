"""Which films a model has seen: their hashes travel with it, so that no film of a test is among them."""

import hashlib
from collections.abc import Collection

from torch import Tensor

from genailab_helpers.features import check_images


def film_hashes(images: Tensor) -> list[str]:
    """Name each film by what it shows.

    Parameters
    ----------
    images : torch.Tensor
        (N, 1, H, W) float32 in [-1, 1]. They are rounded to 256 levels first, as the caches and PNG files of
        this project keep them, so that a film has the same name before and after it is stored.

    Returns
    -------
    list of str
        N SHA-256 sums of side lengths and pixels. The same film in another size has another one.

    Raises
    ------
    ValueError
        If `images` is no such batch.
    """
    check_images(images)
    levels = ((images.detach().cpu() + 1) * 127.5).round().byte().numpy()
    return [hashlib.sha256(repr(film.shape).encode() + film.tobytes()).hexdigest() for film in levels]


def check_manifest(manifest: Collection[str], train: Tensor, **held_out: Tensor) -> None:
    """Demand that a generator has seen films of the training and nothing else.

    Parameters
    ----------
    manifest : collection of str
        `film_hashes` of what the generator was trained on.
    train : torch.Tensor
        (N, 1, H, W) the training films.
    **held_out : torch.Tensor
        Films of the other parts, by the name of the part, such as `test=films`.

    Raises
    ------
    ValueError
        If the manifest holds a film of another part, or one that is not of the training.
    """
    seen = set(manifest)
    for part, films in held_out.items():
        if leaked := len(seen.intersection(film_hashes(films))):
            raise ValueError(f"{part}: the generator has seen {leaked} of its {len(films)} films; whatever "
                             "is trained on what it makes knows them, too: train it on the training films")
    if unknown := len(seen.difference(film_hashes(train))):
        raise ValueError(f"manifest: {unknown} of {len(seen)} films are none of the training; expected films "
                         "of the training alone, in the size in which they are used")
