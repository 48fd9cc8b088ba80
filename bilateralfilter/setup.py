"""pip install --no-build-isolation ./bilateralfilter: compiles the filter ahead, for machines without a compiler."""

import hashlib
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

source_hash = hashlib.sha1((Path(__file__).resolve().parent / "filter.cpp").read_bytes()).hexdigest()[:10]
flags = ["-O3", "-fopenmp", "-ffp-contract=off"]

setup(
    name="bilateralfilter",
    version="0.1",
    packages=["bilateralfilter"],
    package_dir={"bilateralfilter": "."},
    package_data={"bilateralfilter": ["filter.cpp"]},
    install_requires=["torch"],
    ext_modules=[
        # named after its source, so that a checkout never loads one made from another source
        CppExtension(
            f"_bilateralfilter_{source_hash}", ["filter.cpp"], extra_compile_args=flags, extra_link_args=["-fopenmp"]
        )
    ],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=False)},
)
