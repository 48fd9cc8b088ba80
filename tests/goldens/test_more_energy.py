"""more/loss_energy.npz: the energy loss and its gradient; `_scalar` is the released filter built without SSE."""

import numpy as np
import torch

from model.losses.energy import energy_loss


def test_energy_loss(golden):
    data = golden("more/loss_energy.npz")
    cases = [name.removesuffix("__logits") for name in data.files if name.endswith("__logits")]
    assert cases
    for case in cases:
        logits = torch.from_numpy(data[f"{case}__logits"]).requires_grad_()
        loss = energy_loss(logits, torch.from_numpy(data[f"{case}__input"]), torch.from_numpy(data[f"{case}__label"]))
        loss.backward()
        expected = data[f"{case}__grad_logits_scalar"]
        np.testing.assert_allclose(loss.item(), data[f"{case}__loss_scalar"].item(), rtol=1e-5, err_msg=case)
        np.testing.assert_allclose(logits.grad, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=case)
        np.testing.assert_allclose(loss.item(), data[f"{case}__loss"].item(), rtol=2e-4, err_msg=case)
