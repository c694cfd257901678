"""Our diffusion engine beside diffusers, MONAI and denoising-diffusion-pytorch: same films, same wall time.

`make bench-diffusion` runs it: hours on 2 cores. It may be stopped at any time and goes on; delete
`build/peers` to begin anew. Methods train in turns of `SLICE` seconds, whoever has the smallest share of its
time behind it next, so that a slow hour of the machine slows all alike. Each peer runs from its own package,
once with the settings of its own tutorial and once tuned by us for this size and time. In the end stand
`docs/peers.json`, `docs/peers.md` and `docs/peers.png`.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from genailab_helpers.checkpoints import load_checkpoint, whole_file
from genailab_helpers.datasets.folders import RadiographFolder
from genailab_helpers.diffusion.architectures import UNet2D
from genailab_helpers.diffusion.denoiser import (
    LINEAR_ABOVE,
    Denoiser,
    add_noise,
    karras_sigmas,
    load_denoiser,
)
from genailab_helpers.diffusion.evaluation import EvaluationTable, evaluate
from genailab_helpers.diffusion.sampling import generate, sample_heun
from genailab_helpers.diffusion.training import train_image_diffusion
from genailab_helpers.phantoms.chest import render_chests, sample_chests

ROOT = Path(__file__).parents[1]
IMG_SIZE = 64
SLICE = 30.0  # seconds
PEER_MINUTES, PEER_SAMPLES, PEER_CALLS = 10.0, 200, 20
OUR_MINUTES, OUR_SAMPLES, OUR_STEPS = (1.0, 3.0, 5.0, 10.0, 30.0), 500, 20
SAMPLES_AT_ONCE = 50
RUNS = "runs.json"
AT_ONCE = 16  # films of a step whose activations are held at a time


@dataclass(frozen=True)
class Films:
    """The films of all methods, (N, 1, 64, 64) in [-1, 1], and where they come from."""

    source: str
    train: Tensor
    held_out: Tensor


def read_films() -> Films:
    """Read chest_xray, or draw phantoms where it is absent."""
    folder = Path(os.environ.get("GENAILAB_REAL_DATA", ROOT.parent / "shared" / "data")) / "chest_xray"
    if folder.is_dir():
        parts = (RadiographFolder(folder / part, IMG_SIZE) for part in ("train", "test"))
        return Films("chest_xray", *(torch.stack([film for film, _ in part]) for part in parts))
    drawn = (render_chests(sample_chests(n, seed), IMG_SIZE).images for n, seed in ((1301, 1), (352, 2)))
    return Films("phantoms", *drawn)


class Method(Protocol):
    """Something that can be trained for a while, and go on later."""

    name: str
    minutes: float
    batch_size: int
    n_samples: int
    sampler: str
    calls: int

    def share(self) -> float:
        """Return the share of its time that it has trained."""

    def train(self, seconds: float) -> None:
        """Train about so long, and keep the state."""

    def sample(self, n_samples: int, seed: int) -> Iterator[Tensor]:
        """Yield films in [-1, 1]."""

    def facts(self) -> dict[str, float]:
        """Return `steps`, `seconds`, `parameters`, and `gigaflop` of one step."""


def gigaflop(step: Callable[[], object]) -> float:
    """Count the floating-point operations of convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 1e9


def count(model: nn.Module) -> int:
    """Count the numbers in a model, those that were measured or set and not trained too."""
    return sum(numbers.numel() for numbers in model.state_dict().values())


# ------------------------------------------------------------------------------------------------- ours

class Sliced(Dataset[Tensor]):
    """Films that stop the training when a slice is over, as Ctrl-C would."""

    def __init__(self, films: Tensor) -> None:
        self.films, self.deadline = films, float("inf")

    def __len__(self) -> int:
        return len(self.films)

    def __getitem__(self, i: int) -> Tensor:
        if time.monotonic() > self.deadline:
            raise KeyboardInterrupt
        return self.films[i]


class Ours:
    """`train_image_diffusion` as every lesson calls it."""

    n_samples, batch_size, sampler = OUR_SAMPLES, 16, "DPM-Solver++"
    calls = int((karras_sigmas(OUR_STEPS)[:-1] <= LINEAR_ABOVE).sum())  # the other steps need no network

    def __init__(self, films: Films, minutes: float, folder: Path) -> None:
        self.name, self.minutes = f"GenAI Lab, {minutes:g} minute{'s' * (minutes != 1)}", minutes
        self.films = Sliced(films.train)
        self.checkpoint = folder / "training.safetensors"

    def share(self) -> float:
        if not self.checkpoint.exists():  # or a machine so slow that a turn was not even a step
            return 0.0
        return load_checkpoint(self.checkpoint).recipe["progress"]["seconds"] / 60 / self.minutes

    def train(self, seconds: float) -> None:
        loader = DataLoader(self.films, self.batch_size, shuffle=True, drop_last=True)
        self.films.deadline = time.monotonic() + seconds
        try:
            train_image_diffusion(loader, IMG_SIZE, minutes=self.minutes, checkpoint=self.checkpoint,
                                  progress=False)
        except KeyboardInterrupt:
            if time.monotonic() < self.films.deadline:
                raise  # somebody's Ctrl-C

    def sample(self, n_samples: int, seed: int) -> Iterator[Tensor]:
        yield from generate(load_denoiser(self.checkpoint), n_samples, n_steps=OUR_STEPS, seed=seed,
                            batch_size=SAMPLES_AT_ONCE, linear_above=LINEAR_ABOVE)

    def facts(self) -> dict[str, float]:
        progress = load_checkpoint(self.checkpoint).recipe["progress"]
        model, films = load_denoiser(self.checkpoint), [self.films.films[:self.batch_size]]
        return {"steps": progress["steps"], "seconds": progress["seconds"], "parameters": count(model),
                "gigaflop": gigaflop(lambda: train_image_diffusion(films, IMG_SIZE, n_steps=1, model=model,
                                                                   progress=False))}


# ----------------------------------------------------------------------------------- methods with a loop

class Loop:
    """The loop that all the tutorials share: noise, loss, step, and at times an average of the weights."""

    n_samples, sampler, calls = PEER_SAMPLES, "DDIM", PEER_CALLS
    batch_size = 16
    warm_up = 0  # steps
    decays = False  # whether the step size falls to 0 over the time
    clip = 1.0
    average: float | None = None  # decay of the average of the weights, if there is one
    average_from, average_every = 0, 1  # steps

    def __init__(self, name: str, films: Films, folder: Path, minutes: float = PEER_MINUTES) -> None:
        self.name, self.films, self.minutes = name, films.train, minutes
        self.file = folder / "training.pt"
        torch.manual_seed(0)
        self.model = self.build()
        self.lr, self.optimiser = self.optimise()
        self.averaged = None if self.average is None else torch.optim.swa_utils.AveragedModel(
            self.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(self.average))
        self.steps, self.seconds = 0, 0.0
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            self.steps, self.seconds = state["steps"], state["seconds"]
            for name, part in self.parts().items():
                part.load_state_dict(state[name])

    def build(self) -> nn.Module:
        raise NotImplementedError

    def optimise(self) -> tuple[float, torch.optim.Optimizer]:
        raise NotImplementedError

    def loss(self, films: Tensor) -> Tensor:
        raise NotImplementedError

    def draw(self, model: nn.Module, noise: Tensor) -> Tensor:
        """Walk from noise (N, 1, 64, 64) to films in [-1, 1]."""
        raise NotImplementedError

    def parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimiser": self.optimiser, "averaged": self.averaged}
        return {name: part for name, part in parts.items() if part is not None}

    def share(self) -> float:
        return self.seconds / 60 / self.minutes

    def train(self, seconds: float) -> None:
        begun, before = time.monotonic(), self.seconds
        self.model.train()
        generator = torch.Generator().manual_seed(self.steps)
        torch.manual_seed(self.steps)
        while self.seconds < min(before + seconds, 60 * self.minutes):
            factor = min(1, (self.steps + 1) / max(1, self.warm_up)) * (1 - self.share() * self.decays)
            for group in self.optimiser.param_groups:
                group["lr"] = self.lr * factor
            chosen = torch.randint(len(self.films), (self.batch_size,), generator=generator)
            for part in self.films[chosen].split(AT_ONCE):  # the same step in less memory
                (self.loss(part) * len(part) / self.batch_size).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimiser.step()
            self.optimiser.zero_grad()
            self.steps += 1
            if (self.averaged is not None and self.steps > self.average_from
                    and self.steps % self.average_every == 0):
                self.averaged.update_parameters(self.model)
            self.seconds = before + time.monotonic() - begun
        with whole_file(self.file) as path:
            torch.save({name: part.state_dict() for name, part in self.parts().items()}
                       | {"steps": self.steps, "seconds": self.seconds}, path)

    @torch.no_grad()
    def sample(self, n_samples: int, seed: int) -> Iterator[Tensor]:
        begun = self.steps >= self.average_from + self.average_every
        model = self.model if self.averaged is None or not begun else self.averaged.module
        model.eval().to(memory_format=torch.channels_last)  # as `load_denoiser` does with ours
        torch.manual_seed(seed)
        for first in range(0, n_samples, SAMPLES_AT_ONCE):
            n_films = min(SAMPLES_AT_ONCE, n_samples - first)
            yield self.draw(model, torch.randn(n_films, 1, IMG_SIZE, IMG_SIZE)).clamp(-1, 1)

    def facts(self) -> dict[str, float]:
        some = gigaflop(lambda: self.loss(self.films[:AT_ONCE]).backward())  # Adam multiplies no matrices
        return {"steps": self.steps, "seconds": round(self.seconds, 1), "parameters": count(self.model),
                "gigaflop": some * self.batch_size / AT_ONCE}


class Diffusers(Loop):
    """The tutorial "Train a diffusion model" of diffusers, its network at half its image size."""

    warm_up, schedule, prediction = 500, "linear", "epsilon"

    def build(self) -> nn.Module:
        from diffusers import DDPMScheduler

        self.noising = DDPMScheduler(beta_schedule=self.schedule, prediction_type=self.prediction)
        return self.network()

    def network(self) -> nn.Module:
        from diffusers import UNet2DModel

        return UNet2DModel(
            sample_size=IMG_SIZE, in_channels=1, out_channels=1, layers_per_block=2,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4)

    def optimise(self) -> tuple[float, torch.optim.Optimizer]:
        return 1e-4, torch.optim.AdamW(self.model.parameters(), 1e-4)

    def loss(self, films: Tensor) -> Tensor:
        noise, times = torch.randn_like(films), torch.randint(1000, (len(films),))
        noisy = self.noising.add_noise(films, noise, times)
        velocity = self.prediction == "v_prediction"
        target = self.noising.get_velocity(films, noise, times) if velocity else noise
        return F.mse_loss(self.estimate(self.model, noisy, times), target)

    def estimate(self, model: nn.Module, noisy: Tensor, times: Tensor) -> Tensor:
        return model(noisy, times, return_dict=False)[0]

    def walk(self) -> Any:
        from diffusers import DDIMScheduler

        return DDIMScheduler.from_config(self.noising.config, timestep_spacing="trailing")  # from pure noise

    def draw(self, model: nn.Module, noise: Tensor) -> Tensor:
        walk = self.walk()
        walk.set_timesteps(self.calls)
        for t in walk.timesteps:
            noise = walk.step(self.estimate(model, noise, t.expand(len(noise))), t, noise).prev_sample
        return noise


class DiffusersTuned(Diffusers):
    """diffusers with a network, a step size and a schedule for this size and time."""

    warm_up, decays, average, schedule, prediction = 50, True, 0.99, "squaredcos_cap_v2", "v_prediction"
    sampler = "DPM-Solver++"

    def network(self) -> nn.Module:
        from diffusers import UNet2DModel

        return UNet2DModel(
            sample_size=IMG_SIZE, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=8,
            block_out_channels=(16, 32, 64, 128, 128), attention_head_dim=32,
            down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * 4)

    def walk(self) -> Any:
        from diffusers import DPMSolverMultistepScheduler

        return DPMSolverMultistepScheduler.from_config(self.noising.config, timestep_spacing="trailing")

    def optimise(self) -> tuple[float, torch.optim.Optimizer]:
        return 2e-3, torch.optim.AdamW(self.model.parameters(), 2e-3)


class Monai(Loop):
    """MONAI's tutorial 2d_ddpm, whose films have this size."""

    batch_size, clip, schedule, prediction = 128, float("inf"), "linear_beta", "epsilon"

    def build(self) -> nn.Module:
        from monai.networks.schedulers import DDIMScheduler, DDPMScheduler

        self.noising = DDPMScheduler(schedule=self.schedule, prediction_type=self.prediction)
        # from pure noise; without an offset its steps end at other levels than they are told, and grain stays
        self.walk = DDIMScheduler(schedule=self.schedule, prediction_type=self.prediction,
                                  steps_offset=1000 // self.calls - 1)
        return self.network()

    def network(self) -> nn.Module:
        from monai.networks.nets import DiffusionModelUNet

        return DiffusionModelUNet(spatial_dims=2, in_channels=1, out_channels=1, channels=(128, 256, 256),
                                  attention_levels=(False, True, True), num_res_blocks=1,
                                  num_head_channels=256)

    def optimise(self) -> tuple[float, torch.optim.Optimizer]:
        return 2.5e-5, torch.optim.Adam(self.model.parameters(), 2.5e-5)

    def loss(self, films: Tensor) -> Tensor:
        noise, times = torch.randn_like(films), torch.randint(1000, (len(films),))
        noisy = self.noising.add_noise(original_samples=films, noise=noise, timesteps=times)
        velocity = self.prediction == "v_prediction"
        target = self.noising.get_velocity(films, noise, times) if velocity else noise
        return F.mse_loss(self.model(noisy, timesteps=times), target)

    def draw(self, model: nn.Module, noise: Tensor) -> Tensor:
        self.walk.set_timesteps(self.calls)
        for t in self.walk.timesteps:
            estimate = model(noise, timesteps=torch.full((len(noise),), int(t)))
            noise, _ = self.walk.step(estimate, int(t), noise)
        return noise


class MonaiTuned(Monai):
    """MONAI with a network, a step size and a target for this size and time."""

    batch_size, warm_up, decays, clip, average = 16, 50, True, 1.0, 0.99
    schedule, prediction = "cosine", "v_prediction"

    def network(self) -> nn.Module:
        from monai.networks.nets import DiffusionModelUNet

        return DiffusionModelUNet(spatial_dims=2, in_channels=1, out_channels=1,
                                  channels=(16, 32, 64, 128, 128),
                                  attention_levels=(False, False, False, False, True), num_res_blocks=1,
                                  num_head_channels=32, norm_num_groups=8)

    def optimise(self) -> tuple[float, torch.optim.Optimizer]:
        return 1e-3, torch.optim.Adam(self.model.parameters(), 1e-3)


class Lucidrains(Loop):
    """The README of denoising-diffusion-pytorch; its Trainer's loop, two batches of 32 a step."""

    batch_size, average, average_from, average_every = 64, 0.995, 100, 10
    width, heads, weighted = 64, 4, False

    def build(self) -> nn.Module:
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet

        network = Unet(dim=self.width, dim_mults=(1, 2, 4, 8), channels=1, attn_heads=self.heads)
        return GaussianDiffusion(network, image_size=IMG_SIZE, timesteps=1000, sampling_timesteps=self.calls,
                                 min_snr_loss_weight=self.weighted)

    def optimise(self) -> tuple[float, torch.optim.Optimizer]:
        return 8e-5, torch.optim.Adam(self.model.parameters(), 8e-5, betas=(0.9, 0.99))

    def loss(self, films: Tensor) -> Tensor:
        return self.model((films + 1) / 2)  # it expects 0 to 1

    def draw(self, model: nn.Module, noise: Tensor) -> Tensor:
        return model.sample(batch_size=len(noise)) * 2 - 1  # type: ignore[operator]


class LucidrainsTuned(Lucidrains):
    """denoising-diffusion-pytorch with a network, a step size and a weighting for this size and time."""

    batch_size, warm_up, decays, average, average_from, average_every = 16, 50, True, 0.99, 0, 1
    width, heads, weighted = 16, 1, True

    def optimise(self) -> tuple[float, torch.optim.Optimizer]:
        return 2e-3, torch.optim.Adam(self.model.parameters(), 2e-3, betas=(0.9, 0.99))


class Rough(Loop):
    """The rough recipe of this project's first experiments: coarse patches, plain preconditioning, AdamW."""

    batch_size, decays, average, n_samples = 32, True, 0.995, OUR_SAMPLES
    sampler, calls = "Heun", 35  # 18 steps

    def build(self) -> nn.Module:
        network = UNet2D(base_channels=64, channel_multipliers=(1, 2, 3), patch_size=4)
        return Denoiser(network, IMG_SIZE)  # not fitted: Karras et al. 2022

    def optimise(self) -> tuple[float, torch.optim.Optimizer]:
        return 2e-3, torch.optim.AdamW(self.model.parameters(), 2e-3)

    def loss(self, films: Tensor) -> Tensor:
        sigma = (1.4 * torch.randn(len(films)) - 0.4).exp()
        error = self.model(add_noise(films, torch.randn_like(films), sigma), sigma) - films
        return (error / self.model.scales(sigma)[0]).square().mean()

    def draw(self, model: nn.Module, noise: Tensor) -> Tensor:
        return sample_heun(model, len(noise), n_steps=18, seed=int(torch.randint(2**31, ())))


def all_methods(films: Films, folder: Path) -> list[Method]:
    """Return every method; each keeps its state in a folder of its own."""
    named: dict[str, Callable[[Path], Method]] = {
        f"ours_{minutes:g}": lambda place, m=minutes: Ours(films, m, place) for minutes in OUR_MINUTES}
    named |= {name: lambda place, kind=kind, told=told: kind(told, films, place) for name, kind, told in (
        ("diffusers", Diffusers, "diffusers, its tutorial"),
        ("diffusers_tuned", DiffusersTuned, "diffusers, tuned"),
        ("monai", Monai, "MONAI, its tutorial"),
        ("monai_tuned", MonaiTuned, "MONAI, tuned"),
        ("lucidrains", Lucidrains, "denoising-diffusion-pytorch, its README"),
        ("lucidrains_tuned", LucidrainsTuned, "denoising-diffusion-pytorch, tuned"))}
    named["rough"] = lambda place: Rough("rough recipe, 5 minutes", films, place, minutes=5)
    return [make(folder / name) for name, make in named.items()]


# ----------------------------------------------------------------------------------------- all together

def train_in_turns(methods: Sequence[Method], seconds: float = SLICE) -> None:
    """Give turns to whoever has the smallest share of its time behind it, until all have theirs."""
    shares = {method.name: method.share() for method in methods}
    with tqdm(total=round(sum(method.minutes for method in methods)), unit="min", desc="training") as bar:
        while waiting := [method for method in methods if shares[method.name] < 1]:
            method = min(waiting, key=lambda method: shares[method.name])
            bar.set_postfix_str(method.name)
            method.train(seconds)
            shares[method.name] = method.share()
            bar.n = round(sum(min(1, shares[each.name]) * each.minutes for each in methods))
            bar.refresh()


def judge(method: Method, films: Films, folder: Path) -> dict[str, Any]:
    """Draw films, a batch a file so that it can be stopped, and judge them."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[Tensor] = []
    for first in range(0, method.n_samples, SAMPLES_AT_ONCE):
        file = folder / f"samples_{first:04d}.pt"
        if not file.exists():
            n_films = min(SAMPLES_AT_ONCE, method.n_samples - first)
            made = torch.cat(list(method.sample(n_films, seed=1000 + first)))
            with whole_file(file) as path:
                torch.save({"films": made}, path)
        parts.append(torch.load(file, weights_only=True)["films"])
    made = torch.cat(parts)
    row: dict[str, Any] = {"method": method.name, "minutes": method.minutes}
    for n_films in sorted({PEER_SAMPLES, method.n_samples}):
        row[f"of {n_films}"] = figures(evaluate(made[:n_films], films.train, films.held_out))
    return row


def time_drawing(methods: Sequence[Method], file: Path) -> dict[str, float]:
    """Return each method's seconds a film, the median of three rounds in turns of eight films."""
    if not file.exists():
        seconds: dict[str, list[float]] = {method.name: [] for method in methods}
        for _ in range(3):
            for method in methods:
                begun = time.monotonic()
                n_films = sum(len(made) for made in method.sample(8, seed=1))
                seconds[method.name].append((time.monotonic() - begun) / n_films)
        with whole_file(file) as path:
            path.write_text(json.dumps({name: round(statistics.median(each), 3)
                                        for name, each in seconds.items()}), encoding="utf-8")
    found: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    return found


def figures(table: EvaluationTable) -> dict[str, Any]:
    """Return what `evaluate` says of the generator and of real against real, in three digits."""
    rows = {name: {metric: [round(number, 3) for number in getattr(row, metric)[:3]]
                   for metric in ("frechet", "precision", "recall", "nn_ratio", "copied")}
            for name, row in zip(("generated", "reference"), table.rows, strict=False)}
    return {"n": table.n, "verdict": table.verdict, **rows}


def machine() -> str:
    """Describe the machine without naming it."""
    cpus = Path("/proc/cpuinfo")
    kinds = {line.partition(":")[2].strip() for line in cpus.read_text().splitlines()
             if line.startswith("model name")} if cpus.exists() else {platform.processor()}
    return f"{os.cpu_count()} cores of {', '.join(sorted(kinds))}, {torch.get_num_threads()} threads"


HOW = (
    "Each peer runs from its own package: once with the network, step size, batch and schedule of its own"
    " tutorial (diffusers: *Train a diffusion model*; MONAI: *2d_ddpm*; denoising-diffusion-pytorch: its "
    "README), and once *tuned* by us for this size and time, in good faith, by trainings of two minutes: "
    "a smaller network, a larger step size, an average of the weights, a better schedule or weighting. "
    "All images are in [-1, 1], none is flipped or moved, and every walk of a peer has {calls} steps from "
    "pure noise (the tutorials take 250 or 1,000). The tutorials are made for hours on a graphics card: "
    "*steps* tells how far they come here. Our own recipe was chosen by the distance from the same held-"
    "out images, so that our rows are a little too good. *GFLOP* counts convolutions and matrix products, "
    "*size* all numbers in a model, also those that are measured and not trained.")


def write_report(rows: list[dict[str, Any]], head: dict[str, Any], docs: Path) -> None:
    """Write table, page and figure."""
    with whole_file(docs / "peers.json") as path:
        lines = ",\n".join(json.dumps(row) for row in rows)
        path.write_text(f'{{"head": {json.dumps(head)},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")
    few, many = f"of {PEER_SAMPLES}", f"of {OUR_SAMPLES}"

    def distance(row: dict[str, Any], n_films: str = few) -> str:
        value, low, high = row[n_films]["generated"]["frechet"]
        return f"**{value:.0f}** [{low:.0f}, {high:.0f}]"

    best = min((row for row in rows if not row["method"].startswith(("GenAI Lab", "rough"))),
               key=lambda row: row[few]["generated"]["frechet"][0])
    text = [
        "# Same images, same time: our engine beside its peers", "",
        f"Made by `make bench-diffusion` on {head['date']}; {head['machine']}; {head['versions']}. Images: "
        f"{head['films']}. Not for diagnosis: no image that any of these draws shows a person.", "",
        f"{rows[0]['method']}: {distance(rows[0])}. The best peer, {best['method']} ({best['minutes']:g} "
        f"minutes): {distance(best)}.", "",
        HOW.format(calls=PEER_CALLS), "",
        f"Trained in turns of {SLICE:g} seconds, so that a slow hour of the machine slows all methods of a "
        "run alike; the runs:", "",
        *(f"- on {run['date']}: {'; '.join(run['methods'])}" for run in head["runs"]), "",
        f"*Distance* is the Fréchet distance in the frozen Lite0 space between {PEER_SAMPLES} generated and "
        f"as many held-out images, with a 95 % interval, as `genailab evaluate` prints it (it compares "
        f"halves of n images, here n = {rows[0][few]['n']}); held-out images against held-out images: "
        f"**{rows[0][few]['reference']['frechet'][0]:.0f}**. *nn ratio* is 1 where images are as new as "
        "images of other patients, near 0 where they are copies. One training each, so that differences of a "
        "few per cent mean nothing.", "",
        "| method | minutes | steps | images a step | GFLOP a step | size | sampler, calls | "
        "seconds an image | distance | recall | nn ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        made = row[few]["generated"]
        text.append(f"| {row['method']} | {row['minutes']:g} | {row['steps']:,} | {row['films a step']} | "
                    f"{row['gigaflop']:,.0f} | {row['parameters'] / 1e6:.1f} M | "
                    f"{row['sampler']}, {row['calls']} | {row['seconds a film']:.2f} | {distance(row)} | "
                    f"{made['recall'][0]:.2f} | {made['nn_ratio'][0]:.2f} |")
    ours = [row for row in rows if many in row]
    text += ["", f"With {OUR_SAMPLES} images (n = {ours[0][many]['n']}; held-out against held-out "
             f"{ours[0][many]['reference']['frechet'][0]:.0f}):", "",
             "| method | distance | precision | recall | nn ratio | copied |", "|---|---|---|---|---|---|"]
    for row in ours:
        made = row[many]["generated"]
        text.append(f"| {row['method']} | {distance(row, many)} | {made['precision'][0]:.2f} | "
                    f"{made['recall'][0]:.2f} | {made['nn_ratio'][0]:.2f} | {made['copied'][0]:.2f} |")
    text += ["", "![Distance against minutes of training, for each method](peers.png)", ""]
    with whole_file(docs / "peers.md") as path:
        path.write_text("\n".join(text), encoding="utf-8")
    draw_figure(rows, docs / "peers.png")


def draw_figure(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw distance against minutes: a curve for ours, a point a peer."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    few = f"of {PEER_SAMPLES}"
    curve = [row for row in rows if row["method"].startswith("GenAI Lab")]
    axis.plot([row["minutes"] for row in curve], [row[few]["generated"]["frechet"][0] for row in curve],
              marker="o", label="GenAI Lab")
    others = [row for row in rows if row not in curve]
    for place, (row, marker) in enumerate(zip(others, "sDv^<>P", strict=False)):
        value, low, high = row[few]["generated"]["frechet"]
        beside = 1.07 ** (place - (len(others) - 1) / 2) if row["minutes"] == PEER_MINUTES else 1
        axis.errorbar(row["minutes"] * beside, value, [[value - low], [high - value]], marker=marker,
                      linestyle="", label=row["method"].removesuffix(", 5 minutes"))
    axis.axhline(curve[0][few]["reference"]["frechet"][0], color="grey", linestyle=":",
                 label="held-out images against each other")
    axis.set(xlabel=f"minutes of training on {os.cpu_count()} cores (peers of {PEER_MINUTES:g} side by side)",
             ylabel="Fréchet distance from held-out images", xscale="log", yscale="log",
             title="Same images, same time")
    axis.set_xticks([1, 3, 5, 10, 30], ["1", "3", "5", "10", "30"])
    axis.set_yticks([100, 200, 500, 1000], ["100", "200", "500", "1,000"])
    axis.minorticks_off()
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", frameon=False)
    with whole_file(file) as path:
        figure.savefig(path, dpi=120)
    plt.close(figure)


def measure(methods: Sequence[Method], films: Films, folder: Path) -> list[dict[str, Any]]:
    """Train and judge all methods, or go on with it; finished rows are read."""
    files = {method.name: folder / f"{i:02d}.json" for i, method in enumerate(methods)}
    unfinished = [method for method in methods if not files[method.name].exists()]
    note_run([method.name for method in unfinished if method.share() < 1], folder)
    train_in_turns(unfinished)
    for method in unfinished:
        print(f"drawing with {method.name}", flush=True)
        row = judge(method, films, folder / f"{files[method.name].stem}_samples")
        with whole_file(files[method.name]) as path:
            path.write_text(json.dumps(row), encoding="utf-8")
        print(json.dumps(row[f"of {PEER_SAMPLES}"]["generated"]), flush=True)
    seconds = time_drawing(methods, folder / "seconds_a_film.json")
    return [{**json.loads(files[method.name].read_text(encoding="utf-8")), **method.facts(),
             "films a step": method.batch_size, "sampler": method.sampler, "calls": method.calls,
             "seconds a film": seconds[method.name]} for method in methods]


def note_run(names: list[str], folder: Path) -> None:
    """Note which methods begin to take turns; some of those of the last note go on with it."""
    runs = read_runs(folder)
    if names and not (runs and set(names) <= set(runs[-1]["methods"])):
        runs.append({"date": datetime.now(UTC).date().isoformat(), "methods": names})
        with whole_file(folder / RUNS) as path:
            path.write_text(json.dumps(runs), encoding="utf-8")


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """Return the runs that trained, each with its date and the methods that took turns in it."""
    file = folder / RUNS
    return list(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else []


def main() -> None:
    """Measure everything and write the report."""
    parser = argparse.ArgumentParser(description="Compare our diffusion engine with its peers.")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "peers", help="where to go on")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the report goes")
    chosen = parser.parse_args()
    films = read_films()
    packages = ("torch", "diffusers", "monai", "denoising-diffusion-pytorch")
    rows = measure(all_methods(films, chosen.folder), films, chosen.folder)
    head = {"date": datetime.now(UTC).date().isoformat(), "machine": machine(),
            "versions": ", ".join(f"{name} {version(name)}" for name in packages),
            "n_train": len(films.train), "runs": read_runs(chosen.folder),
            "films": f"{len(films.train):,} of {films.source} to train on, {len(films.held_out)} held out, "
                     f"{IMG_SIZE}x{IMG_SIZE} pixels"}
    write_report(rows, head, chosen.docs)
    print(f"Look at {chosen.docs / 'peers.md'}")


if __name__ == "__main__":
    sys.exit(main())
