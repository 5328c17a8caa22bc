"""Levels `calib` and `distill`: quantize a UNet with the model's own trajectories as data, in minutes to hours."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinysd_batch.errors import UsageError
from tinysd_batch.model.checkpoint.folder import read_schedule, write_packed_unet
from tinysd_batch.model.packed.format import Layout
from tinysd_batch.model.sampling.schedule import alphas_cumprod
from tinysd_batch.quantize.bit_allocation import allocate, check_target
from tinysd_batch.quantize.calibration.distill import Examples, Tuned, distill
from tinysd_batch.quantize.calibration.layerwise import Calibration, Pair, Solved, Use, layer_inputs
from tinysd_batch.quantize.calibration.resume import Work, digest_of, open_work
from tinysd_batch.quantize.calibration.trajectories import (
    HELD_OUT_SEEDS,
    TUNE_EVERY,
    Rows,
    Trajectories,
    draw,
    draw_held_out,
    set_apart,
    spread_points,
)
from tinysd_batch.quantize.calibration.unet_segments import State, Walker, rows_at_once
from tinysd_batch.quantize.convert import refuse_existing, tell_left_out, write_others
from tinysd_batch.quantize.data_free import check_finite
from tinysd_batch.quantize.estimate.duration import layer_efforts, speed_of
from tinysd_batch.quantize.estimate.memory import (
    MAX_HELD_POINTS,
    check_room,
    hand_back_memory,
    needs_of_calib,
    rows_of,
    state_dtype,
)
from tinysd_batch.quantize.evaluate.fit_noise_correction import Judged, correct
from tinysd_batch.quantize.evaluate.summary import Made
from tinysd_batch.quantize.presets import SMALLEST, Size, layers_to_pack, size_in_words
from tinysd_batch.quantize.recipe import Recipe
from tinysd_batch.quantize.sources.checkpoint_source import Options, Part, Say, as_stored, check_unet, write_json
from tinysd_batch.quantize.sources.open import open_source
from tinysd_batch.storage.atomic import new_folder, storage_errors

TELL_EVERY_S = 10.0
ALLOCATION_ROWS = 16
SIZE = Size()


def quantize_calibrated(
    source: Path, out: Path, options: Options, recipe: Recipe, device: torch.device, say: Say, *,
    size: Size = SIZE, tune: bool = False, noise_correction: bool = True,
) -> Made:  # fmt: skip
    """Write `out`, a packed folder of the float model `source`, calibrated by `recipe`, and distilled with `tune`.

    With `noise_correction` one is measured, and kept if pictures come closer to the float model's.

    A layer is on disk as soon as it is finished, in `OUT.work`: stopped in any way, the same call goes on. Raises
    ModelError as `fast.quantize_model` does, and where that folder was begun with another source, recipe or size.
    """
    refuse_existing(out)
    model = open_source(source, options)
    part = model.unet()
    unet = check_unet(part)
    if size.most is not None:
        check_target(unet, size.most, recipe.block)
    check_finite(part)
    if size.most is None:
        say(f"unet: {size}: {size_in_words(unet, layers_to_pack(unet, size.preset))}")
    needs = needs_of_calib(part, unet, model, size, recipe, tune=tune)
    say(f"calibrating on {rows_of(recipe):,} rows: {needs}")
    check_room(needs, out, device)
    identity = {"source": digest_of(part.tensors, part.release), "recipe": recipe.model_dump(), "size": size.notes()}
    started = time.monotonic()
    hand_back_memory(unet, size, device)
    with storage_errors(out), open_work(out, identity) as work:
        before = work.seconds()
        work.keep_level("distill" if tune else "calib")
        with new_folder(out) as folder:
            write_json(folder / "unet" / "config.json", part.config)
            write_others(model, folder, torch.float16, say)
            calibrating, held_out = draw_all(part, folder, recipe, device, work, say)
            layouts = work.layouts(lambda: choose(unet, part, size, recipe, device, calibrating))
            if size.most is not None:
                say(f"unet: {size}: {size_in_words(unet, layouts)}")
            solved = solve(part, layouts, recipe, device, calibrating, held_out, work, say)
            tuned = tune_all(part, folder, recipe, device, calibrating, solved, say) if tune else None
            if tuned is None:
                write_calibrated(part, folder / "unet", layouts, solved, {}, {"level": "calib", **size.notes()})
            else:
                notes = {"level": "distill", **size.notes()}
                write_calibrated(part, folder / "unet", layouts, tuned.layers, tuned.norms, notes)
            judged = judge_correction(folder, recipe, device, calibrating, held_out, say) if noise_correction else None
        seconds = before + time.monotonic() - started
        tell_left_out(model, say)
        made = Made({name: one.sqnr_db for name, one in solved.items()}, held_out, seconds, judged)
        work.remove()
    return made


def draw_all(
    part: Part, folder: Path, recipe: Recipe, device: torch.device, work: Work, say: Say
) -> tuple[Trajectories, Trajectories]:
    """The float model's trajectories, of the calibration prompts and of the held-out ones."""
    walker = Walker(part.config, part.tensors, device, part.release)

    def drawn(name: str, prompts: list[str], make: Callable[[], Trajectories]) -> Trajectories:
        say(f"drawing {len(prompts):,} {name} prompts in {recipe.steps} steps by the float model")
        return work.trajectories(name, make)

    calibrating = drawn(
        "calibration", recipe.prompts, lambda: draw(walker, folder, recipe, recipe.prompts, recipe.seed)
    )
    return calibrating, drawn("held-out", recipe.held_out, lambda: draw_held_out(walker, folder, recipe))


def choose(
    unet: nn.Module, part: Part, size: Size, recipe: Recipe, device: torch.device, calibrating: Trajectories
) -> dict[str, Layout]:
    """How the layers are stored; to meet a size, by their errors on some rows of the float model."""
    if size.most is None:
        return layers_to_pack(unet, size.preset)
    walker = Walker(part.config, part.tensors, device, part.release)
    rows = spread_points(calibrating, recipe.points)
    some = torch.linspace(0, len(rows.times) - 1, min(ALLOCATION_ROWS, len(rows.times))).long()
    names = list(layers_to_pack(unet, SMALLEST))
    inputs = layer_inputs(walker, Rows(rows.latents[some], rows.times[some], rows.context[some]), names)
    return allocate(unet, part.tensors, size.most, ((name, x.cpu()) for name, x in inputs), recipe.block)


def solve(
    part: Part, layouts: Mapping[str, Layout], recipe: Recipe, device: torch.device, calibrating: Trajectories,
    held_out: Trajectories, work: Work, say: Say,
) -> dict[str, Solved]:  # fmt: skip
    """All layers; what an earlier run finished is taken over."""
    source, target = (Walker(part.config, part.tensors, device, part.release) for _ in range(2))
    known = work.layers(layouts)
    if known:
        say(f"going on: {len(known):,} of {len(layouts):,} layers are there")
    else:
        say(f"calibrating the {len(layouts):,} layers")
    speed = speed_of(device)
    seconds = {name: effort.seconds(speed) for name, effort in layer_efforts(part, layouts, recipe).items()}
    progress = Progress(seconds, work, say, set(known), work.seconds())
    tuning, calibrating_rows = split(spread_points(calibrating, recipe.points), 2 * recipe.points)
    dtype = state_dtype(part, recipe)
    rows = [
        *pairs(calibrating_rows, device, "moments", dtype),
        *pairs(tuning, device, "tuning", dtype),
        *pairs(spread_points(held_out, MAX_HELD_POINTS), device, "held out", dtype),
    ]
    run = Calibration(source, target, layouts, recipe, known, progress.keep)
    run.run(rows)
    return run.solved


def split(rows: Rows, of_a_prompt: int) -> tuple[Rows, Rows]:
    """The rows of prompts that are set apart, and the others."""
    chosen = set_apart(torch.arange(len(rows.latents)) // of_a_prompt)
    first, others = (Rows(rows.latents[at], rows.times[at], rows.context[at]) for at in (chosen, ~chosen))
    return first, others


def pairs(rows: Rows, device: torch.device, use: Use, dtype: torch.dtype) -> Iterator[Pair]:
    """Rows on their way, some together."""
    step = rows_at_once(rows.latents)
    for parts in zip(*(torch.split(one, step) for one in (rows.latents, rows.times, rows.context)), strict=True):
        if len(parts[0]):
            state = State.of(*(part.to(device) for part in parts))
            yield Pair(state, state.copy(), use, dtype)


def tune_all(
    part: Part, folder: Path, recipe: Recipe, device: torch.device, drawn: Trajectories, solved: Mapping[str, Solved],
    say: Say,
) -> Tuned | None:  # fmt: skip
    """Distillation on the calibration prompts' trajectories; None, and a word, where it did not help."""
    alphas = alphas_cumprod(read_schedule(folder / "scheduler" / "scheduler_config.json"))
    sigmas = torch.tensor(((1 - alphas) / alphas) ** 0.5, dtype=torch.float32)
    prompts = torch.arange(len(drawn.context))
    chosen = set_apart(prompts)
    examples, tuning = (Examples.of(drawn, prompts[at], sigmas) for at in (~chosen, chosen))
    if not len(tuning.times):
        raise UsageError(f"distill needs {TUNE_EVERY // 2 + 1} prompts in the recipe or more; it has {len(prompts)}")
    tuned = distill(part, solved, examples, tuning, recipe, device, say)
    if tuned is None:
        say("tuning did not help; what calibration found is kept")
    return tuned


def judge_correction(
    folder: Path, recipe: Recipe, device: torch.device, calibrating: Trajectories, held_out: Trajectories, say: Say
) -> Judged:
    """Correct the noise of the finished folder if that helps: fitted on the prompts that did not calibrate layers."""
    prompts = torch.arange(len(calibrating.context))
    apart = prompts[set_apart(prompts)]
    say("measuring a noise correction")
    drawn = calibrating.some(apart) if len(apart) else calibrating
    judged = correct(folder, drawn, held_out, recipe.seed + HELD_OUT_SEEDS, recipe.scale, device)
    say(f"noise correction: {judged}")
    return judged


def write_calibrated(
    part: Part, folder: Path, layouts: Mapping[str, Layout], solved: Mapping[str, Solved],
    changed: Mapping[str, Tensor], notes: Mapping[str, Any],
) -> None:  # fmt: skip
    """The packed UNet: what calibration made, tensors that distillation changed, and the rest as float16."""
    shapes = {name: tuple(part.tensors[f"{name}.weight"].shape) for name in solved}
    others = {
        name: changed.get(name, as_stored(name, value, torch.float16, part.where))
        for name, value in part.tensors.items()
        if name.removesuffix(".weight") not in solved
    }
    others |= {f"{name}.bias": one.bias for name, one in solved.items() if one.bias is not None}
    packed = {name: (one.weight.stored_as(layouts[name]), shapes[name]) for name, one in solved.items()}
    write_packed_unet(folder, part.config, packed, others, notes)


# What is left


@dataclass(slots=True)
class Progress:
    """Keeps each finished layer, and tells now and then how long the others will take."""

    foretold: dict[str, float]  # seconds of each layer
    work: Work
    say: Say
    done: set[str]
    earlier: float  # seconds that earlier runs took
    started: float = field(default_factory=time.monotonic)
    told: float = 0.0
    spent: float = 0.0  # of these, by what this run did

    def keep(self, name: str, solved: Solved) -> None:
        self.work.keep_layer(name, solved)
        self.done.add(name)
        self.spent += self.foretold[name]
        now = time.monotonic()
        self.work.keep_seconds(self.earlier + now - self.started)
        if now - self.told >= TELL_EVERY_S or len(self.done) == len(self.foretold):
            self.told = now
            left = sum(each for other, each in self.foretold.items() if other not in self.done)
            seconds = (now - self.started) / self.spent * left
            self.say(
                f"{len(self.done):,} of {len(self.foretold):,} layers, about {spoken(seconds)} left; "
                f"{name}: {solved.sqnr_db:.1f} dB"
            )


def spoken(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
