"""How a batch fits a budget of device memory: what stays there, what passes through, how large the parts of work are.

What the work itself takes is found by doing it on the meta device, where tensors have sizes and nothing else: every
tensor that is alive at a time counts, and the largest sum is the peak. Weights are counted as `residency` places them.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from tinysd_batch.errors import ModelError, UsageError
from tinysd_batch.model.chunking import SMALL_BYTES, SMALLEST_BYTES, USUAL_BYTES, in_parts_of
from tinysd_batch.model.device.cuda_overhead import allocating_at_most, overhead
from tinysd_batch.model.device.malloc import hand_back_blocks_of
from tinysd_batch.model.nn.unet import predict
from tinysd_batch.model.nn.vae_decoder import decode_one
from tinysd_batch.model.offload.peak_memory import LivePeak
from tinysd_batch.model.offload.planned_model import PlannedModel
from tinysd_batch.model.offload.stage_estimate import UNET, Phase, Shape, Task, Way, kept_type
from tinysd_batch.model.packed.dequantize import SCRATCH, foretold_for
from tinysd_batch.model.packed.layers import packed_layers, scratch_bytes

# What cuBLAS may take on every card in place of its own choice: what it takes on those up to Ampere.
WORKSPACE_CONFIG, SMALL_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8"
# What torch's allocator leaves unused on a card: of what work takes so much as a rule, doubled up to the most where
# memory ran out; and a segment of its size for tensors of 1 to 10 MB, of which it takes whole ones only. Weights lie in
# one piece.
GAPS, MOST_GAPS, SEGMENT_BYTES = 1 / 8, 1 / 2, 20 * 2**20
# On the CPU larger tensors take memory of the system's own. What a step at 512x512 uses is worth keeping for the next.
BLOCK_BYTES, STEP_BLOCK_BYTES, TIGHT_BLOCK_BYTES = 2**22, 2**23, 2**17
META = torch.device("meta")
KNOWN_WORK: dict[tuple[Any, ...], int] = {}  # some integers for each model, shape and way that this process met


class Planner:
    """Chooses the way of each phase of a model."""

    def __init__(self, model: PlannedModel, budget_bytes: int | None) -> None:
        self.model = model
        self.budget_bytes = budget_bytes
        if budget_bytes is not None and model.device.type == "cuda":
            os.environ.setdefault(WORKSPACE_CONFIG, SMALL_WORKSPACE)  # read when cuBLAS first works
        self.overhead = overhead(model.device, model.dtype)
        self.context = self.overhead.context + self.overhead.workspace
        self.gaps, self.segment = (GAPS, SEGMENT_BYTES) if model.device.type == "cuda" else (0.0, 0)
        self.most_part_bytes = USUAL_BYTES  # ways of larger parts are passed over
        self.known: dict[tuple[Any, ...], Phase] = {}

    @property
    def own_bytes(self) -> int | None:
        """What torch may take of a card within the budget."""
        return None if self.budget_bytes is None else max(0, self.budget_bytes - self.overhead.context)

    def check_budget(self) -> None:
        """Raises ModelError where not even one image of the model's own size fits."""
        side = self.model.info.native_px
        try:
            self.phases(Shape(1, side, side, self.model.info.max_tokens))
        except UsageError as error:
            hint = "; leave turbo out" if any(layer.keeps_unpacked for layer in packed_layers(self.model.unet)) else ""
            raise ModelError(f"{error}{hint}") from None

    def leave_larger_gaps(self) -> bool:
        """In what is planned from now on, since they were too small; False where there is no more to be done."""
        if self.own_bytes is None or not 0 < self.gaps < MOST_GAPS:
            return False
        self.gaps *= 2
        self.known.clear()
        return True

    def phases(self, shape: Shape) -> list[Phase]:
        """All three, measured even where there is no budget. Raises UsageError as `phase` does."""
        return [self.phase(task, measured=True) for task in self.tasks(shape)]

    def least(self, shape: Shape) -> int:
        """The smallest budget in which such a batch can be drawn."""
        return max(min(one.peak for one in self.candidates(task, 0)) for task in self.tasks(shape))

    def tasks(self, shape: Shape) -> list[Task]:
        return [self.encoding(), self.denoising(shape), self.decoding(shape)]

    def encoding(self) -> Task:
        model = self.model

        def run(_: Way) -> None:
            model.text_encoder(torch.zeros(1, model.info.max_tokens, dtype=torch.long))

        return Task("text encoder", (model.text_fragment,), None, [Way()], run)

    def denoising(self, shape: Shape) -> Task:
        model = self.model
        most = min(model.unet_bs or shape.rows, shape.rows)
        fewer = [rows for power in range(most.bit_length()) if (rows := most >> power) < most]
        ways = [Way(USUAL_BYTES, most), *(Way(SMALL_BYTES, rows) for rows in (most, *fewer)), Way(SMALLEST_BYTES, 1)]

        def run(way: Way) -> None:
            rows = min(shape.rows, 2 * way.rows) if way.rows else shape.rows  # more would only repeat themselves
            latents = torch.empty(rows, model.info.channels, *self.latent_size(shape))
            model.hoisted.pretend(shape.prompts, shape.tokens, model.dtype)
            predict(model.unet, latents, torch.zeros(rows, dtype=torch.long), way.rows, model.dtype)
            model.hoisted.forget()

        return Task(UNET, (model.encode_fragment, model.decode_fragment), shape, ways, run)

    def decoding(self, shape: Shape) -> Task:
        model = self.model

        def run(way: Way) -> None:
            latents = torch.empty(1, model.info.channels, *self.latent_size(shape), dtype=model.dtype)
            decode_one(model.vae, latents, kept_type(way), makes_anew=way.makes_anew).float()

        ways = [Way(), Way(SMALL_BYTES), *(Way(nbytes, half_maps=True) for nbytes in (SMALL_BYTES, SMALLEST_BYTES))]
        ways.append(Way(SMALLEST_BYTES, half_maps=True, makes_anew=True))
        return Task("VAE decoder", (model.vae_fragment,), replace(shape, rows=1, tokens=0, prompts=0), ways, run)

    def latent_size(self, shape: Shape) -> tuple[int, int]:
        return shape.height // self.model.info.factor, shape.width // self.model.info.factor

    def phase(self, task: Task, *, measured: bool = False) -> Phase:
        """The first way with all weights on the device; else the first that fits while some pass through.

        Without a budget there is nothing to choose, and what the work takes is found only if it is to be `measured`.
        Raises UsageError where no way fits, with the least that would do.
        """
        if self.budget_bytes is None and not measured:
            weights = sum(part.nbytes for part in task.fragments)
            return Phase(task.name, task.fragments, self.ways(task)[0], None, weights, weights, 0, 0, self.context)
        model = self.model
        settings = model.unet_bs, model.attention.fused, model.residency.streams_all, self.most_part_bytes
        key = task.name, task.shape, model.dtype, *settings
        if key not in self.known:
            self.known[key] = self.first_that_fits(task)
        return self.known[key]

    def first_that_fits(self, task: Task) -> Phase:
        budget = self.budget_bytes
        tight: list[Phase] = []
        for phase in self.candidates(task, budget):
            fits_whole = budget is None or (phase.staying == phase.weights and phase.peak <= budget)
            if fits_whole and not phase.way.makes_anew:  # more work, where weights pass only once a picture
                return phase
            tight.append(phase)
        assert budget is not None, task.name
        least = min(tight, key=lambda phase: phase.peak)
        usual = least.peak - int(max(0, self.gaps - GAPS) * least.work)  # with gaps as a rule
        if usual > budget:
            what = f"drawing {task.shape.width}x{task.shape.height}" if task.shape else "reading a prompt"
            raise UsageError(
                f"vram_budget = {budget / 1e6:.1f} MB: {what} takes at least {usual / 1e6:.1f} MB with this model, "
                f"in the {task.name}, even when weights pass through the smallest buffers"
            )
        return next((phase for phase in tight if phase.peak <= budget), least)

    def candidates(self, task: Task, budget: int | None) -> Iterator[Phase]:
        """The ways of a task, with as many weights on the device as the budget leaves room for."""
        weights = sum(part.nbytes for part in task.fragments)
        for way in self.ways(task):
            work = self.work(task, way)
            segments = self.segment * (2 if task.name == UNET else 1)  # a step that is captured has its own
            room = None
            if budget is not None:
                room = max(0, int(budget - self.context - segments - work * (1 + self.gaps)))
            staying, buffers = self.model.residency.placed(task.fragments, room)
            gaps = segments + int(self.gaps * work)
            yield Phase(task.name, task.fragments, way, room, weights, staying, buffers, work, self.context, gaps)

    def ways(self, task: Task) -> Sequence[Way]:
        return [way for way in task.ways if way.part_bytes <= self.most_part_bytes] or task.ways

    def work(self, task: Task, way: Way) -> int:
        """The most that tensors take besides weights."""
        model = self.model
        kept = any(layer.keeps_unpacked for layer in packed_layers(model.unet))
        device = model.device.type  # which decides how weights are unpacked
        key = model.info.digest, device, task.name, task.shape, way, model.dtype, model.attention.fused, kept
        if key not in KNOWN_WORK:
            KNOWN_WORK[key] = self.measure(task, way)
        return KNOWN_WORK[key]

    def measure(self, task: Task, way: Way) -> int:
        for fragment in task.fragments:
            fragment.pretend()
        SCRATCH.release(META)
        try:
            with (
                torch.no_grad(), foretold_for(self.model.device), META, in_parts_of(way.part_bytes), LivePeak() as live,
            ):  # fmt: skip
                live.leave_out(tensor.place for part in task.fragments for tensor in part.host)
                task.run(way)
        finally:
            for fragment in task.fragments:
                fragment.offload()
        return int(live.peak)

    @contextlib.contextmanager
    def working(self, phase: Phase) -> Iterator[Way]:
        """The phase's fragments can be computed with, in its way."""
        self.model.residency.room = phase.room
        if self.model.device.type == "cpu" and not self.model.info.is_small:
            usual = STEP_BLOCK_BYTES if phase.name == UNET else BLOCK_BYTES
            hand_back_blocks_of(usual if self.budget_bytes is None else TIGHT_BLOCK_BYTES)
        try:
            with self.limited(), in_parts_of(phase.way.part_bytes):
                self.reserve(phase)
                with self.model.residency.holding(*phase.fragments):
                    yield phase.way
        finally:
            SCRATCH.release(self.model.device)

    def reserve(self, phase: Phase) -> None:
        """On a card, room to unpack in, before anything else can leave but parts of its memory free."""
        model = self.model
        if phase.name == UNET and model.device.type == "cuda":
            SCRATCH.output(1, scratch_bytes(model.unet, model.dtype), torch.uint8, model.device)

    def set_aside(self, phase: Phase) -> None:
        """Take what the phase still needs in one piece, and free it: a graph's memory is cut from it then.

        Else each large tensor would have a segment of its own, into which few others fit, and none goes back.
        """
        if self.own_bytes is not None:
            device, alive = self.model.device, phase.staying + phase.buffers + phase.work + self.overhead.workspace
            torch.empty(max(0, alive - torch.cuda.memory_allocated(device)), dtype=torch.uint8, device=device)

    @contextlib.contextmanager
    def capturing(self, phase: Phase, steps: int) -> Iterator[None]:
        """A step after so many is captured as a graph, which has memory of its own for its work."""
        self.set_aside(phase)
        with self.model.residency.capturing(steps):
            yield

    @contextlib.contextmanager
    def limited(self) -> Iterator[None]:
        """Torch takes no more of a card than the budget allows: libraries choose ways of work that do with it."""
        device = self.model.device
        if self.own_bytes is None or device.type != "cuda":
            yield
            return
        torch.cuda.empty_cache()  # what earlier phases took
        with allocating_at_most(self.own_bytes, device):
            yield
