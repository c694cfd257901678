"""The comparison with peers: turns are fair, everything goes on after a stop, and the report is readable."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from genailab_helpers import progress
from genailab_helpers.phantoms.chest import render_chests, sample_chests


class Fake:
    """A method that needs no time."""

    batch_size, n_samples, sampler, calls = 16, 40, "copying", 1

    def __init__(self, name: str, minutes: float, films: Tensor, log: list[str]) -> None:
        self.name, self.minutes, self.films, self.log, self.seconds = name, minutes, films, log, 0.0

    def share(self) -> float:
        return self.seconds / 60 / self.minutes

    def train(self, seconds: float) -> None:
        self.log.append(self.name)
        self.seconds += seconds

    def sample(self, n_samples: int, seed: int) -> Iterator[Tensor]:
        self.log.append(f"{self.name} draws")
        yield self.films[seed % 7:][:n_samples]

    def facts(self) -> dict[str, float]:
        return {"steps": 5, "seconds": self.seconds, "parameters": 1e6, "gigaflop": 0.2}


class Clock:
    """Time that passes by being asked for, so that a slow machine changes nothing."""

    def __init__(self, tick: float) -> None:
        self.now, self.tick = 0.0, tick

    def monotonic(self) -> float:
        self.now += self.tick
        return self.now


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("compare_peers")


@pytest.fixture
def peers(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with small numbers."""
    for name, value in (("IMG_SIZE", 16), ("PEER_SAMPLES", 20), ("OUR_SAMPLES", 40), ("SAMPLES_AT_ONCE", 16)):
        monkeypatch.setattr(script, name, value)
    return script


@pytest.fixture
def films(peers: ModuleType) -> Any:
    drawn = [render_chests(sample_chests(n, seed), 16).images for n, seed in ((60, 1), (44, 2))]
    return peers.Films("phantoms", *drawn)


def test_turns_are_given_in_proportion(peers: ModuleType, films: Any) -> None:
    log: list[str] = []
    methods = [Fake("short", 1, films.train, log), Fake("long", 3, films.train, log)]
    peers.train_in_turns(methods, seconds=15)
    assert log.count("short") == 4
    assert log.count("long") == 12
    for end in range(1, len(log)):  # at any time, both have done the same share, give or take a turn
        assert abs(log[:end].count("short") / 4 - log[:end].count("long") / 12) <= 1 / 4
    peers.train_in_turns(methods, seconds=15)
    assert len(log) == 16  # both are over


def test_our_training_goes_on_from_turn_to_turn(peers: ModuleType, films: Any, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.005)  # it is asked for every film, and three times a step
    monkeypatch.setattr(peers, "time", clock)
    monkeypatch.setattr(progress, "time", clock)
    minutes = 0.06
    shares = [0.0]
    while shares[-1] < 1:
        peers.Ours(films, minutes, tmp_path).train(0.8)
        shares.append(peers.Ours(films, minutes, tmp_path).share())  # as after a restart
        assert len(shares) < 40
    assert len(shares) > 3
    assert shares == sorted(shares)
    ours = peers.Ours(films, minutes, tmp_path)
    facts = ours.facts()
    assert 60 * minutes - 0.1 <= facts["seconds"] < 60 * minutes + 0.2
    assert facts["steps"] > len(shares)
    assert 0.01 < facts["gigaflop"] < 5
    made = torch.cat(list(ours.sample(18, seed=1)))
    assert made.shape == (18, 1, 16, 16)


@pytest.mark.parametrize("name", ["Diffusers", "DiffusersTuned", "Monai", "MonaiTuned", "Lucidrains",
                                  "LucidrainsTuned"])
@pytest.mark.slow
def test_each_peer_trains_and_draws(name: str, peers: ModuleType, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("diffusers", "monai", "denoising_diffusion_pytorch"):
        pytest.importorskip(package, reason="the extra `bench` is not installed")
    monkeypatch.setattr(peers, "IMG_SIZE", 64)
    films = peers.Films("phantoms", *[render_chests(sample_chests(20, 1), 64).images] * 2)
    kind = getattr(peers, name)
    monkeypatch.setattr(kind, "calls", 2)
    monkeypatch.setattr(kind, "batch_size", 4)
    kind(name, films, tmp_path, minutes=0.001).train(1)
    peer = kind(name, films, tmp_path, minutes=0.001)  # goes on from the state
    assert peer.share() >= 1
    assert peer.steps >= 1
    made = torch.cat(list(peer.sample(2, seed=1)))
    assert made.shape == (2, 1, 64, 64)
    assert made.abs().max() <= 1
    assert made.std() > 0.05


def test_rows_are_measured_once_and_reported(peers: ModuleType, films: Any, tmp_path: Path) -> None:
    log: list[str] = []
    curve = [Fake(f"GenAI Lab, {minutes} minutes", minutes, films.train, log) for minutes in (1, 3)]
    peer = Fake("a peer, tuned", 1, films.train, log)
    peer.n_samples = 20
    rows = peers.measure([*curve, peer], films, tmp_path / "work")
    assert [row["method"] for row in rows] == [method.name for method in (*curve, peer)]
    assert rows[0]["of 40"]["generated"]["copied"][0] > 0.9  # these hand out films of the training
    assert "of 40" not in rows[2]
    before = len(log)
    assert peers.measure([*curve, peer], films, tmp_path / "work") == rows
    assert len(log) == before

    runs = peers.read_runs(tmp_path / "work")
    assert [run["methods"] for run in runs] == [[method.name for method in (*curve, peer)]]
    head = {"date": "2026-01-02", "machine": "2 cores", "versions": "torch 2", "films": "60 of phantoms",
            "runs": runs}
    peers.write_report(rows, head, tmp_path / "docs")
    assert json.loads((tmp_path / "docs" / "peers.json").read_text()) == {"head": head, "rows": rows}
    page = (tmp_path / "docs" / "peers.md").read_text()
    for told in ("2026-01-02", "2 cores", "60 of phantoms", "a peer, tuned", "Not for diagnosis", "; a peer"):
        assert told in page
    assert Image.open(tmp_path / "docs" / "peers.png").size[0] > 600


def test_costs_grow_with_passes_films_and_pixels(load_script: Callable[[str], ModuleType]) -> None:
    costs = load_script("extrapolate_costs")
    page = costs.page({64: 0.18, 128: 0.72}, passes=100, minutes=30)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if " x " in line
            and line.startswith("|")]
    # 100 passes over 5,216 films are 32,600 steps of 16
    assert [row[:3] for row in rows] == [["64 x 64", "0.18", "1.6"], ["128 x 128", "0.72", "6.5"]]
    assert [row[3] for row in rows] == ["2.0", "8.0"]
    assert "estimate" in page

    card = {"card": "A CARD", "torch": "2", "date": "2026-01-02", "rows": [
        {"size": size, "batch size": n, "compiled": False, "seconds a step": 0.03, "films a second": speed,
         "peak GB": 1.0} for size in (64, 128) for n, speed in ((16, 500), (256, 5216))]}
    with_card = costs.page({64: 0.18, 128: 0.72}, passes=3600, minutes=30, card=card)
    assert "| 64 x 64 | 0.18 | 58.7 | 1.00 |" in with_card  # 3,600 passes at one a second, by the fastest row
    assert "| 64 x 64 | 16 | no | 0.0300 | 500 | 1.00 |" in with_card
