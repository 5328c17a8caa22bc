"""Names of the samplers: ours, and those of other programs for them."""

import re
from collections.abc import Iterator

from tinysd_batch.text import normalize_text

SAMPLERS = ("plms", "ddim", "euler", "euler_a", "heun", "dpm2", "dpm2_a", "lms", "dpmpp_2m", "unipc")
SAMPLERS_WITH_ETA = ("plms", "ddim")  # the others ignore eta

# Names of our samplers in k-diffusion, the web UI, ComfyUI and InvokeAI, and the scheduler classes of diffusers; in the
# form that `normalize_sampler_name` returns.
SAMPLER_ALIASES = {
    **{name.replace("_", ""): name for name in SAMPLERS},
    "pndm": "plms",
    "eulerancestral": "euler_a",
    "dpm2ancestral": "dpm2_a",
    "dpmsolvermultistep": "dpmpp_2m",
    "dpmsolverpp": "dpmpp_2m",
    "dpmsolverpp2m": "dpmpp_2m",
    "unipcmultistep": "unipc",
}
# Sigma schedules with which such names can end.
SIGMA_SCHEDULES = {
    "karras": "Karras", "ka": "Karras", "polyexponential": "polyexponential", "exponential": "exponential",
    "sgmuniform": "SGM uniform", "ddimuniform": "DDIM uniform", "uniform": "uniform", "normal": "normal",
    "simple": "simple", "beta": "beta", "linearquadratic": "linear quadratic", "kloptimal": "KL optimal",
    "alignyoursteps": "align your steps", "ays": "align your steps", "automatic": "automatic", "turbo": "turbo",
}  # fmt: skip


def find_sampler(name: str) -> str:
    """Return our name of a sampler from a name in other programs, e.g. `Euler a`, `DPM++ 2M` or `k_dpm_2_ancestral`.

    Raises ValueError for an unknown sampler, and for a name with a sigma schedule, as these are not supported.
    """
    if sampler := look_up_sampler(normalize_sampler_name(name)):
        return sampler
    for sampler, schedule in split_off_schedules(name):
        raise ValueError(
            f"{sampler} is supported, but its {schedule} schedule is not; write {sampler} for the model's own schedule"
        )
    raise ValueError(f"no such sampler; one of {', '.join(SAMPLERS)}")


def normalize_sampler_name(name: str) -> str:
    """Return `kdpm2ancestral` for `k_dpm_2_ancestral`, `euler` for `diffusers.EulerDiscreteScheduler`."""
    normalized = normalize_text(name).strip().rpartition(".")[2].lower().replace("++", "pp")
    normalized = re.sub(r"[\W_]+", "", normalized).removeprefix("sample").removesuffix("scheduler")
    return normalized.replace("discrete", "")


def look_up_sampler(normalized: str) -> str | None:
    """Return our name of a sampler, with or without the "k" that marks k-diffusion's samplers."""
    return SAMPLER_ALIASES.get(normalized) or SAMPLER_ALIASES.get(normalized.removeprefix("k"))


def split_off_schedules(name: str) -> Iterator[tuple[str, str]]:
    """Yield each way to read the name as a sampler followed by a sigma schedule."""
    normalized = normalize_sampler_name(name)
    for ending, schedule in SIGMA_SCHEDULES.items():
        if normalized.endswith(ending) and (sampler := look_up_sampler(normalized.removesuffix(ending))):
            yield sampler, schedule
    # InvokeAI's dpmpp_2m_k
    if re.search(r"[\s_-]k$", name.strip().lower()) and (sampler := look_up_sampler(normalized.removesuffix("k"))):
        yield sampler, "Karras"
