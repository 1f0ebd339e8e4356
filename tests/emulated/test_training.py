"""Training on the emulated device: equal to the CPU, on several ranks, and under torch.compile."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.emulated

NPU = torch.device("npu:0")
CPU = torch.device("cpu")


class SmallTransformer(nn.Module):
    def __init__(self, vocabulary: int = 17, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        query, key, value = self.qkv(self.norm(hidden)).chunk(3, dim=-1)
        scores = (query @ key.mT).softmax(-1)
        hidden = hidden + scores @ value
        return self.head(hidden + self.mlp(self.norm(hidden)))


@dataclass
class Outcome:
    losses: list[float]
    weights: dict[str, torch.Tensor]

    def assert_equal(self, other: "Outcome") -> None:
        assert self.losses == other.losses
        for name, weight in self.weights.items():
            torch.testing.assert_close(weight, other.weights[name], rtol=0, atol=0, msg=name)


def train(device: torch.device, optimizer_of: Callable[..., torch.optim.Optimizer], steps: int = 6) -> Outcome:
    torch.manual_seed(1)
    model = SmallTransformer().to(device)
    tokens = torch.randint(17, (4, 9)).to(device)
    optimizer = optimizer_of(model.parameters())
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return Outcome(losses, {name: weight.cpu() for name, weight in model.state_dict().items()})


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "AdamW, foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_equals_the_cpu_bit_for_bit(name: str) -> None:
    on_cpu = train(CPU, OPTIMIZERS[name])
    on_npu = train(NPU, OPTIMIZERS[name])
    on_npu.assert_equal(on_cpu)
    assert on_npu.losses[-1] < on_npu.losses[0]


def test_training_with_dropout_repeats() -> None:
    def losses() -> list[float]:
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.5), nn.ReLU(), nn.Linear(32, 1)).to(NPU)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        seen = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(torch.ones(4, 8, device=NPU)).square().mean()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        return seen

    assert losses() == losses()


def test_checkpointed_dropout_draws_the_same_numbers_again() -> None:
    x = torch.ones(64, device=NPU, requires_grad=True)
    kept = []

    def layer(t: torch.Tensor) -> torch.Tensor:
        dropped = F.dropout(t, 0.5)
        kept.append(dropped.detach() != 0)
        return dropped.exp()

    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert len(kept) == 2
    assert torch.equal(kept[0], kept[1])


def test_mixed_precision() -> None:
    torch.manual_seed(3)
    model = SmallTransformer().to(NPU)
    tokens = torch.randint(17, (4, 9)).to(NPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("npu", init_scale=2.0**10)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        with torch.autocast("npu", dtype=torch.float16):
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_torch_compile_with_aot_eager() -> None:
    torch.manual_seed(4)
    model = SmallTransformer().to(NPU)
    tokens = torch.randint(17, (4, 9)).to(NPU)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def loss_and_gradients(module: nn.Module) -> list[torch.Tensor]:
        loss = F.cross_entropy(module(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    for eager, ahead in zip(loss_and_gradients(model), loss_and_gradients(compiled), strict=True):
        torch.testing.assert_close(ahead, eager)


# --- two ranks ---

DDP_BATCH, DDP_STEPS = 8, 5


def train_on_slices(model: nn.Module, device: torch.device, rank: int, num_ranks: int) -> list[torch.Tensor]:
    """Each rank trains on its slice of one batch; the mean over slices of equal size is the mean over the batch."""
    generator = torch.Generator().manual_seed(6)
    inputs = torch.randn(DDP_BATCH, 8, generator=generator).chunk(num_ranks)[rank].to(device)
    targets = torch.randn(DDP_BATCH, 1, generator=generator).chunk(num_ranks)[rank].to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(DDP_STEPS):
        optimizer.zero_grad()
        F.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    return [parameter.detach().cpu() for parameter in model.parameters()]


def ddp_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1))


def train_with_ddp(rank: int, num_ranks: int) -> list[torch.Tensor]:
    device = torch.device("npu", torch.npu.current_device())
    # the ranks start apart: DDP gives all of them rank 0's weights
    model = nn.parallel.DistributedDataParallel(ddp_model(seed=rank).to(device), device_ids=[device.index])
    return train_on_slices(model, device, rank, num_ranks)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_ddp_on_two_ranks_equals_one_process(run_in_ranks: Callable[..., Any], asynchronous: bool) -> None:
    env = {"VLLM_NPU_EMULATOR_ASYNC": "1"} if asynchronous else {}
    first, second = run_in_ranks(train_with_ddp, 2, env=env).returned
    alone = train_on_slices(ddp_model(seed=0), CPU, rank=0, num_ranks=1)
    for mine, other, expected in zip(first, second, alone, strict=True):
        assert torch.equal(mine, other)
        # the batch is summed in another order, so not to the last bit
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
