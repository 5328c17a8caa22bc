"""Print a job's plan."""

from collections import Counter

from rich.console import Console

from tinysd_batch.job.state.job import Job
from tinysd_batch.records import InvalidRow
from tinysd_batch.report.formatting import format_bytes, format_count, format_row_label, print_line, to_one_line
from tinysd_batch.report.plan.job_plan import JobPlan
from tinysd_batch.report.plan.token_counts import CountedRow
from tinysd_batch.report.reading_progress import ReadingProgress
from tinysd_batch.settings.schema import Settings

LABEL_WIDTH = 14
MAX_ROW_CHARACTERS = 300  # where output is not a terminal
MAX_SHOWN_ROWS = 10  # of each of: invalid rows, truncated prompts, weighted prompts; --verbose shows all


class PlanPrinter:
    """Prints notable rows while they are read (with `verbose`, all rows), and the plan at the end."""

    def __init__(self, console: Console, verbose: bool, progress: ReadingProgress) -> None:
        self.console = console
        self.verbose = verbose
        self.progress = progress
        self.rows_by_class: Counter[str] = Counter()
        # On a terminal each row takes one line; in a file lines may be longer.
        self.max_characters = console.width if console.is_terminal else MAX_ROW_CHARACTERS

    def print_row(self, row: CountedRow | InvalidRow) -> None:
        row_class = classify_row(row)
        self.rows_by_class[row_class] += 1
        if self.verbose or (row_class != "plain" and self.rows_by_class[row_class] <= MAX_SHOWN_ROWS):
            with self.progress.hidden():
                print_line(self.console, self.format_row(row))

    def format_row(self, row: CountedRow | InvalidRow) -> str:
        if isinstance(row, InvalidRow):
            return f"{format_row_label(row.number, row.line)} cannot be generated: {to_one_line(row.reason, 400)}"
        return to_one_line(row.format_line(), self.max_characters)

    def print_plan(self, job: Job, plan: JobPlan) -> None:
        hidden = sum(
            max(0, n_rows - MAX_SHOWN_ROWS) for row_class, n_rows in self.rows_by_class.items() if row_class != "plain"
        )
        if hidden and not self.verbose:
            print_line(self.console, f"and {hidden:,} more like these; --verbose shows every row")
        for note in plan.notes:
            print_line(self.console, f"{job.manifest.name}: {note}")
        for label, line in format_plan(job, plan).items():
            print_line(self.console, f"{label:<{LABEL_WIDTH}} {line}")


def format_plan(job: Job, plan: JobPlan) -> dict[str, str]:
    """Return a line for each label."""
    return {
        **(plan.summary.lines() if plan.summary else {}),
        "Rows": f"{plan.rows:,}"
        + (f", of which {plan.invalid_rows:,} cannot be generated" if plan.invalid_rows else ""),
        "Images": f"{plan.images:,} in {format_count(plan.batches, 'batch', 'batches')}"
        + (f"; {plan.finished:,} are already generated" if plan.finished else "")
        + (f"; {plan.redo:,} to be generated again: {plan.redo_reason}" if plan.redo else "")
        + format_reuse(job, plan),
        "Model": f"{job.model.name}, digest {job.model.digest[:10]}",
        "Sizes": format_counts(plan.sizes),
        "Sampling": format_counts(plan.samplings),
        "Tokens": f"{plan.longest_prompt_tokens:,} in the longest prompt, the model's limit is {plan.token_limit}"
        + format_token_advice(plan, job.settings),
        "Weighted": format_count(plan.weighted_rows, "row"),
        "Disk": f"about {format_bytes(plan.disk_bytes)} to be written, {format_bytes(plan.free_bytes)} free"
        + ("" if plan.fits_disk else ": not enough"),
        **(plan.memory.lines() if plan.memory else {}),
        **({"Carried": format_carried_columns(plan)} if plan.carried_columns else {}),
        "Job folder": str(job.folder),
    }


def format_carried_columns(plan: JobPlan) -> str:
    columns = [
        to_one_line(name, 40) + (f" (did you mean {plan.near_misses[name]}?)" if name in plan.near_misses else "")
        for name in plan.carried_columns[:MAX_SHOWN_ROWS]
    ]
    hidden = len(plan.carried_columns) - len(columns)
    return ", ".join(columns) + (f" and {hidden:,} more" if hidden else "")


def classify_row(row: CountedRow | InvalidRow) -> str:
    if isinstance(row, InvalidRow):
        return "invalid"
    return "truncated" if row.is_truncated else "weighted" if row.prompt.has_weights else "plain"


def format_reuse(job: Job, plan: JobPlan) -> str:
    if job.reuse is None:
        return ""
    left = plan.images - plan.finished - plan.reusable
    return f"; {plan.reusable:,} can be reused from {job.reuse}, {left:,} are to be generated"


def format_counts(counter: Counter[str]) -> str:
    """Return names with their counts, most frequent first."""
    counts = counter.most_common(MAX_SHOWN_ROWS)
    shown = [f"{name} ({number:,})" if len(counter) > 1 else name for name, number in counts]
    hidden = len(counter) - len(counts)
    return ", ".join(shown) + (f" and {hidden:,} more" if hidden else "")


def format_token_advice(plan: JobPlan, settings: Settings) -> str:
    if settings.long_prompts:
        return " per chunk"
    if not plan.cut_rows:
        return ""
    return f"; {format_count(plan.cut_rows, 'row')} will be truncated, --long-prompts encodes them in full"
