"""more/dense_crf.npz: dense CRF of one image."""

import numpy as np
import pytest
import torch

from utils.crf import dense_crf


@pytest.mark.parametrize(("backend", "marginals"), [("lattice", 2e-3), ("pydensecrf", 1e-4)])
def test_dense_crf(golden, backend, marginals):
    data = golden("more/dense_crf.npz")
    if backend == "pydensecrf":
        pytest.importorskip("pydensecrf", reason="pydensecrf is not installed")
    settings = {name.removeprefix("cfg_"): data[name].item() for name in data.files if name.startswith("cfg_")}
    settings["iterations"] = int(settings.pop("iter_max"))
    q = dense_crf(data["image_u8"], torch.from_numpy(data["prob"]), backend=backend, **settings).numpy()
    np.testing.assert_allclose(q, data["Q"], rtol=0, atol=marginals)
    assert (q.argmax(0) != data["label"]).mean() <= 1e-4
