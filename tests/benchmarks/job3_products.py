"""Job 3: k Hessian-vector products at one point, in gradients per product.

    python tests/benchmarks/job3_products.py [--rounds 7] [--quick] [--no-peers] [--json FILE]

A tanh network 784-256-256-10 with cross-entropy on 512 random rows, float32. Each row computes k products from
nothing, building included, in the layout its interface asks for; the time per product is divided by the time of one
gradient taken in the same rounds. With the primal pass kept, matrix-product counts give a floor of 1.34: a gradient
needs 2, 3 and 3 products of the three layers, a Hessian product 2, 6 and 6. Errors are relative to float64 products
computed forward over reverse.
"""

import argparse
import functools
import warnings
from itertools import pairwise
from typing import Any

import peers
import torch
from peers import Cell, Comparison, Row
from torch import Tensor
from torch.nn.functional import cross_entropy

import implicit

Params = dict[str, Tensor]


class Problem:
    """The network, its parameters, and up to 32 vectors with their exact products."""

    def __init__(self, toy: bool, counts: tuple[int, ...]) -> None:
        sizes, rows = ((6, 5, 5, 3), 8) if toy else ((784, 256, 256, 10), 512)
        generator = torch.Generator().manual_seed(0)
        self.params: Params = {}
        for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            scale = fan_in**-0.5
            self.params[f"{2 * layer}.weight"] = scale * torch.randn(fan_out, fan_in, generator=generator)
            self.params[f"{2 * layer}.bias"] = torch.zeros(fan_out)
        self.params = {name: p.to(torch.float32) for name, p in self.params.items()}
        self.rows = torch.randn(rows, sizes[0], generator=generator, dtype=torch.float32)
        self.labels = torch.randint(sizes[-1], (rows,), generator=generator)
        self.vectors = {
            name: torch.randn(max(counts), *p.shape, generator=generator, dtype=torch.float32)
            for name, p in self.params.items()
        }
        self.exact = self._products64()

    def loss(self, params: Params) -> Tensor:
        """Cross-entropy; the data follow the dtype of the parameters."""
        z = self.rows.to(params["0.weight"].dtype)
        depth = len(params) // 2
        for layer in range(depth):
            z = z @ params[f"{2 * layer}.weight"].T + params[f"{2 * layer}.bias"]
            z = torch.tanh(z) if layer < depth - 1 else z
        return cross_entropy(z, self.labels)

    def module(self) -> torch.nn.Sequential:
        """The same network as a module, for interfaces that want one."""
        shapes = [self.params[f"{2 * layer}.weight"].shape for layer in range(len(self.params) // 2)]
        layers: list[torch.nn.Module] = []
        for shape in shapes:
            layers += [torch.nn.Linear(shape[1], shape[0], dtype=torch.float32), torch.nn.Tanh()]
        network = torch.nn.Sequential(*layers[:-1])
        network.load_state_dict(self.params)
        return network

    def _products64(self) -> Tensor:
        point = {name: p.double() for name, p in self.params.items()}
        slope = torch.func.grad(self.loss)
        found = []
        for row in range(len(next(iter(self.vectors.values())))):
            tangent = {name: v[row].double() for name, v in self.vectors.items()}
            found.append(_flat(torch.func.jvp(slope, (point,), (tangent,))[1]))
        return torch.stack(found)

    def first(self, k: int) -> Params:
        """The first k vectors, stacked."""
        return {name: v[:k] for name, v in self.vectors.items()}

    def error(self, products: Tensor) -> float:
        """Largest relative error over the rows of ``products``, shape (k, n)."""
        exact = self.exact[: len(products)]
        gap = torch.linalg.vector_norm(products.double() - exact, dim=1)
        return float((gap / torch.linalg.vector_norm(exact, dim=1)).max())


def _flat(tree: Params) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in tree.values()])


def _as_rows(found: Any) -> Tensor:
    """Any layout of k products as a ``(k, n)`` matrix: stacked leaves, or one tuple of leaves per product."""
    if isinstance(found, Tensor):
        return found
    if isinstance(found, list):
        return torch.stack([torch.cat([leaf.reshape(-1) for leaf in product]) for product in found])
    leaves = found.values() if isinstance(found, dict) else found
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in leaves], dim=1)


def our_rows(problem: Problem, k: int) -> list[Row]:
    vectors = problem.first(k)

    def run() -> Params:
        return implicit.Hessian(problem.loss, problem.params).mm(vectors)

    return [Row("ours: Hessian(...).mm", run)]


def hand_rows(problem: Problem, k: int, quick: bool) -> list[Row]:
    names, vectors = list(problem.params), problem.first(k)
    gradient = torch.func.grad(problem.loss)

    def graph() -> tuple[list[Tensor], tuple[Tensor, ...]]:
        leaves = [p.detach().requires_grad_() for p in problem.params.values()]
        loss = problem.loss(dict(zip(names, leaves, strict=True)))
        return leaves, torch.autograd.grad(loss, leaves, create_graph=True)

    def one(row: int) -> list[Tensor]:
        return [vectors[name][row] for name in names]

    def kept_graph() -> list[tuple[Tensor, ...]]:
        leaves, slopes = graph()
        return [torch.autograd.grad(slopes, leaves, one(row), retain_graph=True) for row in range(k)]

    def fresh_graph() -> list[tuple[Tensor, ...]]:
        found = []
        for row in range(k):
            leaves, slopes = graph()
            found.append(torch.autograd.grad(slopes, leaves, one(row)))
        return found

    def grads_batched() -> tuple[Tensor, ...]:
        leaves, slopes = graph()
        return torch.autograd.grad(slopes, leaves, list(vectors.values()), is_grads_batched=True)

    def vjp_vmap() -> Params:
        _, pullback = torch.func.vjp(gradient, problem.params)
        return torch.func.vmap(lambda v: pullback(v)[0])(vectors)

    def jvp_vmap() -> Params:
        def product(v: Params) -> Params:
            return torch.func.jvp(gradient, (problem.params,), (v,))[1]

        return torch.func.vmap(product)(vectors)

    def linearize_vmap() -> Params:
        with warnings.catch_warnings():  # about its own graph
            warnings.simplefilter("ignore")
            _, push = torch.func.linearize(gradient, problem.params)
            return torch.func.vmap(push)(vectors)

    def functional_hvp() -> list[tuple[Tensor, ...]]:
        def loss(*leaves: Tensor) -> Tensor:
            return problem.loss(dict(zip(names, leaves, strict=True)))

        point = tuple(problem.params.values())
        return [torch.autograd.functional.hvp(loss, point, tuple(one(row)))[1] for row in range(k)]

    rows = [
        Row("by hand: double backward, graph kept, loop", kept_graph),
        Row("by hand: double backward, fresh graph each", fresh_graph),
        Row("by hand: double backward, is_grads_batched", grads_batched),
        Row("by hand: torch.func vjp of grad, vmap", vjp_vmap),
        Row("by hand: torch.func jvp of grad, vmap", jvp_vmap),
        Row("by hand: torch.autograd.functional.hvp, loop", functional_hvp),
    ]
    return rows if quick else [*rows, Row("by hand: torch.func.linearize, vmap", linearize_vmap)]


def curvlinops_rows(problem: Problem, k: int) -> list[Row]:
    from curvlinops import HessianLinearOperator

    network = problem.module()
    params = [p for p in network.parameters() if p.requires_grad]
    columns = _as_rows(problem.first(k)).T.contiguous()

    def run() -> Tensor:
        operator = HessianLinearOperator(
            network,
            torch.nn.CrossEntropyLoss(),
            params,
            [(problem.rows, problem.labels)],
            check_deterministic=False,
        )
        return (operator @ columns).T

    return [Row("curvlinops: HessianLinearOperator @ matrix", run)]


def gradient_row(problem: Problem) -> Row:
    """The unit of time."""

    def run() -> tuple[Tensor, ...]:
        leaves = {name: p.detach().requires_grad_() for name, p in problem.params.items()}
        return torch.autograd.grad(problem.loss(leaves), list(leaves.values()))

    return Row("unit: one gradient", run)


def table(arguments: argparse.Namespace) -> list[dict[str, Cell]]:
    """Run everything and print; returns the table."""
    quick = arguments.quick or arguments.toy
    counts = (1, 8) if quick else (1, 8, 32)
    problem = Problem(arguments.toy, counts)
    unit = gradient_row(problem)
    comparison = Comparison([unit])
    named: dict[str, dict[int, Row]] = {}
    for k in counts:
        before = len(comparison.rows)
        comparison.rows += our_rows(problem, k) + hand_rows(problem, k, quick)
        comparison.add_peer("curvlinops", functools.partial(curvlinops_rows, problem, k), arguments.peers)
        for row in comparison.rows[before:]:
            named.setdefault(row.name, {})[k] = row
            row.name += f", k = {k}"
    comparison.run(arguments)
    measured = [_line(problem, name, by_count, counts, unit) for name, by_count in named.items()]
    title = f"Job 3: k products, {problem.exact.shape[1]} parameters, {len(problem.rows)} rows, float32; "
    title += f"one gradient takes {1e3 * unit.median:.3g} ms; cells are gradients per product"
    peers.finish(arguments, title, comparison, measured)
    return measured


def _line(problem: Problem, name: str, by_count: dict[int, Row], counts: tuple[int, ...], unit: Row) -> dict[str, Cell]:
    line: dict[str, Cell] = {"row": name}
    for k in counts:
        line[f"k = {k}"] = by_count[k].median / k / unit.median if by_count[k].seconds else None
    largest = by_count[counts[-1]]
    line["runs"] = len(largest.seconds)
    line["relative error"] = problem.error(_as_rows(largest.answer)) if largest.seconds else None
    return line


def main() -> None:
    peers.settle()
    table(peers.parser(__doc__ or "", rounds=7).parse_args())


if __name__ == "__main__":
    main()
