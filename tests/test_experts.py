"""Experts against nn.Linear in a loop, and every path of the grouped product against one einsum."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import groupby

import beartype
import jaxtyping
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from switchkit import Experts, GatedMlp, Mixed, Mlp, MoELayer, Null, Rows, Shared, named
from switchkit.counts import count
from switchkit.experts import grouped

# The one file that the import hook leaves out, see shapes.py.
grouped_linear = jaxtyping.jaxtyped(grouped.grouped_linear, typechecker=beartype.beartype)
LOADS = [(3, 0, 5, 1), (0, 0, 0, 0), (0, 9, 0, 0), (2, 2, 2, 2), (1, 0, 0, 0), (0, 0, 4, 4), (3, 3, 3, 1)]
PATHS = {
    "loop, float64": (torch.float64, True, 1e-12),
    "loop, float32": (torch.float32, True, 1e-6),
    "one grouped call, float32": (torch.float32, True, 1e-6),
    "custom op, float64": (torch.float64, False, 1e-12),
    "custom op, float32": (torch.float32, False, 1e-6),
}


class QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-1.702 * x))


ACTIVATIONS = [
    ("relu", nn.ReLU()),
    ("gelu", nn.GELU()),
    ("gelu_tanh", nn.GELU(approximate="tanh")),
    ("quick_gelu", QuickGelu()),
    ("silu", nn.SiLU()),
]


def rows_of(x: Tensor, load: tuple[int, ...], known: bool = True) -> Rows:
    return Rows(x=x, load=torch.tensor(load), sizes=load if known else None)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("load", LOADS, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_grouped_linear_is_an_einsum(
    path: str, load: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and gradients; two rows beyond the last load are zero and give no gradient."""
    dtype, known, tolerance = PATHS[path]
    grouped_calls = []
    right = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **how: grouped_calls.append(1) or right(*args, **how))
    if "loop" in path:
        monkeypatch.setattr(grouped, "FEW_ROWS", 0)
    r = sum(load) + 2
    x = torch.randn(r, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 8, 12, dtype=dtype, requires_grad=True)
    b = torch.randn(4, 12, dtype=dtype, requires_grad=True) if bias else None
    y = grouped_linear(x, rows_of(x, load, known), weight, b)
    hot = torch.zeros(r, 4, dtype=dtype)
    hot[torch.arange(sum(load)), torch.arange(4).repeat_interleave(torch.tensor(load))] = 1
    expected = torch.einsum("re,ri,eio->ro", hot, x, weight)
    if b is not None:
        expected = expected + hot @ b
    assert (y[sum(load) :] == 0).all()
    probe = torch.randn_like(y)
    wanted = {"x": x, "weight": weight, **({} if b is None else {"bias": b})}
    found, right_ones = (oracle.gradients((out * probe).sum(), **wanted) for out in (y, expected))
    oracle.assert_same({"y": y, **found}, {"y": expected, **right_ones}, tolerance)
    in_runs = len(list(groupby(load))) <= 2
    assert bool(grouped_calls) == (dtype == torch.float32 and "loop" not in path and sum(load) >= 4 and not in_runs)


@pytest.mark.parametrize("load", LOADS, ids=str)
@pytest.mark.parametrize("wanted", [("x", "w1", "w2"), ("x",), ("w1", "w2"), ("w1",), ("w2",)], ids=str)
@pytest.mark.parametrize("path", ["loop, float64", "one grouped call, float32"])
def test_relu_mlp_is_two_products_around_a_relu(path: str, wanted: tuple[str, ...], load: tuple[int, ...]) -> None:
    """In one piece as in two, whatever needs a gradient; the ReLU closes half of the hidden units."""
    dtype, _, tolerance = PATHS[path]
    parts = {
        "x": torch.randn(sum(load) + 2, 8, dtype=dtype),
        "w1": torch.randn(4, 8, 12, dtype=dtype),
        "w2": torch.randn(4, 12, 16, dtype=dtype),
    }
    leaves = {name: parts[name].requires_grad_() for name in wanted}
    one = grouped.grouped_relu_mlp(parts["x"], parts["w1"], parts["w2"], load)
    hidden = grouped_linear(parts["x"], rows_of(parts["x"], load), parts["w1"])
    two = grouped_linear(hidden.relu(), rows_of(parts["x"], load), parts["w2"])
    assert (one[sum(load) :] == 0).all()
    probe = torch.randn_like(one)
    found, expected = (oracle.gradients((y * probe).sum(), **leaves) for y in (one, two))
    oracle.assert_same({"y": one, **found}, {"y": two, **expected}, tolerance)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("wanted", "products"), [("x", 2), ("w1", 2), ("w2", 1), ("x w1", 3), ("x w1 w2", 4)])
def test_what_is_frozen_costs_no_product(wanted: str, products: int) -> None:
    """Of two experts' two layers backwards: one for each gradient, and one for the gradient between the layers."""
    parts = {"x": torch.randn(4, 8), "w1": torch.randn(2, 8, 8), "w2": torch.randn(2, 8, 8)}
    for name, part in parts.items():
        part.requires_grad_(name in wanted.split())
    loads = rows_of(parts["x"].double(), (3, 1))
    x, w1, w2 = (part.double() for part in parts.values())
    for y, expected in (
        (grouped.grouped_relu_mlp(x, w1, w2, (3, 1)), products),
        (grouped_linear(x, loads, w1), len({*wanted.split()} - {"w2"})),
    ):
        with Products() as found:
            if y.requires_grad:
                y.sum().backward()
        assert found.count == 2 * expected


def test_many_rows_take_the_loop() -> None:
    x, weight = torch.randn(800, 8), torch.randn(2, 8, 12)
    assert grouped._few(x, weight, 2 * grouped.FEW_ROWS - 1)
    assert not grouped._few(x, weight, 2 * grouped.FEW_ROWS)
    assert not grouped._few(x, weight, 0)
    assert not grouped._few(x.double(), weight.double(), 3)
    assert not grouped._few(x.to("meta"), weight.to("meta"), 3), (
        "another device wants its ends there, and has no such call"
    )
    assert not grouped._few(x, torch.randn(2, 8, 13), 3), "strides of 16 bytes only"


def test_widths_that_are_no_multiple_of_16_bytes_work() -> None:
    load = (3, 1)
    x, weight = torch.randn(4, 5), torch.randn(2, 5, 7)
    y = grouped_linear(x, rows_of(x, load), weight)
    oracle.assert_same({"y": y}, {"y": torch.cat([x[:3] @ weight[0], x[3:] @ weight[1]])}, 1e-6)


def test_padded_layout_is_a_batched_product() -> None:
    x, weight, bias = torch.randn(3, 5, 8), torch.randn(3, 8, 12), torch.randn(3, 12)
    y = grouped_linear(x, Rows(x=x, load=torch.full((3,), 5)), weight, bias)
    for e in range(3):
        oracle.assert_same({"y": y[e]}, {"y": x[e] @ weight[e] + bias[e]}, 1e-6)


@pytest.mark.parametrize("layout", ["loop", "custom op", "padded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_sets_the_dtype(layout: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 8), torch.randn(2, 8, 8)
    rows = Rows(x=x.view(2, 2, 8), load=torch.tensor([2, 2])) if layout == "padded" else rows_of(x, (3, 1))
    if layout == "custom op":
        rows = replace(rows, sizes=None)
    with torch.autocast("cpu", dtype=dtype):
        y = grouped_linear(rows.x, rows, weight, torch.randn(2, 8))
    assert y.dtype == dtype


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # opcheck's own
def test_custom_ops_keep_their_promises() -> None:
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 8, 4, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(grouped.loop, (x, weight, torch.tensor([3, 2])))


class TestAgainstLinear:
    """nn.Linear modules with copied weights, one set per expert."""

    load = (3, 0, 2)

    def linear(self, weight: Tensor, bias: Tensor | None) -> nn.Linear:
        module = nn.Linear(*weight.shape, bias=bias is not None, dtype=weight.dtype)
        module.weight.data.copy_(weight.t())
        if bias is not None:
            module.bias.data.copy_(bias)
        return module

    def bias_of(self, bias: Tensor | None, e: int, part: slice = slice(None)) -> Tensor | None:
        return None if bias is None else bias[e, part]

    def made(self, cls: type[Experts], **options: object) -> tuple[Experts, Tensor]:
        experts = cls(6, 5, 3, **options).double()
        for name in ("b1", "b2"):
            if options.get("bias"):
                nn.init.normal_(getattr(experts, name))
        return experts, torch.randn(5, 6, dtype=torch.float64)

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize(("activation", "module"), ACTIVATIONS)
    def test_mlp(self, activation: str, module: nn.Module, bias: bool) -> None:
        experts, x = self.made(Mlp, activation=activation, bias=bias)
        parts = []
        for e, tokens in enumerate(x.split(self.load)):
            up = self.linear(experts.w1[e], self.bias_of(experts.b1, e))
            down = self.linear(experts.w2[e], self.bias_of(experts.b2, e))
            parts.append(nn.Sequential(up, module, down)(tokens))
        oracle.assert_same({"y": experts(rows_of(x, self.load))}, {"y": torch.cat(parts)}, 1e-12)

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize(("activation", "module"), ACTIVATIONS)
    def test_gated_mlp(self, activation: str, module: nn.Module, bias: bool) -> None:
        experts, x = self.made(GatedMlp, activation=activation, bias=bias)
        first, second = slice(0, 5), slice(5, 10)
        parts = []
        for e, tokens in enumerate(x.split(self.load)):
            gate = self.linear(experts.w1[e][:, first], self.bias_of(experts.b1, e, first))
            value = self.linear(experts.w1[e][:, second], self.bias_of(experts.b1, e, second))
            down = self.linear(experts.w2[e], self.bias_of(experts.b2, e))
            parts.append(down(module(gate(tokens)) * value(tokens)))
        oracle.assert_same({"y": experts(rows_of(x, self.load))}, {"y": torch.cat(parts)}, 1e-12)

    def test_defaults_are_those_of_the_papers(self) -> None:
        assert (Mlp(6, 5, 3).activation, GatedMlp(6, 5, 3).activation) == ("relu", "silu")
        assert Mlp(6, 5, 3).b1 is GatedMlp(6, 5, 3).b2 is None


@pytest.mark.parametrize("cls", [Mlp, GatedMlp])
def test_expert_dropout_works_on_hidden_activations_in_training_only(cls: type[Experts]) -> None:
    """With constant hidden activations and w2 of 1/d_ff, an output is the share that survived, scaled up."""
    experts = cls(1, 10_000, 1, dropout=0.25).double()
    for parameter in experts.parameters():
        nn.init.ones_(parameter)
    x = torch.ones(1, 1, dtype=torch.float64)
    rows = rows_of(x, (1,))
    full = experts.eval()(rows).item()
    noisy = experts.train()(rows).item()
    assert noisy != full
    # Five standard deviations of a mean of 10 000 survivors.
    assert abs(noisy / full - 1) < 5 * (0.25 / 0.75 / 10_000) ** 0.5
    assert experts.eval()(rows).item() == full


@pytest.mark.parametrize("cls", [Mlp, GatedMlp])
def test_weights_start_truncated_by_fan_in(cls: type[Experts]) -> None:
    """std sqrt(0.1 / fan_in), cut at two deviations, which leaves 0.88 of it."""
    experts = cls(200, 50, 8)
    for weight, fan_in in ((experts.w1, 200), (experts.w2, 50)):
        std = (0.1 / fan_in) ** 0.5
        assert weight.abs().max() <= 2 * std
        assert abs(weight.std() / std - 0.88) < 0.02


def test_experts_that_are_alike_start_as_copies_of_one() -> None:
    experts = Mlp(6, 5, 4, alike=True)
    for weight in (experts.w1, experts.w2):
        assert torch.equal(weight, weight[:1].expand_as(weight))
        assert weight[0].unique().numel() == 30
        assert weight.is_contiguous()


@pytest.mark.parametrize("name", list(named(Experts)))
@pytest.mark.parametrize("load", LOADS, ids=str)
def test_rows_of_no_expert_come_back_as_zeros(name: str, load: tuple[int, ...]) -> None:
    options = {"bias": True} if name in ("mlp", "gated_mlp") else {"constant": 1} if name == "null" else {}
    experts = named(Experts)[name](6, 5, 4, **options).double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(sum(load) + 3, 6, dtype=torch.float64)
    for known in (True, False):
        assert (experts(rows_of(x, load, known))[sum(load) :] == 0).all()


class TestShared:
    x = torch.randn(2, 3, 6, dtype=torch.float64)

    def layer(self, **options: object) -> MoELayer:
        torch.manual_seed(0)
        return MoELayer(6, 4, d_ff=5, experts=partial(Shared, **options)).double()

    def parts(self, layer: MoELayer) -> tuple[Tensor, Tensor]:
        """What the routed experts alone return, and one dense gated layer with the shared weights, by hand."""
        alone = MoELayer(6, 4, d_ff=5, experts=GatedMlp).double()
        alone.router.load_state_dict(layer.router.state_dict())
        alone.experts.load_state_dict(layer.experts.routed.state_dict())
        gate, value = (self.x @ layer.experts.shared.w1[0]).chunk(2, -1)
        return alone(self.x)[0], (F.silu(gate) * value) @ layer.experts.shared.w2[0]

    def test_plain_sum(self) -> None:
        layer = self.layer(num_shared=3, width=2)
        assert layer.experts.shared.w2.shape == (1, 6, 6)
        routed, always = self.parts(layer)
        oracle.assert_same({"y": layer(self.x)[0]}, {"y": routed + always}, 1e-12)

    def test_sigmoid_gate(self) -> None:
        layer = self.layer(mix="gate")
        routed, always = self.parts(layer)
        gate = 1 / (1 + torch.exp(-self.x @ layer.experts.mix_weight.t()))
        oracle.assert_same({"y": layer(self.x)[0]}, {"y": routed + gate * always}, 1e-12)

    def test_learned_mix(self) -> None:
        layer = self.layer(mix="learned")
        routed, always = self.parts(layer)
        a, b = torch.exp(self.x @ layer.experts.mix_weight.t()).unbind(-1)
        expected = (a.unsqueeze(-1) * routed + b.unsqueeze(-1) * always) / (a + b).unsqueeze(-1)
        oracle.assert_same({"y": layer(self.x)[0]}, {"y": expected}, 1e-12)

    def test_padding_gets_nothing(self) -> None:
        layer = self.layer(experts=partial(Mlp, bias=True))
        nn.init.ones_(layer.experts.shared.b2)
        valid = torch.tensor([[True, True, False], [False, True, True]])
        y, _ = layer(self.x, valid)
        assert (y[~valid] == 0).all()
        assert (y[valid] != 0).all()

    def test_all_tokens_pass_and_are_counted(self) -> None:
        counts = [count(MoELayer(6, 4, d_ff=5, experts=experts), 1) for experts in (GatedMlp, Shared)]
        assert counts[1].other - counts[0].other == 2 * 3 * 6 * 5
        assert counts[1].active - counts[0].active == counts[1].parameters - counts[0].parameters == 3 * 6 * 5


def test_null_experts_by_hand() -> None:
    """Of six experts: two feed-forward, one zero, two copies, one constant, in this order."""
    experts = Null(6, 5, 6, zero=1, copy=2, constant=1).double()
    assert experts.full == 2
    load = (2, 1, 2, 1, 2, 3)
    x = torch.randn(sum(load), 6, dtype=torch.float64)
    parts = list(x.split(load))
    full = [torch.relu(part @ experts.routed.w1[e]) @ experts.routed.w2[e] for e, part in enumerate(parts[:2])]
    a, b = torch.exp(parts[5] @ experts.gate[0].t()).unsqueeze(-1).unbind(1)
    constant = (a * parts[5] + b * experts.vector[0]) / (a + b)
    expected = torch.cat([*full, torch.zeros_like(parts[2]), parts[3], parts[4], constant])
    for known in (True, False):
        oracle.assert_same({"y": experts(rows_of(x, load, known))}, {"y": expected}, 1e-12)
    assert Null(6, 5, 1).full == 1
    assert (Null(6, 5, 4).zero, Null(6, 5, 4).copy, Null(6, 5, 4).full) == (1, 1, 2)


def test_mixed_widths_by_hand() -> None:
    experts = Mixed(6, 5, 4, widths=[[1, 3], [2, 8], [1, 2]]).double()
    assert [stack.d_ff for stack in experts.stacks] == [3, 8, 2]
    load = (2, 0, 3, 1)
    x = torch.randn(sum(load) + 2, 6, dtype=torch.float64)
    parts = []
    for e, part in enumerate(x[: sum(load)].split(load)):
        stack, inner = ((0, 0), (1, 0), (1, 1), (2, 0))[e]
        weights = experts.stacks[stack]
        parts.append(torch.relu(part @ weights.w1[inner]) @ weights.w2[inner])
    expected = torch.cat([*parts, torch.zeros(2, 6, dtype=torch.float64)])
    for known in (True, False):
        oracle.assert_same({"y": experts(rows_of(x, load, known))}, {"y": expected}, 1e-12)
    assert Mixed(6, 5, 5).widths == [[2, 2], [1, 5], [2, 8]]
    assert Mixed(6, 1, 1).widths == [[1, 1]]


def test_always_and_mix_do_nothing_unless_told() -> None:
    experts, x = Mlp(6, 5, 4), torch.randn(2, 3, 6)
    assert experts.always(x) is None
    assert torch.equal(experts.mix(x, 2 * x, x), 3 * x)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Mlp(0, 5, 4), "d_model must be at least 1; got 0"),
        (lambda: Mlp(6, -5, 4), "d_ff must be at least 1; got -5"),
        (lambda: GatedMlp(6, 5, 0), "num_experts must be at least 1; got 0"),
        (
            lambda: Mlp(6, 5, 4, activation="tanh"),
            "activation must be 'relu', 'gelu', 'gelu_tanh', 'quick_gelu' or 'silu'; got 'tanh'",
        ),
        (lambda: GatedMlp(6, 5, 4, dropout=1.0), "dropout must be in [0, 1); got 1.0"),
        (lambda: Mlp(6, 5, 4, dropout=-0.1), "got -0.1"),
        (lambda: Shared(6, 5, 4, num_shared=0), "num_shared must be at least 1; got 0"),
        (lambda: Shared(6, 5, 4, width=-1), "width must be at least 1; got -1"),
        (lambda: Shared(6, 5, 4, mix="mean"), "mix must be 'sum', 'gate' or 'learned'; got 'mean'"),
        (lambda: Null(6, 5, 4, zero=-1), "zero must be at least 0; got -1"),
        (lambda: Null(6, 5, 4, copy=4), "leaves -1 feed-forward experts of num_experts=4: at least 1 must remain"),
        (lambda: Mixed(6, 5, 4, widths=[[2, 8]]), "widths=[[2, 8]] has 2 experts, but num_experts=4"),
        (lambda: Mixed(6, 5, 4, widths=[[4, 0]]), "widths must be pairs [count, d_ff] of numbers >= 1; got [[4, 0]]"),
        (lambda: Mixed(6, 5, 4, widths=[]), "got []"),
    ],
)
def test_bad_options_are_refused(make, says: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make()
    assert says in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_one_call_on_a_device(monkeypatch: pytest.MonkeyPatch, unchecked: None, compiled: bool) -> None:
    """What a GPU does in bfloat16, on the CPU: the loads stay a tensor, an expert is idle, two rows are spare."""
    monkeypatch.setattr(grouped, "_one_call", lambda x, weight: x.dtype == torch.bfloat16)
    load = (3, 0, 4, 1)
    x = torch.randn(10, 8).bfloat16().requires_grad_()
    weight = torch.randn(4, 8, 16).bfloat16().requires_grad_()

    def call(x: Tensor, weight: Tensor, load: Tensor) -> Tensor:
        # A step before, so that a gradient that stops here is seen.
        return grouped.grouped_linear(2 * x, Rows(x=x, load=load), weight)

    run = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    found = run(x, weight, torch.tensor(load))
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    wanted = grouped.grouped_linear(2 * exact[0], rows_of(exact[0], load), exact[1])
    probe = torch.randn(10, 16).bfloat16()
    grads = torch.autograd.grad((found * probe).sum(), (x, weight))
    right = torch.autograd.grad((wanted * probe).sum(), exact)
    for one, other in zip((found, *grads), (wanted, *right), strict=True):
        assert (one.double() - other).norm() / other.norm() < 1e-2
    assert (found[8:] == 0).all()
    assert (grads[1][1] == 0).all()
