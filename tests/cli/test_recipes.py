from __future__ import annotations

import math
import os

import pytest
import torch
import yaml

from switchkit.cli import recipes as module
from switchkit.cli.errors import UserError
from switchkit.cli.recipes import _piped, find_config, load_yaml, read_config, recipes
from switchkit.parallel import layout as layout_of


@pytest.fixture
def packaged(folder, monkeypatch):
    """A package with recipes of its own, as a wheel has it."""
    package = folder / "site" / "switchkit"
    (package / "recipes" / "routing").mkdir(parents=True)
    (package / "recipes" / "tiny.yaml").write_text("# A tiny one.\n")
    (package / "recipes" / "routing" / "soft.yaml").write_text("# Soft.\n")
    monkeypatch.setattr(module, "_PACKAGE", package)
    return package


def test_names_of_packaged_recipes(packaged):
    assert list(recipes()) == ["routing/soft", "tiny"]


def test_a_checkout_has_them_beside_the_package(packaged):
    (packaged / "recipes").rename(packaged.parent / "recipes")
    assert recipes()["tiny"] == packaged.parent / "recipes" / "tiny.yaml"


@pytest.mark.parametrize("name", ["tiny", "tiny.yaml", "recipes/tiny.yaml"])
def test_a_recipe_is_found_by_name(packaged, name):
    assert find_config(name) == packaged / "recipes" / "tiny.yaml"


def test_a_file_comes_before_a_recipe_of_its_name(packaged, folder):
    (folder / "tiny").write_text("")
    assert find_config("tiny").resolve() == folder / "tiny"


def test_an_unknown_name_names_the_nearest(packaged):
    with pytest.raises(UserError, match=r"Did you mean 'tiny'\? Recipes: routing/soft, tiny"):
        find_config("tinny")


def test_list_shows_a_recipe_s_first_comment(packaged, run):
    code, out, _ = run("list", "recipes")
    assert code == 0
    assert "tiny" in out
    assert "A tiny one." in out


def test_numbers_are_read_as_the_parser_reads_them():
    found = load_yaml("[1e-3, 1.5e3, -.5, 3, .inf, 2020-01-01, 1.0]")
    assert found == [1e-3, 1500.0, -0.5, 3, math.inf, "2020-01-01", 1.0]


@pytest.mark.slow
def test_a_pipe_is_a_configuration_and_is_read_once(folder, run):
    """As in ``--config <(switchkit describe --config R --twin flops)``; `audit` composes its settings twice."""
    text = (folder / "small.yaml").read_text()
    for command in (["describe"], ["audit"]):
        reading, writing = os.pipe()
        os.write(writing, text.encode())
        os.close(writing)
        try:
            code, _, err = run(*command, "--config", f"/dev/fd/{reading}")
        finally:
            os.close(reading)
            _piped.cache_clear()
        assert (code, "Traceback" in err) == (0, False), err


def test_an_empty_file_says_nothing(folder):
    (folder / "empty.yaml").write_text("# nothing\n")
    assert read_config(folder / "empty.yaml") == {}


def test_where_nothing_names_a_model_the_empty_file_is_named(folder, run):
    (folder / "empty.yaml").write_text("# nothing\n")
    assert "no model is given, and empty.yaml is empty: give a recipe" in run("fit", "--config", "empty.yaml")[2]


@pytest.mark.parametrize("kind", ["file", "file of long ago", "folder"])
def test_a_checkpoint_is_no_recipe(folder, run, kind):
    if kind == "folder":
        (folder / "a.ckpt").mkdir()
    else:
        torch.save({"w": torch.ones(3)}, "a.ckpt", _use_new_zipfile_serialization=kind == "file")
    code, _, error = run("fit", "--config", "a.ckpt")
    assert code == 2
    assert "--config a.ckpt: this is a checkpoint, and no recipe: --ckpt_path takes it, or --init_from" in error


def test_the_packaged_recipes_are_read():
    for path in recipes().values():
        assert read_config(path)


@pytest.mark.daily("multi_device-1-layout0")
@pytest.mark.parametrize(
    ("name", "nodes", "layout"), [("multi_device", 1, (1, 8, 8)), ("multi_device_2_nodes", 2, (2, 8, 8))]
)
def test_fragments_for_several_devices_fit_over_a_recipe(run, name, nodes, layout):
    """The sizes are those of a layout, experts are whole on their devices, and a copy stays within a machine."""
    code, out, error = run("fit", "--config", "tiny_shakespeare_gpu", "--config", name, "--print_config")
    assert code == 0, error
    found = yaml.safe_load(out)
    trainer = found["trainer"]
    assert (trainer["accelerator"], trainer["devices"], trainer.get("num_nodes", 1)) == ("gpu", 8, nodes)
    assert trainer["strategy"]["class_path"] == "switchkit.strategies.ExpertParallelStrategy"
    sizes = trainer["strategy"]["init_args"]
    own = layout_of(8 * nodes, sizes["expert_parallel_size"], sizes.get("data_parallel_replicate", 1))
    assert (own.replicate, own.shard, own.expert) == layout
    assert own.shard <= trainer["devices"]
    assert found["model"]["init_args"]["net"]["init_args"]["num_experts"] % own.expert == 0
    assert trainer["max_steps"] == 5000


def test_list_says_that_a_fragment_trains_nothing_by_itself(run):
    lines = [line for line in run("list", "recipes")[1].splitlines() if line.startswith(("multi_device", "fine_tune"))]
    assert len(lines) == 3
    assert all("A fragment over another recipe" in line for line in lines)
    code, _, error = run("fit", "--config", "multi_device")
    assert code == 2
    assert "no model is given" in error
