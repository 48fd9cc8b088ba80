"""Graph Category Representation alone: outputs and gradients."""

import numpy as np
import torch

from model.more.gcr import GraphCategoryRepresentation

UNUSED = "_fc1.0."


def test_outputs_and_gradients(golden):
    arrays = golden("more/gcr.npz")
    names = [n for n in arrays.files if n.startswith("weight__")]
    weights = {n.removeprefix("weight__"): torch.from_numpy(arrays[n]) for n in names}
    used = {name: value for name, value in weights.items() if not name.startswith(UNUSED)}
    cases = [n.removesuffix("__cls_tokens") for n in arrays.files if n.endswith("__cls_tokens") and "grad" not in n]
    assert cases
    for case in cases:
        layer = GraphCategoryRepresentation(used["norm.weight"].numel())
        layer.load_state_dict(used)
        class_tokens = torch.from_numpy(arrays[f"{case}__cls_tokens"]).requires_grad_()
        patches = torch.from_numpy(arrays[f"{case}__patch_tokens"]).requires_grad_()
        output = layer(class_tokens, patches)
        (output * torch.from_numpy(arrays[f"{case}__upstream"])).sum().backward()
        assert patches.grad is None
        np.testing.assert_allclose(output.detach(), arrays[f"{case}__output"], rtol=1e-4, atol=1e-5, err_msg=case)
        grads = {name: p.grad for name, p in layer.named_parameters()} | {"cls_tokens": class_tokens.grad}
        for name, grad in grads.items():
            theirs = arrays[f"{case}__grad_{name}" if name == "cls_tokens" else f"{case}__grad__{name}"]
            np.testing.assert_allclose(grad, theirs, rtol=1e-4, atol=1e-3, err_msg=f"{case} {name}")
        names = arrays[f"{case}__grad_names"][arrays[f"{case}__grad_is_none"] == 1]
        assert {str(n).strip("_") for n in names} - {"patch_tokens"} == {n.strip("_") for n in set(weights) - set(used)}
