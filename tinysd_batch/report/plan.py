"""What a job would do, found out without loading the model: rows, images, faults, tokens, disk."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console

from tinysd_batch.config import Settings
from tinysd_batch.job.columns import near_misses
from tinysd_batch.job.driver import read_finished
from tinysd_batch.job.folder import JOB_FILE, Job
from tinysd_batch.job.plan import cut_batches, plan_images
from tinysd_batch.job.results import fault_message
from tinysd_batch.job.reuse import count_reusable
from tinysd_batch.model.prompts import SubPrompt, parse_prompt
from tinysd_batch.model.tokens import TokenizedPrompt, read_tokenizer, tokenize_prompt
from tinysd_batch.records import InvalidRow, Row
from tinysd_batch.report.memory import Batch, MemoryPlan, plan_memory
from tinysd_batch.report.text import count, one_line, row_label, say, size

MAX_FAULTS = 1000  # kept for --json
WIDEST_NAME = 14
SHOWN = 10  # faults, cut prompts and weighted prompts, unless all are asked for
# As the embedded model's drawings come out, lossy ones at quality 90: a guess for other models, and said with "some".
BYTES_PER_PIXEL = {"png": 1.8, "jpg": 0.6, "webp": 0.4}
BYTES_PER_ROW = 2500  # what is written into a picture, and its row of the table


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """A row that can be made, as the model will take it."""

    row: Row
    prompt: list[SubPrompt]
    tokens: TokenizedPrompt
    negative_tokens: TokenizedPrompt

    def line(self) -> str:
        """`row 3: 4 images, 5 tokens: tabby cat (0.125) + white duck (0.375) + hybrid (0.5)`"""
        images = count(self.row.n_iter * self.row.n_samples, "image")
        told = f"row {self.row.number}: {images}, {count(self.tokens.n_tokens, 'token')}: {weights_line(self.prompt)}"
        if cut := self.tokens.truncated:
            told += f"; cut off: {one_line(cut, 80)}"
        return told

    @property
    def is_marked(self) -> bool:
        """Whether its prompt has weights or emphasis."""
        return len(self.prompt) > 1 or any(run.emphasis != 1 for run in self.prompt[0].runs)


@dataclass(slots=True)
class Plan:
    """What `plan` says."""

    rows: int = 0
    invalid_rows: int = 0
    images: int = 0
    batches: int = 0
    finished: int = 0  # images that an earlier run made
    reusable: int = 0  # others that the job named by --reuse has
    largest: Batch | None = None  # the most that is drawn at once
    memory: MemoryPlan | None = None
    sizes: Counter[str] = field(default_factory=Counter)
    samplings: Counter[str] = field(default_factory=Counter)
    longest_prompt_tokens: int = 0
    token_limit: int = 0
    cut_rows: int = 0  # rows with a prompt or a negative prompt that the model does not see all of
    weighted_rows: int = 0
    disk_bytes: int = 0
    free_bytes: int = 0
    carried_columns: list[str] = field(default_factory=list)
    near_misses: dict[str, str] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)  # row number -> what is wrong with it, the first 1000

    @property
    def fits_disk(self) -> bool:
        return self.disk_bytes <= self.free_bytes


def make_plan(job: Job, on_row: Callable[[PlannedRow | InvalidRow], None]) -> Plan:
    """Read the whole manifest, and tell of each row. Raises ManifestError for faults of the whole file."""
    plan = Plan(token_limit=job.model.max_tokens - 2, free_bytes=free_bytes(job.folder))
    carried: dict[str, None] = {}
    reader = PromptReader(job)

    def rows() -> Iterator[Row]:
        for row in job.read_rows():
            plan.rows += 1
            carried.update(dict.fromkeys(row.extra))
            if isinstance(row, InvalidRow):
                plan.invalid_rows += 1
                if len(plan.faults) < MAX_FAULTS:
                    plan.faults[row.number] = fault_message(row)
                on_row(row)
            else:
                planned = reader.read(row)
                add_row(plan, planned, job.settings)
                on_row(planned)
                yield row

    finished = read_finished(job).images if (job.folder / JOB_FILE).exists() else set()
    plan.finished = len(finished)
    wanted: set[str] = set()
    for batch in cut_batches(plan_images(rows(), job.common()), (), job.settings.max_batch):
        plan.batches += 1
        if job.reuse is not None:
            wanted.update(image.image_id for image in batch.images if image.index not in finished)
    plan.reusable = count_reusable(job, wanted)
    plan.disk_bytes = round(plan.disk_bytes * (1 - (plan.finished + plan.reusable) / max(plan.images, 1)))
    plan.memory = plan_memory(job.settings, plan.largest) if plan.largest else None
    plan.carried_columns = list(carried)
    plan.near_misses = near_misses(carried)
    return plan


class PromptReader:
    """Counts tokens; prompts that come again are read once."""

    def __init__(self, job: Job) -> None:
        tokenizer = read_tokenizer(job.model.path / "tokenizer")

        @lru_cache(maxsize=4096)
        def tokenize(prompt: str, syntax: str) -> TokenizedPrompt:
            return tokenize_prompt(
                tokenizer, parse_prompt(prompt, syntax), job.model.max_tokens, long_prompts=job.settings.long_prompts
            )

        self.tokenize = tokenize

    def read(self, row: Row) -> PlannedRow:
        syntax = row.prompt_syntax
        return PlannedRow(
            row, parse_prompt(row.prompt, syntax), self.tokenize(row.prompt, syntax),
            self.tokenize(row.negative_prompt, syntax),
        )  # fmt: skip


def add_row(plan: Plan, planned: PlannedRow, settings: Settings) -> None:
    params = planned.row.params
    images = planned.row.n_iter * planned.row.n_samples
    plan.images += images
    together = max(planned.row.n_samples, settings.max_batch or 1)
    batch = Batch(together, params.width, params.height, planned.row.scale != 1)
    plan.largest = max(plan.largest or batch, batch, key=lambda one: one.rows * one.width * one.height)
    plan.sizes[f"{params.width}x{params.height}"] += images
    plan.samplings[f"{params.sampler}, {count(params.steps, 'step')}"] += images
    plan.longest_prompt_tokens = max(plan.longest_prompt_tokens, planned.tokens.n_tokens)
    plan.cut_rows += bool(planned.tokens.truncated or planned.negative_tokens.truncated)
    plan.weighted_rows += planned.is_marked
    pixels = 0 if settings.skip_save else params.width * params.height
    plan.disk_bytes += round(images * (pixels * BYTES_PER_PIXEL[settings.format] + BYTES_PER_ROW))


def free_bytes(folder: Path) -> int:
    """Room where the folder is, or will be."""
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    return shutil.disk_usage(there).free


def weights_line(prompt: list[SubPrompt]) -> str:
    """What a prompt's marks came to: `tabby cat (0.25) + white duck (0.75)`, or `a | red x1.1 | apple`."""
    parts = []
    for sub in prompt:
        runs = (
            one_line(run.text.strip(), 100) + (f" x{run.emphasis:.3g}" if run.emphasis != 1 else "") for run in sub.runs
        )
        parts.append(" | ".join(runs) + (f" ({sub.weight:.3g})" if len(prompt) > 1 else ""))
    return " + ".join(parts)


class PlanPrinter:
    """Prints rows worth a look as they are read, all with `verbose`, and at the end what they come to."""

    def __init__(self, console: Console, verbose: bool) -> None:
        self.console = console
        self.verbose = verbose
        self.told: Counter[str] = Counter()

    def row(self, row: PlannedRow | InvalidRow) -> None:
        if isinstance(row, InvalidRow):
            self.say("fault", f"{row_label(row.number, row.line)} cannot be made: {one_line(row.reason, 400)}")
        elif row.tokens.truncated or row.negative_tokens.truncated:
            self.say("cut", row.line())
        elif row.is_marked:
            self.say("marked", row.line())
        else:
            self.say("plain", row.line())

    def say(self, kind: str, line: str) -> None:
        self.told[kind] += 1
        if self.verbose or (kind != "plain" and self.told[kind] <= SHOWN):
            say(self.console, line)

    def plan(self, job: Job, plan: Plan) -> None:
        hidden = sum(max(0, number - SHOWN) for kind, number in self.told.items() if kind != "plain")
        if hidden and not self.verbose:
            self.console.print(f"and {hidden:,} more like these; --verbose shows every row")
        lines = {
            "Rows": f"{plan.rows:,}"
            + (f", of which {plan.invalid_rows:,} cannot be made" if plan.invalid_rows else ""),
            "Images": f"{plan.images:,} in {count(plan.batches, 'batch', 'batches')}"
            + (f"; {plan.finished:,} are there already" if plan.finished else "")
            + reuse_words(job, plan),
            "Model": f"{job.model.name}, digest {job.model.digest[:10]}",
            "Sizes": told(plan.sizes),
            "Sampling": told(plan.samplings),
            "Tokens": f"{plan.longest_prompt_tokens:,} in the longest prompt, the model takes {plan.token_limit}"
            + tokens_advice(plan, job.settings),
            "Weighted": count(plan.weighted_rows, "row"),
            "Disk": f"some {size(plan.disk_bytes)} to be written, {size(plan.free_bytes)} free"
            + ("" if plan.fits_disk else ": not enough"),
            **(plan.memory.lines() if plan.memory else {}),
        }
        if plan.carried_columns:
            lines["Carried"] = ", ".join(
                one_line(name, 40) + (f" (did you mean {plan.near_misses[name]}?)" if name in plan.near_misses else "")
                for name in plan.carried_columns[:SHOWN]
            ) + (f" and {len(plan.carried_columns) - SHOWN:,} more" if len(plan.carried_columns) > SHOWN else "")
        lines["Job folder"] = str(job.folder)
        for name, line in lines.items():
            say(self.console, f"{name:<{WIDEST_NAME}} {line}")


def reuse_words(job: Job, plan: Plan) -> str:
    if job.reuse is None:
        return ""
    left = plan.images - plan.finished - plan.reusable
    return f"; {plan.reusable:,} can be reused from {job.reuse}, {left:,} are to be drawn"


def told(counter: Counter[str]) -> str:
    """The most frequent first."""
    shown = [f"{name} ({number:,})" if len(counter) > 1 else name for name, number in counter.most_common(SHOWN)]
    return ", ".join(shown) + (f" and {len(counter) - SHOWN:,} more" if len(counter) > SHOWN else "")


def tokens_advice(plan: Plan, settings: Settings) -> str:
    if settings.long_prompts:
        return " at a time"
    return f"; {count(plan.cut_rows, 'row')} will be cut, --long-prompts keeps all" if plan.cut_rows else ""


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    told = {each.name: getattr(plan, each.name) for each in fields(plan) if each.name not in ("largest", "memory")}
    return {**told, "fits_disk": plan.fits_disk, "memory": plan.memory.as_dict() if plan.memory else None}
