"""Levels `calib` and `distill`: quantize a UNet with the model's own trajectories as data, in minutes to hours."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinysd_batch.errors import UsageError
from tinysd_batch.model.checkpoint.folder import read_noise_schedule, write_packed_unet
from tinysd_batch.model.packed.format import Layout
from tinysd_batch.model.sampling.schedule import compute_alphas_cumprod
from tinysd_batch.quantize.bit_allocation import allocate_bits, check_target_size
from tinysd_batch.quantize.calibration.distill import DistillationExamples, DistilledUNet, distill_unet
from tinysd_batch.quantize.calibration.layerwise import (
    CalibratedLayer,
    DataSplit,
    LayerwiseCalibration,
    StatePair,
    iter_layer_inputs,
)
from tinysd_batch.quantize.calibration.resume import WorkFolder, hash_tensors, open_work_folder
from tinysd_batch.quantize.calibration.trajectories import (
    HELD_OUT_SEED_OFFSET,
    TUNING_PROMPT_INTERVAL,
    Trajectories,
    UNetInputs,
    generate_held_out_trajectories,
    generate_trajectories,
    select_spaced_inputs,
    tuning_prompt_mask,
)
from tinysd_batch.quantize.calibration.unet_segments import ForwardState, SegmentedUNet, segment_batch_size
from tinysd_batch.quantize.convert import check_not_existing, report_ignored_tensors, write_other_components
from tinysd_batch.quantize.data_free import check_finite
from tinysd_batch.quantize.estimate.duration import estimate_layer_costs, measure_device_speed
from tinysd_batch.quantize.estimate.memory import (
    HELD_OUT_POINTS,
    check_available_resources,
    choose_state_dtype,
    count_unet_inputs,
    estimate_calibration_resources,
    return_freed_memory_to_os,
)
from tinysd_batch.quantize.evaluate.fit_noise_correction import CorrectionEvaluation, add_noise_correction
from tinysd_batch.quantize.evaluate.summary import QuantizationResult
from tinysd_batch.quantize.presets import SMALLEST_PRESET, SizeTarget, describe_size, get_preset_layouts
from tinysd_batch.quantize.recipe import Recipe
from tinysd_batch.quantize.sources.checkpoint_source import (
    SourceComponent,
    SourceOptions,
    StatusCallback,
    check_unet_tensors,
    convert_for_storage,
    write_json,
)
from tinysd_batch.quantize.sources.open import open_source
from tinysd_batch.storage.atomic import create_folder_atomically, storage_errors

PROGRESS_INTERVAL_S = 10.0
ALLOCATION_INPUTS = 16
DEFAULT_SIZE = SizeTarget()


def quantize_with_calibration(
    source: Path, out: Path, options: SourceOptions, recipe: Recipe, device: torch.device, say: StatusCallback, *,
    size: SizeTarget = DEFAULT_SIZE, tune: bool = False, noise_correction: bool = True,
) -> QuantizationResult:  # fmt: skip
    """Write `out`, a packed folder of the float model `source`, calibrated by `recipe`, and distilled with `tune`.

    With `noise_correction` one is measured, and kept if pictures come closer to the float model's.

    A layer is on disk as soon as it is finished, in `OUT.work`: stopped in any way, the same call goes on. Raises
    ModelError as `fast.quantize_model` does, and where that folder was begun with another source, recipe or size.
    """
    check_not_existing(out)
    model = open_source(source, options)
    part = model.unet()
    unet = check_unet_tensors(part)
    if size.max_bytes is not None:
        check_target_size(unet, size.max_bytes, recipe.block)
    check_finite(part)
    if size.max_bytes is None:
        say(f"unet: {size}: {describe_size(unet, get_preset_layouts(unet, size.preset))}")
    needs = estimate_calibration_resources(part, unet, model, size, recipe, tune=tune)
    say(f"calibrating on {count_unet_inputs(recipe):,} rows: {needs}")
    check_available_resources(needs, out, device)
    identity = {
        "source": hash_tensors(part.tensors, part.release),
        "recipe": recipe.model_dump(),
        "size": size.to_config(),
    }
    started = time.monotonic()
    return_freed_memory_to_os(unet, size, device)
    with storage_errors(out), open_work_folder(out, identity) as work:
        before = work.load_elapsed_s()
        work.save_level("distill" if tune else "calib")
        with create_folder_atomically(out) as folder:
            write_json(folder / "unet" / "config.json", part.config)
            write_other_components(model, folder, torch.float16, say)
            calibrating, held_out = load_or_generate_trajectories(part, folder, recipe, device, work, say)
            layouts = work.load_or_choose_layouts(lambda: choose_layouts(unet, part, size, recipe, device, calibrating))
            if size.max_bytes is not None:
                say(f"unet: {size}: {describe_size(unet, layouts)}")
            solved = calibrate_layers(part, layouts, recipe, device, calibrating, held_out, work, say)
            tuned = run_distillation(part, folder, recipe, device, calibrating, solved, say) if tune else None
            if tuned is None:
                write_calibrated_unet(
                    part, folder / "unet", layouts, solved, {}, {"level": "calib", **size.to_config()}
                )
            else:
                notes = {"level": "distill", **size.to_config()}
                write_calibrated_unet(part, folder / "unet", layouts, tuned.layers, tuned.norms, notes)
            judged = (
                try_noise_correction(folder, recipe, device, calibrating, held_out, say) if noise_correction else None
            )
        seconds = before + time.monotonic() - started
        report_ignored_tensors(model, say)
        made = QuantizationResult({name: one.sqnr_db for name, one in solved.items()}, held_out, seconds, judged)
        work.remove()
    return made


def load_or_generate_trajectories(
    part: SourceComponent, folder: Path, recipe: Recipe, device: torch.device, work: WorkFolder, say: StatusCallback
) -> tuple[Trajectories, Trajectories]:
    """The float model's trajectories, of the calibration prompts and of the held-out ones."""
    walker = SegmentedUNet(part.config, part.tensors, device, part.release)

    def drawn(name: str, prompts: list[str], make: Callable[[], Trajectories]) -> Trajectories:
        say(f"drawing {len(prompts):,} {name} prompts in {recipe.steps} steps by the float model")
        return work.load_or_generate_trajectories(name, make)

    calibrating = drawn(
        "calibration",
        recipe.prompts,
        lambda: generate_trajectories(walker, folder, recipe, recipe.prompts, recipe.seed),
    )
    return calibrating, drawn(
        "held-out", recipe.held_out, lambda: generate_held_out_trajectories(walker, folder, recipe)
    )


def choose_layouts(
    unet: nn.Module,
    part: SourceComponent,
    size: SizeTarget,
    recipe: Recipe,
    device: torch.device,
    calibrating: Trajectories,
) -> dict[str, Layout]:
    """How the layers are stored; to meet a size, by their errors on some rows of the float model."""
    if size.max_bytes is None:
        return get_preset_layouts(unet, size.preset)
    walker = SegmentedUNet(part.config, part.tensors, device, part.release)
    rows = select_spaced_inputs(calibrating, recipe.points)
    some = torch.linspace(0, len(rows.times) - 1, min(ALLOCATION_INPUTS, len(rows.times))).long()
    names = list(get_preset_layouts(unet, SMALLEST_PRESET))
    inputs = iter_layer_inputs(walker, UNetInputs(rows.latents[some], rows.times[some], rows.context[some]), names)
    return allocate_bits(unet, part.tensors, size.max_bytes, ((name, x.cpu()) for name, x in inputs), recipe.block)


def calibrate_layers(
    part: SourceComponent, layouts: Mapping[str, Layout], recipe: Recipe, device: torch.device, calibrating: Trajectories,
    held_out: Trajectories, work: WorkFolder, say: StatusCallback,
) -> dict[str, CalibratedLayer]:  # fmt: skip
    """All layers; what an earlier run finished is taken over."""
    source, target = (SegmentedUNet(part.config, part.tensors, device, part.release) for _ in range(2))
    known = work.load_layers(layouts)
    if known:
        say(f"going on: {len(known):,} of {len(layouts):,} layers are there")
    else:
        say(f"calibrating the {len(layouts):,} layers")
    speed = measure_device_speed(device)
    seconds = {name: effort.duration_s(speed) for name, effort in estimate_layer_costs(part, layouts, recipe).items()}
    progress = CalibrationProgress(seconds, work, say, set(known), work.load_elapsed_s())
    tuning, calibrating_rows = split_off_tuning_inputs(
        select_spaced_inputs(calibrating, recipe.points), 2 * recipe.points
    )
    dtype = choose_state_dtype(part, recipe)
    rows = [
        *make_state_pairs(calibrating_rows, device, "moments", dtype),
        *make_state_pairs(tuning, device, "tuning", dtype),
        *make_state_pairs(select_spaced_inputs(held_out, HELD_OUT_POINTS), device, "held out", dtype),
    ]
    run = LayerwiseCalibration(source, target, layouts, recipe, known, progress.record_layer)
    run.run(rows)
    return run.calibrated_layers


def split_off_tuning_inputs(rows: UNetInputs, of_a_prompt: int) -> tuple[UNetInputs, UNetInputs]:
    """The rows of prompts that are set apart, and the others."""
    chosen = tuning_prompt_mask(torch.arange(len(rows.latents)) // of_a_prompt)
    first, others = (UNetInputs(rows.latents[at], rows.times[at], rows.context[at]) for at in (chosen, ~chosen))
    return first, others


def make_state_pairs(rows: UNetInputs, device: torch.device, use: DataSplit, dtype: torch.dtype) -> Iterator[StatePair]:
    """Rows on their way, some together."""
    step = segment_batch_size(rows.latents)
    for parts in zip(*(torch.split(one, step) for one in (rows.latents, rows.times, rows.context)), strict=True):
        if len(parts[0]):
            state = ForwardState.from_inputs(*(part.to(device) for part in parts))
            yield StatePair(state, state.copy(), use, dtype)


def run_distillation(
    part: SourceComponent, folder: Path, recipe: Recipe, device: torch.device, drawn: Trajectories, solved: Mapping[str, CalibratedLayer],
    say: StatusCallback,
) -> DistilledUNet | None:  # fmt: skip
    """Distillation on the calibration prompts' trajectories; None, and a word, where it did not help."""
    alphas = compute_alphas_cumprod(read_noise_schedule(folder / "scheduler" / "scheduler_config.json"))
    sigmas = torch.tensor(((1 - alphas) / alphas) ** 0.5, dtype=torch.float32)
    prompts = torch.arange(len(drawn.context))
    chosen = tuning_prompt_mask(prompts)
    examples, tuning = (DistillationExamples.from_trajectories(drawn, prompts[at], sigmas) for at in (~chosen, chosen))
    if not len(tuning.times):
        raise UsageError(
            f"distill needs {TUNING_PROMPT_INTERVAL // 2 + 1} prompts in the recipe or more; it has {len(prompts)}"
        )
    tuned = distill_unet(part, solved, examples, tuning, recipe, device, say)
    if tuned is None:
        say("tuning did not help; what calibration found is kept")
    return tuned


def try_noise_correction(
    folder: Path,
    recipe: Recipe,
    device: torch.device,
    calibrating: Trajectories,
    held_out: Trajectories,
    say: StatusCallback,
) -> CorrectionEvaluation:
    """Correct the noise of the finished folder if that helps: fitted on the prompts that did not calibrate layers."""
    prompts = torch.arange(len(calibrating.context))
    apart = prompts[tuning_prompt_mask(prompts)]
    say("measuring a noise correction")
    drawn = calibrating.select(apart) if len(apart) else calibrating
    judged = add_noise_correction(folder, drawn, held_out, recipe.seed + HELD_OUT_SEED_OFFSET, recipe.scale, device)
    say(f"noise correction: {judged}")
    return judged


def write_calibrated_unet(
    part: SourceComponent, folder: Path, layouts: Mapping[str, Layout], solved: Mapping[str, CalibratedLayer],
    changed: Mapping[str, Tensor], notes: Mapping[str, Any],
) -> None:  # fmt: skip
    """The packed UNet: what calibration made, tensors that distillation changed, and the rest as float16."""
    shapes = {name: tuple(part.tensors[f"{name}.weight"].shape) for name in solved}
    others = {
        name: changed.get(name, convert_for_storage(name, value, torch.float16, part.path))
        for name, value in part.tensors.items()
        if name.removesuffix(".weight") not in solved
    }
    others |= {f"{name}.bias": one.bias for name, one in solved.items() if one.bias is not None}
    packed = {name: (one.weight.convert_to(layouts[name]), shapes[name]) for name, one in solved.items()}
    write_packed_unet(folder, part.config, packed, others, notes)


# What is left


@dataclass(slots=True)
class CalibrationProgress:
    """Keeps each finished layer, and tells now and then how long the others will take."""

    estimated_s: dict[str, float]  # seconds of each layer
    work: WorkFolder
    say: StatusCallback
    done: set[str]
    earlier_s: float  # seconds that earlier runs took
    started: float = field(default_factory=time.monotonic)
    reported_at: float = 0.0
    completed_s: float = 0.0  # of these, by what this run did

    def record_layer(self, name: str, solved: CalibratedLayer) -> None:
        self.work.save_layer(name, solved)
        self.done.add(name)
        self.completed_s += self.estimated_s[name]
        now = time.monotonic()
        self.work.save_elapsed_s(self.earlier_s + now - self.started)
        if now - self.reported_at >= PROGRESS_INTERVAL_S or len(self.done) == len(self.estimated_s):
            self.reported_at = now
            left = sum(each for other, each in self.estimated_s.items() if other not in self.done)
            seconds = (now - self.started) / self.completed_s * left
            self.say(
                f"{len(self.done):,} of {len(self.estimated_s):,} layers, about {format_hms(seconds)} left; "
                f"{name}: {solved.sqnr_db:.1f} dB"
            )


def format_hms(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
