"""What a job would do, worked out without loading the model: rows, images, faults, tokens, disk, memory, time."""

from collections import Counter

from rich.console import Console

from tinysd_batch.config import Settings
from tinysd_batch.job.state.job import Job
from tinysd_batch.records import InvalidRow
from tinysd_batch.report.formatting import count, one_line, row_label, say, size
from tinysd_batch.report.plan.job_plan import Plan
from tinysd_batch.report.plan.token_counts import PlannedRow
from tinysd_batch.report.reading_progress import ReadingProgress

WIDEST_NAME = 14
MAX_LINE_CHARACTERS = 300  # of a row
SHOWN = 10  # faults, cut prompts and weighted prompts, unless all are asked for


class PlanPrinter:
    """Prints rows worth a look as they are read, all with `verbose`, and at the end what they come to."""

    def __init__(self, console: Console, verbose: bool, progress: ReadingProgress) -> None:
        self.console = console
        self.verbose = verbose
        self.progress = progress
        self.seen: Counter[str] = Counter()
        # A row is a line of a terminal; in a file lines may be longer.
        self.most_characters = console.width if console.is_terminal else MAX_LINE_CHARACTERS

    def row(self, row: PlannedRow | InvalidRow) -> None:
        kind = kind_of(row)
        self.seen[kind] += 1
        if self.verbose or (kind != "plain" and self.seen[kind] <= SHOWN):
            with self.progress.hidden():
                say(self.console, self.line(row))

    def line(self, row: PlannedRow | InvalidRow) -> str:
        if isinstance(row, InvalidRow):
            return f"{row_label(row.number, row.line)} cannot be made: {one_line(row.reason, 400)}"
        return one_line(row.line(), self.most_characters)

    def plan(self, job: Job, plan: Plan) -> None:
        hidden = sum(max(0, number - SHOWN) for kind, number in self.seen.items() if kind != "plain")
        if hidden and not self.verbose:
            say(self.console, f"and {hidden:,} more like these; --verbose shows every row")
        for note in plan.notes:
            say(self.console, f"{job.manifest.name}: {note}")
        lines = {
            **(plan.answers.lines() if plan.answers else {}),
            "Rows": f"{plan.rows:,}"
            + (f", of which {plan.invalid_rows:,} cannot be made" if plan.invalid_rows else ""),
            "Images": f"{plan.images:,} in {count(plan.batches, 'batch', 'batches')}"
            + (f"; {plan.finished:,} are there already" if plan.finished else "")
            + (f"; {plan.redo:,} to be generated again: {plan.redo_reason}" if plan.redo else "")
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


def kind_of(row: PlannedRow | InvalidRow) -> str:
    if isinstance(row, InvalidRow):
        return "fault"
    return "cut" if row.is_cut else "marked" if row.prompt.is_marked else "plain"


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
