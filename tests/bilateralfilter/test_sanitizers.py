"""The C++ sources under AddressSanitizer and UndefinedBehaviorSanitizer, over odd sizes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bilateralfilter import _extension

ROOT = Path(__file__).resolve().parents[2]
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so")  # in the order in which they are loaded before Python
SANITIZE = ["-O0", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
OF_EACH = ("baseline", "wide", "have_wide", "AHEAD")

BEGIN = """
import sys
import torch
from bilateralfilter import DenseCRF, Lattice, bilateral_filter, par

torch.manual_seed(0)
torch.set_num_threads(2)
Lattice(torch.zeros(1, 1, 1))
assert torch.ops.loaded_libraries == {sys.argv[1]}
"""

ODD_SIZES = """
for dtype in (torch.float32, torch.float64):
    for d in range(1, 9):
        for images, pixels in ((1, 1), (2, 0), (0, 3), (1, 7), (3, 13), (2, 257), (1, 4097)):
            features = torch.randn(images, pixels, d, dtype=dtype) * 3
            lattice = Lattice(features)
            for channels in (1, 8, 33):
                values = torch.rand(images, pixels, channels, dtype=dtype)
                lattice.filter(values)
                lattice.filter(values.transpose(1, 2).contiguous().transpose(1, 2), transposed=True)
                # the last bytes of their memory, and not aligned to vectors
                lattice.filter(torch.rand(values.numel() + 1, dtype=dtype)[1:].view(values.shape))
            rows = torch.rand(images, pixels, 24, dtype=dtype)
            lattice.normalized(2.0).add_to(rows.clone(), rows)
        for value in (float("nan"), float("inf"), -1e30, 1e9, 3e8, -2e7):
            features = torch.rand(2, 11, d, dtype=dtype)
            features[1, 10, d - 1] = value
            try:
                Lattice(features).filter(torch.rand(2, 11, 1))
            except ValueError:
                continue
            assert abs(value) < 1e9
        Lattice(torch.full((1, 9, d), 2000.0, dtype=dtype)).filter(torch.rand(1, 9, 3))
one = Lattice(torch.rand(1, 50, 5) * 3)
one.filter(torch.rand(4, 50, 11).expand(4, 50, 11))
one.filter(torch.rand(4, 1, 1).expand(4, 50, 11))
for height, width, classes in ((1, 1, 1), (1, 31, 2), (29, 1, 9), (37, 41, 21), (5, 7, 151)):
    images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    prob = torch.rand(2, classes, height, width)
    maps = prob.clone().requires_grad_()
    bilateral_filter(images, maps, 15, 50).sum().backward()
    bilateral_filter(images, torch.full_like(prob, float("nan")), 0.5, 0.3)
    DenseCRF(iterations=2)(images, prob)
    DenseCRF(iterations=2, compatibility=-torch.eye(classes))(images, prob)
for height, width, channels in ((1, 1, 1), (3, 5, 6), (2, 31, 15)):
    for dtype in (torch.float32, torch.float64):
        affinity = par.affinity(torch.rand(2, 3, height, width, dtype=dtype), torch.rand(24), (1, 4, 24), 0.3)
        par.refine(torch.rand(2, channels, height, width, dtype=dtype), affinity, (1, 4, 24), 3)
print("all done")
"""

TOO_FAR = """
lattice = Lattice(torch.rand(1, 5, 3))
lattice._parts[0][0, 4, 3] = lattice._parts[0].max() + 1  # a vertex that is not there
lattice.filter(torch.rand(1, 5, 8))
print("all done")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a script in a fresh Python whose operators are those compiled with the sanitizers; needs a minute once."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    paths = [subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in RUNTIMES]
    missing = [name for name, path in zip(RUNTIMES, paths, strict=True) if not os.path.isabs(path)]
    if missing:
        pytest.skip(f"g++ has no {', '.join(missing)}")
    from torch.utils import cpp_extension

    # where `pip install ./bilateralfilter` would put it, by name
    library = tmp_path_factory.mktemp("sanitized") / f"{_extension.name_of('cpu', None)}.so"
    base = [compiler, "-std=c++20", "-fPIC", "-fopenmp", *SANITIZE]
    folders = [f"-I{path}" for path in cpp_extension.include_paths()]
    lines = []   # one source, for torch's headers take as long as ours; it keeps apart what each of ours has of its own
    for path in _extension.sources(cuda=False):
        lines += [f"#undef {name}\n#define {name} {name}_of_{path.stem}" for name in OF_EACH]
        lines += ["#undef INNER_LOOPS", f'#include "{path}"']
    source = library.with_suffix(".cpp")
    source.write_text("\n".join(lines))
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
    subprocess.run([*base, "-shared", *folders, str(source), *libraries, "-o", str(library)], check=True)

    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(paths),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": f"{library.parent}:{ROOT}",
    }

    def run_script(script: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", BEGIN + script, str(library)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    return run_script


def test_odd_sizes_are_clean(run):
    result = run(ODD_SIZES)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "all done\n"
    for word in ("Sanitizer", "runtime error"):
        assert word not in result.stderr


def test_an_index_too_large_is_reported(run):
    result = run(TOO_FAR)
    assert result.returncode != 0
    assert "all done" not in result.stdout
    assert "AddressSanitizer" in result.stderr
    assert "cpu_filter" in result.stderr or "cpu_build" in result.stderr
