"""Every preset: from code and from the command line the same layer, over any recipe, and what it takes where it does
not fit. That each is the system of its name is held in `parity/`."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path

import pytest
import torch
from shapes import PACKAGE

import switchkit
from switchkit import MoELayer
from switchkit.cli.arguments import Arguments
from switchkit.cli.errors import UserError
from switchkit.cli.recipes import recipes
from switchkit.cli.settings import compose
from switchkit.presets import Parts, preset, preset_parts, presets
from switchkit.spec import build

NAMES = presets()
WRONG = sorted(name.rpartition("/")[2] for name in recipes() if name.startswith("routing/as_published/"))
SMALL = [
    ("model.net.d_model", "8"),
    ("model.net.num_layers", "2"),
    ("model.net.num_heads", "2"),
    ("model.net.d_ff", "8"),
    ("model.net.context", "12"),
    ("model.net.num_experts", "16"),
]
# Parts that see the future are refused by a decoder, with the text of the part.
LEAKING = {name for name in NAMES if preset(name, d_model=4, d_ff=4, num_experts=16).leaks}


def described(layer: MoELayer) -> dict[str, object]:
    """The parts of a layer and all their options."""
    parts = {"layer": layer, "router": layer.router, "capacity": layer.capacity, "experts": layer.experts}
    found: dict[str, object] = {"layer": (layer.group, layer.dropped, layer.num_experts, layer.d_ff)}
    for place, part in parts.items():
        names = [name for name in inspect.signature(type(part).__init__).parameters if hasattr(part, name)]
        plain = {name: getattr(part, name) for name in names if isinstance(getattr(part, name), (int, float, str))}
        found[place] = (found.get(place), type(part), plain)
    found["weights"] = [(name, p.shape) for name, p in layer.named_parameters()]
    return found


def composed(name: str, *edits: tuple[str, str], published: bool = False) -> dict:
    """What `switchkit fit --config tiny_shakespeare --config routing/NAME` is told."""
    configs = ["tiny_shakespeare", f"routing/{name}"] + [f"routing/as_published/{name}"] * published
    return compose("fit", Arguments(configs=configs, edits=[*SMALL, *edits]))


def model_of(tree: dict) -> torch.nn.Module:
    return build(tree["model"])(vocab_size=11)


def allowed(name: str) -> list[tuple[str, str]]:
    return [("model.net.allow_leak", "true")] if name in LEAKING else []


@pytest.mark.parametrize("name", NAMES)
def test_a_fragment_trains_over_a_recipe(name: str) -> None:
    tree = composed(name, *allowed(name))
    model = model_of(tree).train()
    parts = preset_parts(name)
    out = model.net(torch.randint(11, (2, 12)))
    assert len(out.routings) == 1
    terms = [make() for make in parts.losses]
    assert [(type(t), vars(t)) for t in model.losses] == [(type(t), vars(t)) for t in terms]
    loss = out.logits.logsumexp(-1).mean() + sum(term.weight * term(out.routings) for term in terms)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    experts = model.net.get_submodule(model.sparse_layers[0]).experts
    assert all(p.grad is not None for p in experts.parameters())


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_code_and_command_line_build_the_same_layer(name: str, published: bool) -> None:
    if published and name not in WRONG:
        return
    leak = [("model.net.allow_leak", "true")]
    model = model_of(composed(name, *leak, published=published))
    layer = preset(name, d_model=8, d_ff=8, num_experts=16, as_published=published)
    assert described(layer) == described(model.net.get_submodule(model.sparse_layers[0]))
    parts = preset_parts(name, as_published=published)
    assert [(type(t), vars(t)) for t in model.losses] == [(type(t()), vars(t())) for t in parts.losses]


def test_the_readme_counts_them() -> None:
    text = " ".join((PACKAGE.parent / "README.md").read_text("utf-8").split())
    assert (len(NAMES), len(LEAKING)) == (24, 10)
    assert "names the 24 of them. Ten let a decoder see later tokens, and it refuses them:" in text


@pytest.mark.parametrize("name", sorted(LEAKING))
def test_a_decoder_refuses_what_sees_the_future(name: str) -> None:
    with pytest.raises(ValueError, match="a causal model would see the future"):
        model_of(composed(name))


def test_callbacks_come_with_the_fragment() -> None:
    (bias,) = preset_parts("deepseek_v3").callbacks
    (spec,) = composed("deepseek_v3")["trainer"]["callbacks"]
    assert spec["class_path"].endswith(".UpdateRouterBias")
    assert vars(bias()) == {"rate": 0.001, "freeze_step": None, "center": False}
    assert not any(preset_parts(name).callbacks for name in NAMES if name != "deepseek_v3")


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_few_experts_cut_into_pieces_hold_many_choices(name: str) -> None:
    few = ("model.net.num_experts", "8")
    with pytest.raises((ValueError, UserError), match=r"k=\d choices do not fit into the \d experts"):
        model_of(composed(name, few))
    model = model_of(composed(name, few, ("model.moe.granularity", "8")))
    assert model.net.get_submodule(model.sparse_layers[0]).num_experts == 64


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_experts", [1, 2, 3, 8])
def test_too_few_experts_take_what_fits_with_one_warning(name: str, num_experts: int) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        layer = preset(name, d_model=4, d_ff=4, num_experts=num_experts)
    original = preset_parts(name).moe.keywords["router"].keywords.get("k", 2 if "gshard" in str(layer.router) else 1)
    assert len(said) <= 1
    if original > num_experts:
        assert f"k={original}" in str(said[0].message)
        assert f"num_experts={num_experts}: took k={num_experts}" in str(said[0].message)
        assert layer.router.k == num_experts
        assert Path(said[0].filename) == Path(__file__)
    y, _ = layer(torch.randn(1, 5, 4), None, torch.arange(5).view(1, 5))
    assert torch.isfinite(y).all()


def test_groups_that_do_not_divide_become_the_nearest_that_do() -> None:
    with pytest.warns(UserWarning, match="groups=8.*num_experts=36: took groups=9$"):
        layer = preset("deepseek_v3", d_model=4, d_ff=4, num_experts=36)
    assert (layer.router.groups, layer.router.top_groups, layer.router.k) == (9, 4, 8)


@pytest.mark.parametrize("name", WRONG)
def test_as_published_changes_something(name: str) -> None:
    mended, published = preset_parts(name), preset_parts(name, as_published=True)
    assert repr(mended) != repr(published)
    assert isinstance(mended, Parts)


def test_experts_of_labml_start_alike_as_published_only() -> None:
    published, mended = (preset("labml", d_model=4, d_ff=4, num_experts=3, as_published=p) for p in (True, False))
    assert (published.experts.w1 == published.experts.w1[:1]).all()
    assert (published.experts.w2 == published.experts.w2[:1]).all()
    assert not torch.equal(mended.experts.w1[0], mended.experts.w1[1])


@pytest.mark.parametrize(
    ("name", "std"), [("switch", 0.02), ("deepseek_v3", 0.006), ("hf_switch", 1.0), ("labml", (0.1 / 256) ** 0.5)]
)
def test_routers_start_at_the_deviation_of_the_system(name: str, std: float) -> None:
    router = preset(name, d_model=256, d_ff=1, num_experts=64, as_published=name == "hf_switch").router
    assert 0.85 * std < router.weight.std() < 1.03 * std
    assert getattr(router, "offset", None) is None or not router.offset.any()


@pytest.mark.parametrize(
    ("router", "option", "value"),
    [
        ("Switch", "init_std", 0.0),
        ("TopK", "init_std", float("nan")),
        ("GShard", "init_std", -1.0),
        ("TopK", "scale", 0.0),
    ],
)
def test_options_that_only_presets_need_are_checked_too(router: str, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option} must be a finite number > 0.*got {value}"):
        getattr(switchkit, router)(4, 4, **{option: value})


@pytest.mark.parametrize("name", ["mixtrall", "as_published/mixtral", "tiny_shakespeare"])
def test_an_unknown_name_lists_the_known(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown preset '{name}'.*Presets: base, .*, v_moe"):
        preset_parts(name)


def test_the_misspelt_name_is_named() -> None:
    with pytest.raises(ValueError, match="Did you mean 'mixtral'"):
        preset("mixtrall", d_model=4, d_ff=4, num_experts=2)


def test_presets_are_public_names() -> None:
    assert switchkit.preset is preset
    assert switchkit.preset_parts is preset_parts


@pytest.mark.parametrize("name", NAMES)
def test_a_fragment_says_what_it_chooses(name: str) -> None:
    """Its first line is a sentence and a source; then the twelve choices on which systems differ silently."""
    lines = recipes()[f"routing/{name}"].read_text("utf-8").splitlines()
    assert re.fullmatch(r"# \S.*\. \S.*", lines[0])
    assert [int(line[2:].partition(".")[0]) for line in lines if re.match(r"# \d+\. ", line)] == list(range(1, 13))
    assert (name in LEAKING) == any("allow_leak" in line for line in lines)
    if name in WRONG:
        assert any("as_published" in line for line in lines)


def test_a_fragment_touches_only_the_routing() -> None:
    for name in (n for n in recipes() if n.startswith("routing/")):
        found = switchkit.cli.recipes.load_yaml(recipes()[name].read_text("utf-8"))
        assert set(found["model"]) == {"init_args"}
        assert set(found["model"]["init_args"]) <= {"moe", "losses"}
        assert set(found.get("trainer", {})) <= {"callbacks+"}
        assert set(found) <= {"model", "trainer"}
