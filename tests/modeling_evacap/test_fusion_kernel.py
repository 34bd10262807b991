"""The Triton kernels against the formula, on a GPU, or in Triton's interpreter, whose products know no bfloat16."""

from importlib.metadata import version

import pytest
import torch

from evacap.modeling_evacap import fusion_evacap
from evacap.modeling_evacap.fusion_evacap import attention_and_entropy, fused_attention_and_entropy
from evacap.modeling_evacap.fusion_kernel_evacap import has_kernel, kernel_attention_and_entropy


pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and version("triton").startswith("3.6."),
    reason="the interpreter of Triton 3.6 loops over no range with NumPy 2.4",
)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
CASES = [
    (torch.float32, 64, (70, 40), False),
    (torch.float32, 24, (3, 70), True),
    (torch.float32, 8, (3, 1), False),
    (torch.float16, 64, (130, 70), True),
    (torch.float16, 128, (5, 130), False),
]
if DEVICE == "cuda":
    CASES += [
        (torch.bfloat16, 64, (130, 70), True),
        (torch.bfloat16, 16, (512, 1764), False),
        (torch.bfloat16, 128, (512, 1764), True),
        (torch.float32, 128, (512, 1764), True),
    ]


def make(dtype, head_dim, num_queries=5, num_keys=40, sharpness=1.0):
    rng = torch.Generator().manual_seed(0)
    lengths = (num_queries, num_keys, num_keys)
    # As a projection leaves them: (clips, length, heads, head_dim), transposed.
    tensors = (sharpness * torch.randn(2, length, 2, head_dim, generator=rng) for length in lengths)
    return [tensor.to(DEVICE, dtype).transpose(1, 2).requires_grad_() for tensor in tensors]


def values_and_gradients(attend, inputs, mask, scaling):
    context, entropy, *_ = attend(*inputs, mask, scaling)
    rng = torch.Generator().manual_seed(1)
    factors = [torch.randn(output.shape, generator=rng).to(output) for output in (context, entropy)]
    return context, entropy, *torch.autograd.grad((context, entropy), inputs, factors)


def assert_close(found, expected, tolerance):
    for value, other in zip(found, expected, strict=True):
        assert value.isfinite().all()
        assert (value.double() - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize(("dtype", "head_dim", "lengths", "masked"), CASES, ids=str)
def test_the_kernels_are_the_formula(dtype, head_dim, lengths, masked):
    inputs, mask = make(dtype, head_dim, *lengths), None
    if masked:
        # The second clip sees only the last keys: whole blocks before them are hidden.
        mask = torch.arange(lengths[1], device=DEVICE) >= torch.tensor([[0], [lengths[1] - 3]], device=DEVICE)
    found = values_and_gradients(kernel_attention_and_entropy, inputs, mask, head_dim**-0.5)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = values_and_gradients(attention_and_entropy, exact, mask, head_dim**-0.5)
    assert [value.dtype for value in found] == [dtype, torch.float32, dtype, dtype, dtype]
    if lengths[1] == 1:
        # One key has all the weight whatever its score: no entropy, and no gradient but of its value.
        assert all(value.abs().max() < 1e-5 for value in found[1:4])
        found, expected = found[::4], expected[::4]
    assert_close(found, expected, TOLERANCES[dtype])
    assert (found[1].double() - expected[1]).abs().max() < 1e-3


def test_sharp_attention():
    inputs = make(torch.float32, 16, sharpness=8.0)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found, expected = (
        values_and_gradients(attend, tensors, None, 0.25)
        for attend, tensors in ((kernel_attention_and_entropy, inputs), (attention_and_entropy, exact))
    )
    assert_close(found, expected, 1e-4)
    # One key has all the weight.
    found = values_and_gradients(kernel_attention_and_entropy, make(torch.float32, 16, sharpness=300.0), None, 0.25)
    assert found[1].max() < 1e-6 and all(value.isfinite().all() for value in found)


def test_a_clip_without_any_key_stays_finite(monkeypatch):
    """The choice of the device calls the kernels with a mask that leaves such a clip its padding."""
    monkeypatch.setattr(fusion_evacap, "has_kernel", lambda query: True)
    inputs = make(torch.float32, 16)
    mask = torch.tensor([[True] * 40, [False] * 40], device=DEVICE)
    found = values_and_gradients(lambda *args: fused_attention_and_entropy(*args)[:2], inputs, mask, 0.25)
    alone = [tensor[:1].detach().requires_grad_() for tensor in inputs]
    expected = kernel_attention_and_entropy(*alone, mask[:1], 0.25)
    assert all(value.isfinite().all() for value in found)
    torch.testing.assert_close([value[:1] for value in found[:2]], [*expected])


def test_what_takes_the_kernels():
    query = torch.zeros(1, 1, 1, 16, device=DEVICE)
    assert has_kernel(query) == (DEVICE == "cuda")
    assert not has_kernel(query.double()) and not has_kernel(query.new_zeros(1, 1, 1, 256))


def test_no_scores_are_kept():
    query, key, value = make(torch.float32, 16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda t: t):
        kernel_attention_and_entropy(query, key, value, None, 0.25)
    assert saved and all(shape[-2:] != (5, 40) for shape in saved)
