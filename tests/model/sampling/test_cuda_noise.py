"""CUDA's noise computed on the CPU, compared with numbers printed by GPUs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator

from tests.support.files import write_csv
from tests.support.jobs import read_results
from tests.support.program import run_here
from tinysd_batch.errors import UsageError
from tinysd_batch.model.sampling.cuda_noise import MAX_NOISE_ELEMENTS, CudaNoiseGenerator, philox
from tinysd_batch.model.sampling.schedule import sample_noise
from tinysd_batch.model.tiny_sd import TinySD

# torch.manual_seed(0); torch.randn(8, 8, device="cuda"), as printed in public notebooks: the first rows.
SEED_0 = [
    [-0.9247, -0.4253, -2.6438, 0.1452, -0.1209, -0.5797, -0.6229, -0.3284],
    [-1.0745, -0.3631, -1.6711, 2.2655, 0.3117, -0.1842, 1.2866, 1.1820],
    [-0.1271, 1.2169, 1.4353, 1.0605, -0.4941, -1.4244, -0.7244, -1.2973],
]


def test_noise_equals_that_of_a_gpu() -> None:
    noise = CudaNoiseGenerator(0).randn((8, 8))
    torch.testing.assert_close(noise[:3], torch.tensor(SEED_0), rtol=0, atol=6e-5)


def test_philox_gives_the_published_values() -> None:
    """The known-answer test vectors of Philox4x32-10 (Random123, kat_vectors)."""

    def words(*values: int) -> tuple[np.ndarray, ...]:
        return tuple(np.array([value], np.uint64) for value in values)

    ones = 0xFFFFFFFF
    for counter, key, expected in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ):
        assert philox(words(*counter), key) == words(*expected)  # type: ignore[arg-type]


def test_each_call_and_each_seed_gives_other_noise() -> None:
    generator, same_seed, other_seed = CudaNoiseGenerator(7), CudaNoiseGenerator(7), CudaNoiseGenerator(7 + 2**32)
    first, second = generator.randn((4, 9)), generator.randn((4, 9))
    assert not torch.equal(first, second)
    assert torch.equal(same_seed.randn((6, 6)).view(4, 9), first)
    assert not torch.equal(other_seed.randn((4, 9)), first)
    assert abs(CudaNoiseGenerator(1).randn((MAX_NOISE_ELEMENTS,)).std() - 1) < 0.02


def test_each_image_has_its_own_generator() -> None:
    both = sample_noise([CudaNoiseGenerator(3), Generator().manual_seed(3)], (4, 8, 8))
    assert torch.equal(both[0], CudaNoiseGenerator(3).randn((4, 8, 8)))
    assert torch.equal(both[1], torch.randn((4, 8, 8), generator=Generator().manual_seed(3)))


def test_too_many_elements_are_refused() -> None:
    with pytest.raises(UsageError, match="the noise depends on the GPU model"):
        CudaNoiseGenerator(0).randn((MAX_NOISE_ELEMENTS + 1,))


def test_images_with_cuda_noise(tiny_model: Path) -> None:
    model = TinySD.from_pretrained(tiny_model, device="cpu")
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "sampler": "ddim", "eta": 0.5}
    ours = model.generate("cat", 5, rng="cuda", **options).images
    noise = CudaNoiseGenerator(5)
    with_latents = model.generate("cat", 5, latents=noise.randn(ours.shape[1:])[None], rng="cuda", **options).images
    cpu_noise = model.generate("cat", 5, **options).images
    assert not torch.equal(ours, cpu_noise)
    assert not torch.equal(with_latents, ours)  # its fresh noise is the generator's first, not its second
    both = model.generate(["cat", "dog"], [5, 6], rng="cuda", **options).images
    torch.testing.assert_close(both[:1], ours, rtol=1e-4, atol=1e-4)
    options["sampler"] = "euler_a"  # adds noise after every step
    cpu, cuda = (model.generate("cat", 5, latents=ours, rng=rng, **options).images for rng in ("cpu", "cuda"))
    assert (cpu - cuda).abs().max() > 0.1


def test_rng_is_a_job_setting(tmp_path: Path, tiny_model: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "cat", "seed": 1}])
    submit = "submit", "m.csv", "--inline", "--model", tiny_model, "--steps", 2
    for rng in ("cpu", "cuda"):
        done = run_here(*submit, "--rng", rng, "-o", rng, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    cpu, cuda = (read_results(tmp_path / rng)[0] for rng in ("cpu", "cuda"))
    assert cpu["image_id"] != cuda["image_id"]
    assert cpu["sha256"] != cuda["sha256"]
    assert "rng: cpu in the job, cuda now" in run_here(*submit, "--rng", "cuda", "-o", "cpu", cwd=tmp_path).stderr
