"""Levels `calib` and `distill`: quantize a UNet with the float model's own trajectories as calibration data.

This takes minutes to hours, and needs no data set: the prompts of a recipe are enough.
"""

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
from tinysd_batch.quantize.sources.formats import open_source
from tinysd_batch.storage.atomic import create_folder_atomically
from tinysd_batch.storage.filesystem import storage_errors

PROGRESS_INTERVAL_S = 10.0
ALLOCATION_INPUTS = 16  # UNet inputs on which to compare layouts
DEFAULT_SIZE = SizeTarget()


def quantize_with_calibration(
    source: Path,
    out: Path,
    options: SourceOptions,
    recipe: Recipe,
    device: torch.device,
    on_status: StatusCallback,
    *,
    size: SizeTarget = DEFAULT_SIZE,
    distill: bool = False,
    noise_correction: bool = True,
) -> QuantizationResult:
    """Write `out`, a packed model folder of the float model `source`, calibrated by `recipe`.

    Each layer is saved in `OUT.work` as soon as it is finished. After an interruption of any kind the same call
    continues there.

    Args:
        source: A checkpoint file or a diffusers folder.
        out: The folder to write; it must not exist.
        options: How to read the source.
        recipe: Prompts, steps and effort.
        device: Where to compute.
        on_status: Called with one line of text for each step of the work.
        size: A preset, or the largest size of the UNet's file.
        distill: Also train scales, offsets, biases and norms on the float model's predictions.
        noise_correction: Fit a noise correction, and keep it if images come closer to the float model's.

    Raises:
        ModelError: As in `data_free.quantize_model`, or the work folder was started with another source, recipe or
            size.
    """
    check_not_existing(out)
    model = open_source(source, options)
    component = model.unet()
    unet = check_unet_tensors(component)
    if size.max_bytes is not None:
        check_target_size(unet, size.max_bytes, recipe.block)
    check_finite(component)
    if size.max_bytes is None:
        on_status(f"unet: {size}: {describe_size(unet, get_preset_layouts(unet, size.preset))}")
    resources = estimate_calibration_resources(component, unet, model, size, recipe, distill=distill)
    on_status(f"calibrating on {count_unet_inputs(recipe):,} UNet inputs: {resources}")
    check_available_resources(resources, out, device)
    identity = {
        "source": hash_tensors(component.tensors, component.release),
        "recipe": recipe.model_dump(),
        "size": size.to_config(),
    }
    started = time.monotonic()
    return_freed_memory_to_os(unet, size, device)
    with storage_errors(out), open_work_folder(out, identity) as work:
        earlier_s = work.load_elapsed_s()
        work.save_level("distill" if distill else "calib")
        with create_folder_atomically(out) as folder:
            write_json(folder / "unet" / "config.json", component.config)
            write_other_components(model, folder, torch.float16, on_status)
            calibration, held_out = load_or_generate_trajectories(component, folder, recipe, device, work, on_status)
            layouts = work.load_or_choose_layouts(
                lambda: choose_layouts(unet, component, size, recipe, device, calibration)
            )
            if size.max_bytes is not None:
                on_status(f"unet: {size}: {describe_size(unet, layouts)}")
            layers = calibrate_layers(component, layouts, recipe, device, calibration, held_out, work, on_status)
            sqnr_db = {name: layer.sqnr_db for name, layer in layers.items()}
            level = "calib"
            norms: dict[str, Tensor] = {}
            if distill:
                distilled = run_distillation(component, folder, recipe, device, calibration, layers, on_status)
                if distilled is not None:
                    level, layers, norms = "distill", distilled.layers, distilled.norms
            notes = {"level": level, **size.to_config()}
            write_calibrated_unet(component, folder / "unet", layouts, layers, norms, notes)
            correction = None
            if noise_correction:
                correction = try_noise_correction(folder, recipe, device, calibration, held_out, on_status)
        elapsed_s = earlier_s + time.monotonic() - started
        report_ignored_tensors(model, on_status)
        work.remove()
    return QuantizationResult(sqnr_db, held_out, elapsed_s, correction)


def load_or_generate_trajectories(
    component: SourceComponent,
    folder: Path,
    recipe: Recipe,
    device: torch.device,
    work: WorkFolder,
    on_status: StatusCallback,
) -> tuple[Trajectories, Trajectories]:
    """Return the float model's trajectories for the calibration prompts, and for the held-out prompts."""
    unet = SegmentedUNet(component.config, component.tensors, device, component.release)

    def load_or_generate(name: str, prompts: list[str], generate: Callable[[], Trajectories]) -> Trajectories:
        on_status(f"generating {len(prompts):,} {name} prompts in {recipe.steps} steps with the float model")
        return work.load_or_generate_trajectories(name, generate)

    calibration = load_or_generate(
        "calibration", recipe.prompts, lambda: generate_trajectories(unet, folder, recipe, recipe.prompts, recipe.seed)
    )
    held_out = load_or_generate(
        "held-out", recipe.held_out, lambda: generate_held_out_trajectories(unet, folder, recipe)
    )
    return calibration, held_out


def choose_layouts(
    unet: nn.Module,
    component: SourceComponent,
    size: SizeTarget,
    recipe: Recipe,
    device: torch.device,
    calibration: Trajectories,
) -> dict[str, Layout]:
    """Choose how to store each layer: by the preset, or, to meet a size, by layer errors on some calibration inputs."""
    if size.max_bytes is None:
        return get_preset_layouts(unet, size.preset)
    float_unet = SegmentedUNet(component.config, component.tensors, device, component.release)
    inputs = select_spaced_inputs(calibration, recipe.points)
    count = len(inputs.times)
    chosen = torch.linspace(0, count - 1, min(ALLOCATION_INPUTS, count)).long()
    names = list(get_preset_layouts(unet, SMALLEST_PRESET))
    layer_inputs = iter_layer_inputs(float_unet, inputs.select(chosen), names)
    on_host = ((name, x.cpu()) for name, x in layer_inputs)
    return allocate_bits(unet, component.tensors, size.max_bytes, on_host, recipe.block)


def calibrate_layers(
    component: SourceComponent,
    layouts: Mapping[str, Layout],
    recipe: Recipe,
    device: torch.device,
    calibration: Trajectories,
    held_out: Trajectories,
    work: WorkFolder,
    on_status: StatusCallback,
) -> dict[str, CalibratedLayer]:
    """Calibrate all layers, except those that an earlier run has finished."""
    float_unet, quantized_unet = (
        SegmentedUNet(component.config, component.tensors, device, component.release) for _ in range(2)
    )
    finished = work.load_layers(layouts)
    if finished:
        on_status(f"resuming: {len(finished):,} of {len(layouts):,} layers are finished")
    else:
        on_status(f"calibrating {len(layouts):,} layers")
    speed = measure_device_speed(device)
    costs = estimate_layer_costs(component, layouts, recipe)
    estimated_s = {name: cost.duration_s(speed) for name, cost in costs.items()}
    progress = CalibrationProgress(estimated_s, work, on_status, set(finished), work.load_elapsed_s())
    tuning_inputs, moment_inputs = split_off_tuning_inputs(
        select_spaced_inputs(calibration, recipe.points), 2 * recipe.points
    )
    dtype = choose_state_dtype(component, recipe)
    pairs = [
        *make_state_pairs(moment_inputs, device, "moments", dtype),
        *make_state_pairs(tuning_inputs, device, "tuning", dtype),
        *make_state_pairs(select_spaced_inputs(held_out, HELD_OUT_POINTS), device, "held out", dtype),
    ]
    run = LayerwiseCalibration(float_unet, quantized_unet, layouts, recipe, finished, progress.record_layer)
    run.run(pairs)
    return run.calibrated_layers


def split_off_tuning_inputs(inputs: UNetInputs, inputs_per_prompt: int) -> tuple[UNetInputs, UNetInputs]:
    """Return the inputs of the tuning prompts, and those of all others."""
    is_tuning = tuning_prompt_mask(torch.arange(len(inputs.latents)) // inputs_per_prompt)
    return inputs.select(is_tuning), inputs.select(~is_tuning)


def make_state_pairs(
    inputs: UNetInputs, device: torch.device, split: DataSplit, dtype: torch.dtype
) -> Iterator[StatePair]:
    """Yield states at the start of both UNets, in batches of a segment's size."""
    batch_size = segment_batch_size(inputs.latents)
    batches = zip(*(torch.split(x, batch_size) for x in (inputs.latents, inputs.times, inputs.context)), strict=True)
    for latents, times, context in batches:
        if len(latents):
            state = ForwardState.from_inputs(latents.to(device), times.to(device), context.to(device))
            yield StatePair(state, state.copy(), split, dtype)


def run_distillation(
    component: SourceComponent,
    folder: Path,
    recipe: Recipe,
    device: torch.device,
    calibration: Trajectories,
    layers: Mapping[str, CalibratedLayer],
    on_status: StatusCallback,
) -> DistilledUNet | None:
    """Distill on the trajectories of the calibration prompts; return None, and report it, if that does not help."""
    alphas = compute_alphas_cumprod(read_noise_schedule(folder / "scheduler" / "scheduler_config.json"))
    sigmas = torch.tensor(((1 - alphas) / alphas) ** 0.5, dtype=torch.float32)
    prompts = torch.arange(len(calibration.context))
    is_tuning = tuning_prompt_mask(prompts)
    training, tuning = (
        DistillationExamples.from_trajectories(calibration, prompts[mask], sigmas) for mask in (~is_tuning, is_tuning)
    )
    if not len(tuning.times):
        raise UsageError(
            f"distill needs {TUNING_PROMPT_INTERVAL // 2 + 1} prompts in the recipe or more; it has {len(prompts)}"
        )
    distilled = distill_unet(component, layers, training, tuning, recipe, device, on_status)
    if distilled is None:
        on_status("distillation did not help; the calibrated weights are kept")
    return distilled


def try_noise_correction(
    folder: Path,
    recipe: Recipe,
    device: torch.device,
    calibration: Trajectories,
    held_out: Trajectories,
    on_status: StatusCallback,
) -> CorrectionEvaluation:
    """Fit a noise correction to the finished folder, and add it there if it helps on the held-out prompts.

    It is fitted on the tuning prompts, whose inputs did not calibrate layers; without any, on all calibration prompts.
    """
    prompts = torch.arange(len(calibration.context))
    tuning_prompts = prompts[tuning_prompt_mask(prompts)]
    on_status("measuring a noise correction")
    fitted_on = calibration.select(tuning_prompts) if len(tuning_prompts) else calibration
    first_seed = recipe.seed + HELD_OUT_SEED_OFFSET
    evaluation = add_noise_correction(folder, fitted_on, held_out, first_seed, recipe.scale, device)
    on_status(f"noise correction: {evaluation}")
    return evaluation


def write_calibrated_unet(
    component: SourceComponent,
    folder: Path,
    layouts: Mapping[str, Layout],
    layers: Mapping[str, CalibratedLayer],
    norms: Mapping[str, Tensor],
    notes: Mapping[str, Any],
) -> None:
    """Write the packed UNet: calibrated layers, distilled `norms`, and all other tensors of the source as float16."""
    shapes = {name: tuple(component.tensors[f"{name}.weight"].shape) for name in layers}
    others = {
        name: norms.get(name, convert_for_storage(name, value, torch.float16, component.path))
        for name, value in component.tensors.items()
        if name.removesuffix(".weight") not in layers
    }
    others |= {f"{name}.bias": layer.bias for name, layer in layers.items() if layer.bias is not None}
    packed = {name: (layer.weight.convert_to(layouts[name]), shapes[name]) for name, layer in layers.items()}
    write_packed_unet(folder, component.config, packed, others, notes)


@dataclass(slots=True)
class CalibrationProgress:
    """Saves each finished layer, and reports from time to time how long the remaining layers will take."""

    estimated_s: dict[str, float]  # of each layer
    work: WorkFolder
    on_status: StatusCallback
    done: set[str]
    earlier_s: float  # that earlier runs took
    started: float = field(default_factory=time.monotonic)
    reported_at: float = 0.0
    completed_s: float = 0.0  # estimated duration of the layers that this run has finished

    def record_layer(self, name: str, layer: CalibratedLayer) -> None:
        self.work.save_layer(name, layer)
        self.done.add(name)
        self.completed_s += self.estimated_s[name]
        now = time.monotonic()
        self.work.save_elapsed_s(self.earlier_s + now - self.started)
        if now - self.reported_at >= PROGRESS_INTERVAL_S or len(self.done) == len(self.estimated_s):
            self.reported_at = now
            estimated_left_s = sum(seconds for other, seconds in self.estimated_s.items() if other not in self.done)
            left_s = (now - self.started) / self.completed_s * estimated_left_s
            self.on_status(
                f"{len(self.done):,} of {len(self.estimated_s):,} layers, about {format_hms(left_s)} left; "
                f"{name}: {layer.sqnr_db:.1f} dB"
            )


def format_hms(seconds: float) -> str:
    """Format a duration as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
