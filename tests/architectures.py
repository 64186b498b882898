"""Small networks of every common kind, each with its loss and an independent dense Hessian.

The dense references do not share code with the operators under test: the plain forward passes below are elementary
operations (loops over time, explicit softmax, explicit statistics) where a module runs a fused kernel, and they are
differentiated forward over reverse. Not by ``torch.func.hessian``: in torch 2.13 it is silently wrong for layer norm
with a weight, whose backward pass it batches.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Parameters = dict[str, Tensor]
Plain = Callable[[Parameters, Tensor], Tensor]


@dataclass(frozen=True)
class Architecture:
    """A module with data and a loss.

    Attributes:
        module: float64, with seeded parameters and buffers.
        inputs: what the module is called with, batch first.
        targets: class indices (cross-entropy) or values (mean squared error).
        plain: the same outputs from parameters and inputs by elementary operations; None where the module itself
            consists of them.
        functional: whether torch.func can transform the module at all.
        forward: whether torch has forward mode for it.
        twice: whether torch's reverse-mode second derivatives are right.
    """

    module: nn.Module
    inputs: Tensor
    targets: Tensor
    plain: Plain | None = None
    functional: bool = True
    forward: bool = True
    twice: bool = True

    @property
    def parameters(self) -> Parameters:
        """Detached copies of the parameters, tied ones once."""
        return {name: p.detach().clone() for name, p in self.module.named_parameters()}

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss over a batch: convex in the outputs."""
        if targets.is_floating_point():
            return F.mse_loss(outputs, targets)
        return F.cross_entropy(outputs, targets)

    def outputs(self, parameters: Parameters, inputs: Tensor | None = None) -> Tensor:
        """The module's outputs, shape ``(batch, classes)``, with its parameters and buffers left as they are."""
        own = {p: name for name, p in self.module.named_parameters()}
        values = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        # One name per place that holds a parameter: torch's own tying leaves its arguments in modules used twice.
        for prefix, module in self.module.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                values[f"{prefix}.{key}" if prefix else key] = parameters[own[parameter]]
        given = self.inputs if inputs is None else inputs
        return torch.func.functional_call(self.module, values, (given,), tie_weights=False)

    def objective(self, parameters: Parameters) -> Tensor:
        """The mean loss over all data."""
        return self.loss(self.outputs(parameters), self.targets)

    def reference(self, parameters: Parameters) -> Tensor:
        """The outputs by elementary operations."""
        return self.plain(parameters, self.inputs) if self.plain is not None else self.outputs(parameters)

    def unravel(self, vector: Tensor) -> Parameters:
        """A vector of shape ``(n,)`` as parameters, in the order of ``named_parameters``."""
        own = dict(self.module.named_parameters())
        parts = torch.split(vector, [p.numel() for p in own.values()])
        return {name: part.reshape(p.shape) for (name, p), part in zip(own.items(), parts, strict=True)}

    @property
    def point(self) -> Tensor:
        """The parameters as one vector of shape ``(n,)``."""
        return torch.cat([p.reshape(-1) for p in self.parameters.values()])

    def dense_hessian(self) -> Tensor:
        """The ``(n, n)`` Hessian of :meth:`objective` at the parameters, by elementary operations."""

        def elementary(v: Tensor) -> Tensor:
            outputs = self.reference(self.unravel(v))
            if self.targets.is_floating_point():
                return ((outputs - self.targets) ** 2).mean()
            return (outputs.logsumexp(dim=1) - outputs[torch.arange(len(outputs)), self.targets]).mean()

        return _columns(torch.func.grad(elementary), self.point)

    def dense_jacobian(self) -> Tensor:
        """The ``(batch * classes, n)`` Jacobian of the outputs at the parameters, by elementary operations."""

        def outputs(v: Tensor) -> Tensor:
            return self.reference(self.unravel(v)).reshape(-1)

        return _columns(outputs, self.point)


def _columns(fn: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    """The Jacobian of ``fn``, one forward pass per column."""
    identity = torch.eye(len(point), dtype=point.dtype)
    return torch.func.vmap(lambda e: torch.func.jvp(fn, (point,), (e,))[1], out_dims=1)(identity)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + F.elu(block(x))
        return self.head(x)


class Bag(nn.Module):
    """Mean of embedded tokens, some of them repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens).mean(dim=1)))


class Attention(nn.Module):
    """One causal block of two heads, its kernel pinned to MATH or left to torch."""

    def __init__(self, *, math: bool) -> None:
        super().__init__()
        self.qkv, self.head, self.math = nn.Linear(4, 12), nn.Linear(4, 3), math

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)  # each (batch, heads, time, width)
        if self.math:
            with sdpa_kernel(SDPBackend.MATH):
                mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(mixed.transpose(1, 2).flatten(2).mean(dim=1))


def plain_attention(p: Parameters, x: Tensor) -> Tensor:
    q, k, v = (x @ p["qkv.weight"].T + p["qkv.bias"]).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / 2**0.5
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    weights = torch.exp(scores.masked_fill(future, -torch.inf))
    mixed = weights / weights.sum(dim=-1, keepdim=True) @ v
    return mixed.transpose(1, 2).flatten(2).mean(dim=1) @ p["head.weight"].T + p["head.bias"]


class Recurrent(nn.Module):
    """The last output of a recurrent layer; with ``lengths`` over packed sequences."""

    def __init__(self, kind: type[nn.RNNBase], lengths: tuple[int, ...] = (), **options: Any) -> None:
        super().__init__()
        self.core, self.lengths = kind(2, 3, batch_first=True, **options), torch.tensor(lengths)
        self.head = nn.Linear(6 if self.core.bidirectional else 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not len(self.lengths):
            return self.head(self.core(x)[0][:, -1])
        packed = nn.utils.rnn.pack_padded_sequence(x, self.lengths, batch_first=True, enforce_sorted=False)
        padded, _ = nn.utils.rnn.pad_packed_sequence(self.core(packed)[0], batch_first=True)
        return self.head(padded[torch.arange(len(x)), self.lengths - 1])


def rnn_cell(gates: Tensor, hidden_gates: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.tanh(gates + hidden_gates), state[1]


def lstm_cell(gates: Tensor, hidden_gates: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    i, f, g, o = (gates + hidden_gates).chunk(4, dim=-1)
    cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def gru_cell(gates: Tensor, hidden_gates: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    (r, z, n), (hr, hz, hn) = gates.chunk(3, dim=-1), hidden_gates.chunk(3, dim=-1)
    update = torch.sigmoid(z + hz)
    return (1 - update) * torch.tanh(n + torch.sigmoid(r + hr) * hn) + update * state[0], state[1]


def plain_recurrent(cell: Callable[..., tuple[Tensor, Tensor]], lengths: tuple[int, ...] = ()) -> Plain:
    def run(p: Parameters, x: Tensor) -> Tensor:
        ends = torch.tensor(lengths or (x.shape[1],) * len(x))[:, None]
        state, last = (x.new_zeros(len(x), 3),) * 2, x.new_zeros(len(x), 3)
        for time in range(x.shape[1]):
            gates = x[:, time] @ p["core.weight_ih_l0"].T + p["core.bias_ih_l0"]
            state = cell(gates, state[0] @ p["core.weight_hh_l0"].T + p["core.bias_hh_l0"], state)
            last = torch.where(ends == time + 1, state[0], last)
        return last @ p["head.weight"].T + p["head.bias"]

    return run


class TiedLanguageModel(nn.Module):
    """Embedding and output layer share one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(tokens).mean(dim=1))))


def plain_tied(p: Parameters, tokens: Tensor) -> Tensor:
    table = p["embedding.weight"]
    return torch.tanh(table[tokens].mean(dim=1) @ p["mix.weight"].T + p["mix.bias"]) @ table.T


class Autoencoder(nn.Module):
    """One layer twice, the second time transposed; a scalar gain and a parameter without entries."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(4, 3)
        self.again = self.encode
        self.gain = nn.Parameter(torch.ones(()))
        self.nothing = nn.Parameter(torch.zeros(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.encode(x) @ self.encode.weight)
        return self.gain * F.linear(torch.sigmoid(self.again(hidden)), self.encode.weight.T)


def plain_batch_norm(p: Parameters, x: Tensor) -> Tensor:
    """The net "batch norm, training": statistics of the batch itself."""
    h = x @ p["0.weight"].T + p["0.bias"]
    centred = h - h.mean(dim=0)
    h = centred / torch.sqrt((centred**2).mean(dim=0) + 1e-5) * p["1.weight"] + p["1.bias"]
    return torch.tanh(h) @ p["3.weight"].T + p["3.bias"]


def plain_layer_norm(p: Parameters, x: Tensor) -> Tensor:
    h = x @ p["0.weight"].T + p["0.bias"]
    centred = h - h.mean(dim=1, keepdim=True)
    h = centred / torch.sqrt((centred**2).mean(dim=1, keepdim=True) + 1e-5) * p["1.weight"] + p["1.bias"]
    return F.gelu(h) @ p["3.weight"].T + p["3.bias"]


def plain_weight_norm(p: Parameters, x: Tensor) -> Tensor:
    length, direction = (p[f"0.parametrizations.weight.original{i}"] for i in (0, 1))
    weight = length * direction / torch.sqrt((direction**2).sum(dim=1, keepdim=True))
    return torch.tanh(x @ weight.T + p["0.bias"]) @ p["2.weight"].T + p["2.bias"]


def _mlp(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 5), activation, nn.Linear(5, 3))


def _weight_norm() -> nn.Module:
    first = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    return nn.Sequential(first, nn.Tanh(), nn.Linear(6, 3))


ROWS, IMAGE, SIGNAL, SEQUENCE = (8, 4), (6, 2, 6, 6), (6, 2, 9), (5, 4, 2)
LENGTHS = (4, 2, 3, 1, 4)

# name: (module, shape of the inputs or number of tokens, outputs for a squared loss or None, options of Architecture)
MAKERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | int, int | None, dict[str, Any]]] = {
    "tanh": (lambda: _mlp(nn.Tanh()), ROWS, None, {}),
    "relu": (lambda: _mlp(nn.ReLU()), ROWS, None, {}),
    "gelu": (lambda: _mlp(nn.GELU()), ROWS, 3, {}),
    "silu and softplus": (lambda: nn.Sequential(_mlp(nn.SiLU()), nn.Softplus()), ROWS, 3, {}),
    "prelu": (lambda: _mlp(nn.PReLU()), ROWS, None, {}),
    "residual elu": (lambda: Residual(), (8, 5), None, {}),
    "dropout in eval": (lambda: nn.Sequential(_mlp(nn.Sigmoid()), nn.Dropout(0.5)).eval(), ROWS, None, {}),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)),
        IMAGE,
        None,
        {},
    ),
    "strided, grouped and max-pooled": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, groups=2), nn.MaxPool1d(2), nn.GELU(), nn.Conv1d(4, 2, 2, stride=2), nn.Flatten()
        ),
        SIGNAL,
        2,
        {},
    ),
    "batch norm in eval": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 2)).eval(),
        IMAGE,
        2,
        {},
    ),
    "batch norm, training": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)),
        ROWS,
        None,
        {"plain": plain_batch_norm},
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)),
        ROWS,
        None,
        {"plain": plain_layer_norm},
    ),
    "group norm": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(32, 2)),
        SIGNAL,
        2,
        {},
    ),
    "weight norm": (lambda: _weight_norm(), ROWS, None, {"plain": plain_weight_norm, "forward": False, "twice": False}),
    "embedding": (lambda: Bag(), 7, None, {}),
    "attention, MATH": (lambda: Attention(math=True), (4, 3, 4), None, {"plain": plain_attention}),
    "attention, default": (lambda: Attention(math=False), (4, 3, 4), None, {"plain": plain_attention}),
    "rnn": (lambda: Recurrent(nn.RNN), SEQUENCE, None, {"plain": plain_recurrent(rnn_cell)}),
    "lstm": (lambda: Recurrent(nn.LSTM), SEQUENCE, None, {"plain": plain_recurrent(lstm_cell)}),
    "gru": (lambda: Recurrent(nn.GRU), SEQUENCE, None, {"plain": plain_recurrent(gru_cell)}),
    "packed rnn": (
        lambda: Recurrent(nn.RNN, LENGTHS),
        SEQUENCE,
        None,
        {"plain": plain_recurrent(rnn_cell, LENGTHS), "functional": False, "forward": False},
    ),
    "packed lstm": (
        lambda: Recurrent(nn.LSTM, LENGTHS),
        SEQUENCE,
        None,
        {"plain": plain_recurrent(lstm_cell, LENGTHS), "functional": False, "forward": False},
    ),
    "packed gru": (
        lambda: Recurrent(nn.GRU, LENGTHS),
        SEQUENCE,
        None,
        {"plain": plain_recurrent(gru_cell, LENGTHS), "functional": False, "forward": False},
    ),
    "tied embedding": (lambda: TiedLanguageModel(), 6, None, {"plain": plain_tied}),
    "tied layers, scalar and empty parameters": (lambda: Autoencoder(), ROWS, 4, {}),
}


def _draw(shape: tuple[int, ...] | int, generator: torch.Generator) -> Tensor:
    if isinstance(shape, int):
        return torch.randint(shape, (6, 4), generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@functools.cache
def architecture(name: str) -> Architecture:
    """The architecture called ``name``, one of :data:`MAKERS`: the same numbers every time."""
    make, shape, width, options = MAKERS[name]
    generator = torch.Generator().manual_seed(list(MAKERS).index(name))
    with torch.random.fork_rng(devices=[]):  # modules initialize themselves from the global generator
        module = make().to(torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for key, buffer in module.named_buffers():
            if buffer.is_floating_point():
                drawn = torch.randn(buffer.shape, generator=generator, dtype=torch.float64)
                buffer.copy_(drawn.abs() + 0.5 if key.endswith("var") else drawn)
    inputs = _draw(shape, generator)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        outputs = Architecture(module, inputs, inputs).outputs(dict(module.named_parameters()))
    if width is None:
        targets = torch.randint(outputs.shape[1], (len(inputs),), generator=generator)
    else:
        targets = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
    return Architecture(module, inputs, targets, **options)
