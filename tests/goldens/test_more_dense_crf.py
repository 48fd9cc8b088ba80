"""more/dense_crf.npz: dense CRF of one image."""

import numpy as np

from utils.crf import dense_crf


def test_dense_crf(golden):
    data = golden("more/dense_crf.npz")
    settings = {name.removeprefix("cfg_"): data[name].item() for name in data.files if name.startswith("cfg_")}
    iterations = int(settings.pop("iter_max"))
    q = dense_crf(data["image_u8"], data["prob"], iterations, **settings)
    np.testing.assert_allclose(q, data["Q"], rtol=0, atol=1e-4)
    assert (q.argmax(0) != data["label"]).mean() <= 1e-4
