"""PyTorch's operators on the emulated device: the same functions there and on the CPU, to the last bit."""

import copy
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

pytestmark = pytest.mark.emulated

DEVICE = torch.device("npu:0")


@dataclass(frozen=True)
class Inputs:
    x: torch.Tensor  # [6, 8] float32, normal
    y: torch.Tensor  # [6, 8] float32, normal
    weight: torch.Tensor  # [8, 5] float32, normal
    image: torch.Tensor  # [2, 3, 9, 9] float32, normal
    ties: torch.Tensor  # [6, 8] int64, 0 to 3: each value several times
    index: torch.Tensor  # [3] int64: rows of x
    empty: torch.Tensor  # [0, 8] float32

    @staticmethod
    def on(device: torch.device) -> "Inputs":
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        return Inputs(
            x=normal(6, 8),
            y=normal(6, 8),
            weight=normal(8, 5),
            image=normal(2, 3, 9, 9),
            ties=torch.randint(4, (6, 8), generator=generator).to(device),
            index=torch.tensor([3, 1, 2], device=device),
            empty=torch.empty(0, 8, device=device),
        )

    @property
    def device(self) -> torch.device:
        return self.x.device


def written(target: Any, write: Callable[[Any], Any]) -> Any:
    write(target)
    return target


def gradients(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> list[torch.Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    result = function(*leaves)
    return [result.detach(), *torch.autograd.grad(result.square().sum(), leaves)]


def attention(query: torch.Tensor, key: torch.Tensor, *, is_causal: bool) -> torch.Tensor:
    # the CPU would take a fused kernel, which rounds otherwise
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query[None], key[None], key[None], is_causal=is_causal)


CASES: dict[str, Callable[[Inputs], Any]] = {
    # creation
    "zeros": lambda i: torch.zeros(3, 2, device=i.device),
    "ones": lambda i: torch.ones(3, dtype=torch.bfloat16, device=i.device),
    "full": lambda i: torch.full((2, 3), 7.5, device=i.device),
    "arange": lambda i: torch.arange(3, 17, 2, device=i.device),
    "linspace": lambda i: torch.linspace(0, 1, 5, device=i.device),
    "eye": lambda i: torch.eye(3, 4, device=i.device),
    "tensor": lambda i: torch.tensor([[1, 2], [3, 4]], device=i.device),
    "tril_indices": lambda i: torch.tril_indices(4, 3, device=i.device),
    "ones_like": lambda i: torch.ones_like(i.x.t()),
    "full_like": lambda i: torch.full_like(i.x, 2, dtype=torch.int32),
    "new_zeros": lambda i: i.x.new_zeros(2, 2),
    # arithmetic and types
    "add": lambda i: i.x + i.y * 2 - 1,
    "broadcast": lambda i: i.x + i.x[:1] + i.x[:, :1],
    "promotion": lambda i: [i.ties + 1.5, i.ties / 2, i.ties.int() + i.x.bfloat16()],
    "cpu number": lambda i: i.x * torch.tensor(3.0) + torch.tensor(2),
    "compare": lambda i: [i.x > i.y, i.ties == 2, torch.isnan(i.x / 0)],
    "bits": lambda i: [i.ties & 1, i.ties << 2, ~i.ties, i.ties ^ 3],
    "integer division": lambda i: [
        9 // (i.ties.int() + 3),
        torch.div(i.ties.int(), i.ties.int() + 3, rounding_mode="trunc"),
        i.ties.int() % (i.ties.int() + 3),
        torch.fmod(i.ties.int(), i.ties.int() + 3),
        i.ties.int().floor_divide_(i.ties.int() + 3).remainder_(i.ties.int() + 3),
    ],
    "where": lambda i: torch.where(i.x > 0, i.x, -i.y),
    "clamp": lambda i: i.x.clamp(-0.5, 0.5),
    "types": lambda i: [i.x.to(t) for t in (torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.bool)],
    "complex": lambda i: torch.view_as_real(torch.complex(i.x, i.y).conj() * torch.complex(i.y, i.x)),
    # views
    "slice": lambda i: i.x[1:5:2, ::3],
    "transpose": lambda i: [i.x.t(), i.x.t().contiguous(), i.image.permute(2, 0, 3, 1)],
    "reshape": lambda i: [i.x.reshape(2, 3, 8), i.x.t().reshape(-1), i.x.view(-1, 2)],
    "squeeze": lambda i: [i.x[:1].squeeze(), i.x[:1].squeeze(0), i.x.unsqueeze(1).squeeze(dim=(1,))],
    "split": lambda i: [*i.x.split([1, 2, 3]), *i.x.chunk(3, dim=1), *i.x.unbind(0)],
    "expand": lambda i: i.x[:1].expand(4, 8) + 0,
    "view as another type": lambda i: i.x.view(torch.int32),
    "unfold": lambda i: i.x.unfold(1, 3, 2),
    "diagonal": lambda i: [i.x.diagonal(1), torch.diag_embed(i.x)],
    "write to a view": lambda i: written(i.x.clone(), lambda t: t[1:3, ::2].fill_(9)),
    "write to a transposed view": lambda i: written(i.x.clone(), lambda t: t.t()[2].mul_(3)),
    "write to a flattened view": lambda i: written(i.x.clone(), lambda t: t.view(-1)[5:9].copy_(t.view(-1)[20:24])),
    "conjugated and negated views": lambda i: [
        torch.complex(i.x, i.y).conj().imag + 0,
        torch.complex(i.x, i.y).mH.abs(),
    ],
    # in-place and out=
    "in-place": lambda i: i.x.clone().add_(3).mul_(i.y).relu_().sqrt_(),
    "in-place on a view": lambda i: written(i.x.clone(), lambda t: t[2].add_(1).clamp_(min=0)),
    "in-place with itself": lambda i: written(i.x.clone(), lambda t: t.add_(t).mul_(t)),
    "in-place shape": lambda i: i.x.clone().t_().unsqueeze_(0).squeeze_(),
    "out=": lambda i: torch.add(i.x, i.y, out=torch.empty(6, 8, device=i.device)),
    "out= grows": lambda i: torch.add(i.x, i.y, out=torch.empty(0, device=i.device)),
    "out= on a view": lambda i: written(
        torch.zeros(6, 16, device=i.device), lambda t: torch.mul(i.x, 2, out=t[:, ::2])
    ),
    "out= twice": lambda i: torch.max(
        i.x, 1, out=(torch.empty(0, device=i.device), torch.empty(0, device=i.device, dtype=torch.int64))
    ),
    "resize_": lambda i: written(i.x.clone(), lambda t: t.resize_(3, 4)),
    "set_": lambda i: written(torch.empty(0, device=i.device), lambda t: t.set_(i.x[2:].clone())),
    # reductions
    "sum": lambda i: [i.x.sum(), i.x.sum(0), i.x.sum(1, keepdim=True), i.ties.sum(), i.x.bfloat16().sum(-1)],
    "mean and var": lambda i: [i.x.mean(), *torch.var_mean(i.x, 1), i.x.std(0)],
    "max and min": lambda i: [i.x.max(), *i.x.max(1), *i.x.min(0), i.x.amax(1), *torch.aminmax(i.x)],
    "any and all": lambda i: [(i.x > 0).any(), (i.x > 0).all(1)],
    "argmax of ties": lambda i: [i.ties.argmax(1), i.ties.argmin(0), i.ties.argmax()],
    "cumsum": lambda i: [i.x.cumsum(0), i.ties.cumsum(1), *i.x.cummax(1)],
    "norm": lambda i: [i.x.norm(), torch.linalg.vector_norm(i.x, 1, dim=1), i.x.norm(dim=0)],
    "logsumexp": lambda i: i.x.logsumexp(1),
    "prod": lambda i: i.x.prod(1),
    "count_nonzero": lambda i: i.ties.count_nonzero(1),
    # indexing
    "index": lambda i: [i.x[i.index], i.x[i.index, i.index], i.x[:, i.index], i.x[None, i.index]],
    "index on the CPU": lambda i: i.x[torch.tensor([1, 0])],
    "mask": lambda i: [i.x[i.x > 0], i.x.masked_select(i.ties == 1)],
    "index_put_": lambda i: written(i.x.clone(), lambda t: t.index_put_((i.index,), i.y[:3])),
    "index_put_ accumulates": lambda i: i.x.index_put((i.ties[0],), i.y[:1].expand(8, 8), accumulate=True),
    "assign by mask": lambda i: written(i.x.clone(), lambda t: t.__setitem__(t > 0, -1.0)),
    "assign a slice": lambda i: written(i.x.clone(), lambda t: t.__setitem__((slice(1, 3), 2), i.y[0, 0])),
    "index_select": lambda i: i.x.index_select(1, i.index),
    "index_add": lambda i: torch.zeros(4, 8, device=i.device).index_add_(0, i.ties[:, 0], i.x),
    "index_copy": lambda i: i.x.index_copy(0, i.index, i.y[:3]),
    "index_fill": lambda i: i.x.index_fill(1, i.index, 0.5),
    "take_along_dim": lambda i: i.x.take_along_dim(i.ties, dim=1),
    "gather": lambda i: i.x.gather(0, i.ties),
    "scatter": lambda i: [i.x.scatter(1, i.ties[:, :1], i.y), i.x.scatter(0, i.ties[:1], 3.0)],
    "scatter_add": lambda i: i.x.scatter_add(0, i.ties, i.y),
    "scatter_reduce": lambda i: i.x.scatter_reduce(0, i.ties, i.y, "amax", include_self=False),
    "masked_fill": lambda i: [i.x.masked_fill(i.x > 0, 0), i.x.masked_scatter(i.x > 0, i.y)],
    "nonzero": lambda i: [i.ties.nonzero(), *torch.where(i.ties > 2)],
    "repeat": lambda i: [i.x.repeat(2, 1), i.x.repeat_interleave(2, 0), i.x.repeat_interleave(i.ties[:, 0], 0)],
    "roll and flip": lambda i: [i.x.roll(1, 0), i.x.flip(1), i.x.tril(), i.x.triu(1)],
    "cat": lambda i: [torch.cat([i.x, i.y], 1), torch.stack([i.x, i.y]), torch.cat([i.x, i.empty])],
    "pad": lambda i: [F.pad(i.x, (1, 2), value=3.0), F.pad(i.x[None], (1, 1), mode="reflect")],
    "meshgrid": lambda i: torch.meshgrid(i.index, i.index, indexing="ij"),
    # order
    "sort": lambda i: [*i.x.sort(1, descending=True), *i.ties.sort(dim=0, stable=True)],
    "argsort": lambda i: [i.ties.argsort(stable=True), i.x.argsort(dim=0)],
    "topk": lambda i: [*i.x.topk(3), *i.x.topk(2, dim=0, largest=False)],
    "topk of ties": lambda i: i.ties.float().topk(5),
    "unique": lambda i: torch.unique(i.ties, return_inverse=True, return_counts=True),
    "bincount": lambda i: torch.bincount(i.ties.flatten(), minlength=6),
    "histc": lambda i: torch.histc(i.x, bins=5, min=-1, max=1),
    "searchsorted": lambda i: [torch.searchsorted(i.x.sort(1).values, i.y), torch.bucketize(i.x, i.x[0].sort().values)],
    "median and kthvalue": lambda i: [*i.x.median(1), *i.x.kthvalue(2, dim=0)],
    "one_hot": lambda i: F.one_hot(i.ties[0], 5),
    # linear algebra
    **{
        f"matmul {dtype}".replace("torch.", ""): lambda i, dtype=dtype: [
            i.x.to(dtype) @ i.weight.to(dtype),
            torch.bmm(i.x.to(dtype)[None], i.weight.to(dtype)[None]),
            torch.addmm(torch.ones(5, dtype=dtype, device=i.device), i.x.to(dtype), i.weight.to(dtype), alpha=2),
        ]
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int32)
    },
    "matmul of a vector": lambda i: [i.x @ i.x[0], torch.dot(i.x[0], i.x[1]), torch.outer(i.x[0], i.x[1])],
    "linear": lambda i: gradients(F.linear, i.x, i.weight.t()),
    "einsum": lambda i: torch.einsum("ij,jk,ik->k", i.x, i.weight, i.x[:, :5]),
    "baddbmm": lambda i: torch.baddbmm(i.x[None, :, :5], i.x[None], i.weight[None], beta=0.5),
    "inverse": lambda i: torch.linalg.inv(i.x @ i.x.t() + torch.eye(6, device=i.device)),
    "svd": lambda i: torch.linalg.svdvals(i.x),
    "cdist": lambda i: torch.cdist(i.x, i.y),
    # neural networks
    "conv1d": lambda i: gradients(F.conv1d, i.x[None], i.weight.t()[:, :6, None].expand(5, 6, 3)),
    "conv2d": lambda i: gradients(lambda t, w: F.conv2d(t, w, padding=1), i.image, i.image[:, :, :3, :3]),
    "conv_transpose2d": lambda i: F.conv_transpose2d(
        i.image, i.image[:1].expand(3, -1, -1, -1)[:, :, :2, :2], stride=2
    ),
    "pooling": lambda i: [F.max_pool2d(i.image, 2), F.avg_pool2d(i.image, 3), F.adaptive_avg_pool2d(i.image, 2)],
    "interpolate": lambda i: F.interpolate(i.image, scale_factor=2, mode="bilinear"),
    "layer_norm": lambda i: gradients(lambda t, w: F.layer_norm(t, (8,), w), i.x, i.y[0]),
    "rms_norm": lambda i: gradients(lambda t, w: F.rms_norm(t, (8,), w), i.x, i.y[0]),
    "group_norm": lambda i: F.group_norm(i.image, 3),
    "batch_norm": lambda i: gradients(lambda t: F.batch_norm(t, None, None, training=True), i.image),
    "softmax": lambda i: [*gradients(lambda t: t.softmax(-1), i.x), i.x.log_softmax(0), i.x.bfloat16().softmax(1)],
    "activations": lambda i: [f(i.x) for f in (F.silu, F.gelu, F.relu, F.elu, F.softplus, torch.tanh, torch.sigmoid)],
    "glu": lambda i: gradients(F.glu, i.x),
    "embedding": lambda i: gradients(lambda w: F.embedding(i.index, w), i.x),
    "attention": lambda i: gradients(lambda q, k: attention(q, k, is_causal=False), i.x, i.y),
    "causal attention": lambda i: gradients(lambda q, k: attention(q, k, is_causal=True), i.x, i.y),
    "losses": lambda i: [
        F.cross_entropy(i.x, i.ties[:, 0]),
        F.mse_loss(i.x, i.y),
        F.l1_loss(i.x, i.y),
        F.binary_cross_entropy_with_logits(i.x, i.y.sigmoid()),
        F.kl_div(i.x.log_softmax(1), i.y.softmax(1), reduction="batchmean"),
    ],
    "dropout off": lambda i: F.dropout(i.x, 0.5, training=False),
    # lists of tensors
    "foreach": lambda i: [*torch._foreach_add([i.x, i.weight], 1.0), *torch._foreach_mul([i.x, i.y], [i.y, i.x])],
    "foreach in-place": lambda i: written(
        [i.x.clone(), i.y.clone()], lambda ts: torch._foreach_addcdiv_(ts, [i.x, i.y], [i.y, i.x], 0.5)
    ),
    "foreach norm": lambda i: torch._foreach_norm([i.x, i.weight, i.image]),
    "foreach copy": lambda i: written([torch.zeros_like(i.x)], lambda ts: torch._foreach_copy_(ts, [i.y])),
    "clip_grad_norm_": lambda i: torch.nn.utils.get_total_norm([i.x, i.weight]),
    # nothing in it
    "zero size": lambda i: [
        i.empty + 1,
        i.empty.sum(0),
        i.empty @ i.weight,
        i.empty.softmax(1),
        i.x[i.x > 100],
        i.empty.to(torch.int32),
        i.empty.sort(1).values,
    ],
    "zero size gather": lambda i: [i.x.index_select(0, i.index[:0]), torch.cat([i.empty, i.empty])],
}


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    else:
        for each in value:
            yield from tensors_in(each)


def assert_identical(expected: torch.Tensor, got: torch.Tensor) -> None:
    assert got.device == DEVICE
    assert (got.dtype, got.shape, got.stride()) == (expected.dtype, expected.shape, expected.stride())
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
def test_same_as_on_the_cpu(name: str) -> None:
    on_cpu, on_npu = Inputs.on(torch.device("cpu")), Inputs.on(DEVICE)
    expected, got = list(tensors_in(CASES[name](on_cpu))), list(tensors_in(CASES[name](on_npu)))
    assert len(got) == len(expected)
    for want, have in zip(expected, got, strict=True):
        assert_identical(want, have)
    for field, before in vars(on_cpu).items():
        torch.testing.assert_close(getattr(on_npu, field).cpu(), before, rtol=0, atol=0, msg=f"{field} was changed")


def cases_that_differ(rank: int, num_ranks: int) -> list[str]:
    differ = []
    for name in CASES:
        try:
            test_same_as_on_the_cpu(name)
        except AssertionError as error:
            differ.append(f"{name}: {error}")
    return differ


@pytest.mark.parametrize("seed", ["1", "2"])
def test_same_as_on_the_cpu_with_asynchronous_streams(run_in_ranks: Callable[..., Any], seed: str) -> None:
    assert run_in_ranks(cases_that_differ, 1, env={"VLLM_NPU_EMULATOR_ASYNC": seed}).returned == [[]]


def reads_on_another_stream(rank: int, num_ranks: int, waits: bool) -> int:
    """How many of some sums and in-place sums, made on one stream, another one sees wrong."""
    wrong = 0
    x = torch.zeros(1000, device=DEVICE)
    for round_number in range(1, 41):
        new, in_place = x + round_number, torch.zeros_like(x).add_(round_number)
        other = torch.npu.Stream()
        if waits:
            other.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(other):
            seen = (new.sum().item(), in_place.sum().item())
        wrong += seen != (1000 * round_number, 1000 * round_number)
        torch.npu.synchronize()
    return wrong


def test_a_stream_that_does_not_wait_sees_old_values(run_in_ranks: Callable[..., Any]) -> None:
    env = {"VLLM_NPU_EMULATOR_ASYNC": "1"}
    assert run_in_ranks(reads_on_another_stream, 1, True, env=env).returned == [0]
    assert run_in_ranks(reads_on_another_stream, 1, False, env=env).returned[0] > 0


# --- aliasing ---


def test_other_memory_formats_are_refused_as_by_torch_npu() -> None:
    x = torch.ones(1, 2, 3, 4, device=DEVICE, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"only supported contiguous memory format\.\nERR01007"):
        x.contiguous(memory_format=torch.channels_last)
    x.transpose(1, 2).contiguous().sum().backward()
    assert torch.equal(x.grad.cpu(), torch.ones(1, 2, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_loss_in_one_kernel_rounds_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x, target, weight, positive = (torch.rand(64, 5, generator=generator).to(dtype) for _ in range(4))
    arguments = {"weight": weight, "pos_weight": positive, "reduction": "none"}
    wide = {name: value.float() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    expected = F.binary_cross_entropy_with_logits(x.float(), target.float(), **wide).to(dtype)
    on_npu = {name: value.npu() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    y = x.npu().requires_grad_()
    loss = F.binary_cross_entropy_with_logits(y, target.npu(), **on_npu)
    assert loss.dtype == dtype
    assert torch.equal(loss.detach().cpu(), expected)
    loss.sum().backward()
    assert y.grad.dtype == dtype


def test_a_tensor_may_be_larger_than_its_storage_in_its_allocation() -> None:
    x = torch.arange(16.0, device=DEVICE)
    x.untyped_storage().resize_(16)
    assert x.clone()[:4].tolist() == [0, 1, 2, 3]
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="does not fit into its storage of 0 bytes"):
        x.clone()


@pytest.mark.parametrize("make", [torch.zeros, torch.ones])
def test_new_tensors_of_a_device_ignore_pin_memory_as_torch_npus_do(make: Callable[..., torch.Tensor]) -> None:
    made = make(2, 3, dtype=torch.int32, device="npu", pin_memory=True)
    assert made.device.type == "npu"
    assert torch.equal(made.cpu(), make(2, 3, dtype=torch.int32))


def test_views_share_memory() -> None:
    x = torch.zeros(4, 6, device=DEVICE)
    views = [x[1], x.t(), x.view(-1), x.unsqueeze(0), x.split(2)[1], x.expand(2, 4, 6), x.diagonal(), x.detach()]
    views.append(x.view(torch.int32))
    assert {view.untyped_storage().data_ptr() for view in views} == {x.data_ptr()}
    x.fill_(1)
    assert all(bool((view != 0).all()) for view in views)


def test_in_place_returns_the_tensor_itself() -> None:
    x = torch.ones(3, device=DEVICE)
    pointer = x.data_ptr()
    out = torch.empty(3, device=DEVICE)
    assert x.add_(1) is x
    assert torch.mul(x, 2, out=out) is out
    assert x.data_ptr() == pointer


def test_results_with_gaps_between_elements_keep_them() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    expected = torch.linalg.lstsq(x, y).solution  # a window of what the kernel works on
    got = torch.linalg.lstsq(x.to(DEVICE), y.to(DEVICE)).solution
    assert got.stride() == expected.stride() == (1, 4)
    assert got.untyped_storage().nbytes() >= 44
    assert torch.equal(got.cpu(), expected)


def test_gradients_go_through_ops_that_pytorch_composes() -> None:
    x = torch.ones(3, device=DEVICE, requires_grad=True)
    (gradient,) = torch.autograd.grad(torch.true_divide(x, x.detach() * 2).sum(), x)
    assert gradient.tolist() == [0.5] * 3


def test_in_place_counts_versions() -> None:
    x = torch.ones(3, device=DEVICE, requires_grad=True)
    y = x.exp()
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_out_of_another_size_is_resized() -> None:
    small = torch.zeros(2, device=DEVICE)
    with pytest.warns(UserWarning, match="was resized"):
        torch.add(torch.ones(5, device=DEVICE), 1, out=small)
    assert small.tolist() == [2.0] * 5


# --- random numbers ---


def draws(generator: torch.Generator | None = None) -> list[torch.Tensor]:
    x = torch.empty(100, device=DEVICE)
    return [
        torch.rand(5, device=DEVICE, generator=generator),
        torch.randn(5, device=DEVICE, generator=generator),
        torch.randint(100, (5,), device=DEVICE, generator=generator),
        torch.randperm(9, device=DEVICE, generator=generator),
        x.uniform_(generator=generator).clone(),
        x.bernoulli_(0.5, generator=generator).clone(),
        torch.multinomial(torch.ones(10, device=DEVICE), 4, generator=generator),
    ]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(first, second, strict=True)]


def test_a_seeded_generator_repeats() -> None:
    generator = torch.Generator("npu").manual_seed(3)
    first = draws(generator)
    second = draws(generator)
    assert all(equal(first, draws(generator.manual_seed(3))))
    assert all(equal(second, draws(generator)))
    assert not all(equal(first, second))
    assert not all(equal(first, draws(generator.manual_seed(4))))


def test_the_default_generator_repeats() -> None:
    torch.manual_seed(5)
    first = draws()
    state = torch.npu.get_rng_state()
    second = draws()
    torch.manual_seed(5)
    assert all(equal(first, draws()))
    torch.npu.set_rng_state(state)
    assert all(equal(second, draws()))


def test_the_cpu_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    draws()
    F.dropout(torch.ones(5, device=DEVICE))
    assert torch.equal(torch.rand(3), expected)
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device=DEVICE, generator=torch.Generator())


def test_dropout() -> None:
    x = torch.ones(1000, device=DEVICE, requires_grad=True)
    torch.manual_seed(1)
    first = F.dropout(x, 0.25)
    torch.manual_seed(1)
    assert torch.equal(F.dropout(x, 0.25), first)
    kept = first != 0
    assert 650 < int(kept.sum()) < 850
    assert torch.equal(first[kept], torch.full_like(first[kept], 1 / 0.75))
    (gradient,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(gradient, first.detach())


def test_the_distribution_is_right() -> None:
    torch.manual_seed(0)
    values = torch.randn(20000, device=DEVICE).cpu()
    assert abs(values.mean()) < 4 / math.sqrt(20000)
    assert abs(values.std() - 1) < 0.03


# --- copies ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("layout", ["dense", "transposed", "strided"])
def test_copies_keep_values(dtype: torch.dtype, layout: str) -> None:
    values = (torch.arange(48).reshape(6, 8) % 3).to(dtype)
    source = {"dense": values, "transposed": values.t(), "strided": values[::2, 1::3]}[layout]
    there = source.to(DEVICE)
    between = torch.empty_like(there).copy_(there).to("npu:1").to(DEVICE)
    back = torch.empty_like(source).copy_(between)
    assert torch.equal(back.float(), source.float())
    assert (between.shape, between.dtype) == (source.shape, dtype)


def test_copies_convert() -> None:
    x = torch.tensor([1.7, -2.5, 300.0])
    assert torch.empty(3, dtype=torch.int32, device=DEVICE).copy_(x).tolist() == [1, -2, 300]
    assert torch.empty(3).copy_(x.to(DEVICE).half()).tolist() == x.half().tolist()
    assert torch.empty(2, 3, device=DEVICE).copy_(x).shape == (2, 3)
    with pytest.raises(RuntimeError, match="must match"):
        torch.empty(2, device=DEVICE).copy_(x)


@pytest.mark.parametrize("pinned", [False, True])
def test_copies_without_waiting(pinned: bool) -> None:
    source = torch.arange(1000.0)
    target = torch.zeros(1000, pin_memory=pinned)
    source = source.pin_memory() if pinned else source
    there = source.to(DEVICE, non_blocking=True)
    target.copy_(there + 1, non_blocking=True)
    torch.npu.synchronize()
    assert torch.equal(target, source + 1)


def test_copies_between_devices() -> None:
    x = torch.arange(5.0, device="npu:0")
    y = x.to("npu:1") * 2
    assert y.device == torch.device("npu:1")
    assert x.copy_(y).tolist() == [0, 2, 4, 6, 8]


def test_items() -> None:
    x = torch.tensor([1.5, 2.5], device=DEVICE)
    assert x[1].item() == 2.5
    assert int(x.sum()) == 4
    assert x.tolist() == [1.5, 2.5]
    assert bool((x == x).all())
    assert x.cpu().numpy().tolist() == [1.5, 2.5]


def test_integer_histogram() -> None:
    ids = torch.tensor([0, 3, 3, 7, 1, 3, 0, 9], dtype=torch.int32)
    counts = torch.histc(ids.to(DEVICE), bins=8, min=0, max=8)
    assert counts.dtype == torch.int32
    assert counts.tolist() == [2, 1, 0, 3, 0, 0, 0, 1]


# --- around the operators ---


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64])
def test_integers_divided_in_place_are_truncated(dtype: torch.dtype) -> None:
    """op-plugin's div_ takes them, and torch_npu averages so. PyTorch's CPU kernel refuses them."""
    values = torch.arange(100 if dtype == torch.uint8 else -100, 120, dtype=dtype)
    x = values.npu()
    assert x.div_(3) is x
    assert torch.equal(x.cpu(), values.div(3, rounding_mode="trunc"))
    x = values.npu()
    x /= torch.full((len(values),), 4, dtype=dtype, device="npu")
    assert torch.equal(x.cpu(), values.div(4, rounding_mode="trunc"))


def test_printing() -> None:
    assert str(torch.tensor([1, 2], device=DEVICE)) == "tensor([1, 2], device='npu:0')"
    assert "device='npu:0'" in repr(torch.rand(100, 100, device=DEVICE))


def test_save_and_load() -> None:
    x = torch.arange(4.0, device=DEVICE)
    file = io.BytesIO()
    torch.save({"x": x, "view": x[1:]}, file)
    file.seek(0)
    loaded = torch.load(file)
    assert loaded["x"].device == DEVICE
    assert torch.equal(loaded["view"], x[1:])
    file.seek(0)
    assert torch.load(file, map_location="cpu")["x"].tolist() == x.tolist()
    assert torch.equal(copy.deepcopy(x), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    x, y = torch.randn(4, 4), torch.randn(4, 4)
    with torch.autocast("npu", dtype=dtype):
        product = x.to(DEVICE) @ y.to(DEVICE)
        logits = product.softmax(-1)
    assert (product.dtype, logits.dtype) == (dtype, torch.float32)
    assert torch.equal(product.cpu(), x.to(dtype) @ y.to(dtype))


def test_autocast_of_the_cpu_is_not_applied() -> None:
    x = torch.ones(4, 4, device=DEVICE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.conv1d(x[None], x[..., None]).dtype == torch.float32


def test_inference_mode() -> None:
    with torch.inference_mode():
        x = torch.ones(3, device=DEVICE)
        x[1:].add_(1)
        assert x.tolist() == [1, 2, 2]


# --- errors ---


def test_an_op_without_a_cpu_kernel_fails_by_name() -> None:
    x = torch.ones(2, 3, device=DEVICE)
    with pytest.raises(NotImplementedError, match=r"aten::cudnn_grid_sampler is not emulated"):
        torch.ops.aten.cudnn_grid_sampler(x[None, None], torch.zeros(1, 2, 2, 2, device=DEVICE))


def test_a_missing_case_of_a_cpu_kernel_fails_by_name() -> None:
    x = torch.ones(3, device=DEVICE).to(torch.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match=r"(?s)Float8_e4m3fn.*aten::add.Tensor on the emulated npu"):
        x + x


def test_devices_do_not_mix() -> None:
    x = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"aten::add.*'other' is on cpu.*npu:0"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match=r"same device.*npu:1"):
        x + torch.ones(3, device="npu:1")
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(()).add_(x[0])


def test_bad_arguments_raise_what_they_raise_on_the_cpu() -> None:
    x = torch.ones(2, 3, device=DEVICE)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        x @ x
    with pytest.raises(IndexError, match="out of range"):
        x.sum(dim=5)
    with pytest.raises(IndexError, match="out of bounds"):
        x[torch.tensor([7], device=DEVICE)]


def test_sparse_results_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="dense tensors only"):
        torch.ones(2, 2, device=DEVICE).to_sparse()


def unsafe_data(rank: int, num_ranks: int) -> None:
    """A rank of its own: the mark and the check stay on in a process."""
    del rank, num_ranks
    from torch_npu.npu import _recovery

    a, b = torch.ones(3).npu(), torch.ones(3).npu()
    _recovery.set_npu_tensor_unsafe_check_flag(True)
    _recovery.mark_all_npu_tensor_unsafe(0)
    for read in (lambda: a + 1, lambda: a.cpu(), lambda: b.copy_(a)):
        with pytest.raises(RuntimeError, match="There is unsafe data in the input tensor"):
            read()
    b.copy_(torch.full((3,), 2.0))
    assert (b + 1).tolist() == [3.0] * 3


def test_data_marked_unsafe_is_not_read_until_it_is_written(run_in_ranks):
    run_in_ranks(unsafe_data, 1)
