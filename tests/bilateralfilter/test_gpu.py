"""The code for GPUs: its algorithm on threads of the CPU, its compilation where nvcc is, itself where a GPU is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from bilateralfilter import DenseCRF, Lattice, _cuda_toolkit, _extension, bilateral_filter, par
from tests.bilateralfilter import test_par
from tests.bilateralfilter.slow import random

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def gpu_on_cpu(tmp_path_factory):
    cpp_extension.load(
        "gpu_on_cpu",
        [str(FOLDER / "gpu_on_cpu.cpp")],
        extra_include_paths=[str(_extension.FOLDER / "csrc")],
        extra_cflags=["-O1", "-fopenmp", "-ffp-contract=off"],
        extra_ldflags=["-fopenmp"],
        build_directory=str(tmp_path_factory.mktemp("build")),
        is_python_module=False,
    )
    return torch.ops.gpu_on_cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dimensions", range(1, 9))
def test_its_lattice_is_that_of_the_cpu(gpu_on_cpu, dimensions, dtype):
    """Vertices, their numbers and their entries are equal, weights and results but for round-off."""
    features = 4 * random(3, 257, dimensions, dtype=dtype)
    values = random(3, 257, 37, seed=2, dtype=dtype) - 0.5
    ours = Lattice(features)
    parts = gpu_on_cpu.build(features)
    vertex, weight, start, pixel = ours._parts[:4]
    vertices = int(parts[6][3])
    assert torch.equal(parts[0], vertex)
    assert torch.equal(parts[2][: vertices + 1], start)
    assert torch.equal(parts[3], pixel)
    eps = 8 * torch.finfo(dtype).eps
    assert (parts[1] - weight).abs().max() <= eps
    for transposed in (False, True):
        expected = ours.filter(values, transposed)
        assert (gpu_on_cpu.apply(values, parts, transposed) - expected).abs().max() <= 8 * eps * expected.abs().max()


def test_odd_inputs(gpu_on_cpu):
    for images, pixels, channels in ((0, 5, 3), (2, 0, 3), (1, 1, 1), (3, 7, 0), (2, 13, 151)):
        features, values = random(images, pixels, 5), random(images, pixels, channels, seed=2)
        out = gpu_on_cpu.apply(values, gpu_on_cpu.build(features), False)
        torch.testing.assert_close(out, Lattice(features).filter(values))
    features, values = random(1, 50, 5), random(4, 50, 6, seed=2)
    strided = values.transpose(1, 2).contiguous().transpose(1, 2)
    parts = gpu_on_cpu.build(features)
    expected = Lattice(features).filter(values)
    torch.testing.assert_close(gpu_on_cpu.apply(strided, parts, False), expected)  # one lattice for several images
    out = torch.ones_like(values)
    gpu_on_cpu.add_(out, values, parts)
    torch.testing.assert_close(out, expected + 1)
    out = torch.ones_like(strided)
    gpu_on_cpu.add_(out, values, gpu_on_cpu.build(features.repeat(4, 1, 1)))
    torch.testing.assert_close(out, expected + 1)


def test_features_that_do_not_fit_give_nan_where_they_touch(gpu_on_cpu):
    features = torch.zeros(1, 6, 2)
    features[0, :, 0] = torch.tensor([0, 0.1, 0.2, 100, 100.1, 100.2])
    features[0, 1, 1] = float("nan")
    out = gpu_on_cpu.apply(torch.ones(1, 6, 1), gpu_on_cpu.build(features), False)[0, :, 0]
    assert out[:3].isnan().all()
    assert out[3:].isfinite().all()


def test_many_pixels_on_one_vertex(gpu_on_cpu):
    """Long sums are sums of short ones, so also exact; and more images and channels than the buffers hold at once."""
    features, values = 30 * random(2, 100_000, 5), random(2, 100_000, 20, seed=2)
    features[0] = 0
    out = gpu_on_cpu.apply(values, gpu_on_cpu.build(features), False)
    exact = Lattice(features.double()).filter(values.double())
    torch.testing.assert_close(out[0].double(), exact[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(out[1], Lattice(features).filter(values)[1], rtol=1e-5, atol=1e-6)


def test_pixels_that_take_no_part_have_no_entries(gpu_on_cpu):
    features, values = 4 * random(4, 700, 3), random(4, 700, 5, seed=2)
    valid = random(4, 700, seed=3) > 0.5
    valid[1], valid[2, 1:] = False, False
    parts = gpu_on_cpu.build(features, valid)
    begin, end = parts[2][0], parts[2][parts[6][4]]
    assert end - begin == 4 * valid.sum()
    out = gpu_on_cpu.apply(values, parts, False)
    for n in range(4):
        alone = Lattice(features[n : n + 1, valid[n]]).filter(values[n : n + 1, valid[n]])[0]
        torch.testing.assert_close(out[n, valid[n]], alone)
    assert not out[~valid].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", test_par.SIZES)
def test_its_par_is_that_of_the_cpu(gpu_on_cpu, size, dtype):
    images, position, dilations, width = test_par.inputs(*size, dtype=dtype)
    affinity = par.affinity(images, position, dilations, width)
    eps = 1e-6 if dtype == torch.float32 else 1e-14
    ours = gpu_on_cpu.par_affinity(images.transpose(2, 3).contiguous().transpose(2, 3), position, dilations, width)
    torch.testing.assert_close(ours, affinity, rtol=0, atol=eps)
    for iterations in (0, 1, 4):
        maps = random(size[0], 15, *size[1:], dtype=dtype)
        refined = gpu_on_cpu.par_refine(maps, affinity, dilations, iterations)
        assert torch.equal(refined, par.refine(maps, affinity, dilations, iterations))


BUILD = """
import sys
from pathlib import Path
import torch
from bilateralfilter import _cuda_toolkit, _extension

_extension._build_folder = lambda: Path(sys.argv[1])
_cuda_toolkit._candidates = lambda: [Path(sys.argv[2])]
_cuda_toolkit.cards = lambda: {int(name.removesuffix("+PTX")) for name in _cuda_toolkit.listed()}
assert _extension.load("cuda")
for name in ("build", "apply", "add_", "mean_field", "par_affinity", "par_refine"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bilateralfilter::{name}", "CUDA")
"""


@pytest.mark.parametrize(("origin", "wanted", "built"), [
    ("system", "9.0", "sm90"), ("pip", "9.0", "sm90"),
    pytest.param("system", "8.0 9.0 10.0 12.0", "sm80_sm90_sm100_sm120", marks=pytest.mark.slow),
])
def test_compiles_links_and_loads(tmp_path, monkeypatch, origin, wanted, built):
    """Half a minute of one core for each architecture. pip's nvcc: where nvidia-cuda-nvcc is installed."""
    nvccs = [nvcc for nvcc in _cuda_toolkit._candidates() if (nvcc.parts[-4:-3] == ("nvidia",)) == (origin == "pip")]
    monkeypatch.setattr(_cuda_toolkit, "_candidates", lambda: nvccs)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    try:
        nvcc = _cuda_toolkit.find([int(name.removesuffix("+PTX")) for name in _cuda_toolkit.listed()]).home / "bin/nvcc"
    except LookupError as error:
        pytest.skip(f"no nvcc of {origin}: {error}")
    monkeypatch.setenv("PYTHONPATH", str(_extension.FOLDER.parent), prepend=os.pathsep)
    command = [sys.executable, "-c", BUILD, str(tmp_path), str(nvcc)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    library, = tmp_path.glob("*.so")
    assert library.stem.endswith(f"_cuda_{built}")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(2, 21, 112, 112), (1, 3, 61, 53), (1, 1, 1, 1), (3, 81, 17, 40)])
def test_filter_equals_the_cpu(size):
    images, maps = 255 * random(size[0], 3, *size[2:]), random(*size, seed=2)
    expected = bilateral_filter(images, maps, 15, 50)
    out = bilateral_filter(images.cuda(), maps.cuda(), 15, 50)
    assert out.is_cuda
    assert (out.cpu() - expected).abs().max() <= 1e-4 * expected.max()
    assert torch.equal(out, bilateral_filter(images.cuda(), maps.cuda(), 15, 50))  # the same bits again


@pytest.mark.gpu
def test_par_equals_the_cpu():
    images, position, *rest = test_par.inputs(2, 61, 53)
    maps, affinity = random(2, 6, 61, 53), par.affinity(images, position, *rest)
    ours = par.affinity(images.cuda(), position.cuda(), *rest)
    assert (ours.cpu() - affinity).abs().max() <= 1e-6
    expected = par.refine(maps, affinity, test_par.DILATIONS, 10)
    assert (par.refine(maps.cuda(), affinity.cuda(), test_par.DILATIONS, 10).cpu() - expected).abs().max() <= 2e-6


@pytest.mark.gpu
def test_filter_does_not_wait_for_the_device():
    images, maps = 255 * random(2, 3, 40, 50).cuda(), random(2, 21, 40, 50, seed=2).cuda()
    bilateral_filter(images, maps, 15, 50)
    torch.cuda.set_sync_debug_mode("error")
    try:
        bilateral_filter(images, maps, 15, 50)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_crf_equals_the_cpu():
    images, prob = 255 * random(2, 3, 60, 70), random(2, 21, 60, 70, seed=2).softmax(1)
    crf = DenseCRF()
    assert (crf(images.cuda(), prob.cuda()).cpu() - crf(images, prob)).abs().max() <= 1e-3
