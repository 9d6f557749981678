"""``switchkit audit`` on a model of seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SMALL = ("-c", "small.yaml")
LEAK = ("--model.moe.capacity.order", "probability")


def by_check(path):
    return {line["check"]: line for line in json.loads(Path(path).read_text())["findings"]}


def test_a_clean_recipe(run):
    code, out, _ = run("audit", *SMALL, "--json", "found.json")
    assert code == 0
    assert "Audit of small.yaml, on 3 sequences of 16 random tokens" in out
    assert "0 faults" in out
    content = json.loads(Path("found.json").read_text())
    assert (content["leaks"], content["refused_by_fit"]) == (False, False)
    assert all(set(line) == {"check", "status", "evidence", "fix"} for line in content["findings"])
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_leaking_configuration_is_built_measured_and_told(run):
    assert run("describe", *SMALL, *LEAK)[0] == 2
    code, out, _ = run("audit", *SMALL, *LEAK, "--json=found.json")
    assert code == 1
    assert "--model.moe.capacity.order=arrival" in out
    assert "`fit` refuses this model" in out
    assert json.loads(Path("found.json").read_text())["refused_by_fit"] is True
    assert by_check("found.json")["future tokens"]["status"] == "fault"


@pytest.mark.slow
def test_a_leak_that_the_recipe_allows_is_one_still(run):
    code, out, _ = run("audit", *SMALL, *LEAK, "--model.net.allow_leak", "true")
    assert code == 1
    assert "refuses" not in out


@pytest.mark.slow
def test_a_leak_that_a_full_group_alone_shows(run):
    argv = [*SMALL, *LEAK, "--model.moe.capacity.train", "0.5", "--data.batch_size", "20"]
    code, out, _ = run("audit", *argv, "--model.moe.group", "256")
    assert (code, "on 20 sequences of 16 random tokens" in out) == (1, True)
    code, _, _ = run("audit", *argv, "--model.moe.group", "10000", "--json", "found.json")
    found = by_check("found.json")
    assert (code, found["future tokens"]["status"], found["declared leaks"]["status"]) == (0, "note", "note")
    assert "320 tokens do not fill a group of 10000" in found["future tokens"]["evidence"]


@pytest.mark.slow
def test_a_recipe_without_a_net(run):
    recipe = "model: {class_path: LanguageModule, init_args: {losses: [balance]}}\n"
    recipe += "data: {class_path: TextData, init_args: {path: text.txt, context: 8, validation_prefix: 512}}\n"
    Path("bare.yaml").write_text(recipe)
    code, out, _ = run("audit", "-c", "bare.yaml")
    assert code == 0
    assert "on 3 sequences of 8 random tokens" in out


@pytest.mark.slow
def test_other_faults_leave_the_exit_code_alone(run):
    code, out, _ = run("audit", *SMALL, "--model.losses", "[{class_path: balance, init_args: {layers: sum}}]")
    # One sparse layer, of which sum and mean are the same.
    assert (code, "0 faults" in out) == (0, True)
    argv = [*SMALL, "--model.moe.router", "top_k", "--model.moe.router.k", "2"]
    code, out, _ = run("audit", *argv, "--model.losses", "[{class_path: balance, init_args: {scale: k}}]")
    assert (code, "1 fault," in out) == (0, True)


@pytest.mark.slow
def test_a_checkpoint_is_audited_as_trained(run):
    argv = ["--plugins", "mine", "--model.moe.router", "mine_top_k"]
    assert run("fit", *SMALL, *argv)[0] == 0
    code, out, _ = run("audit", "--plugins", "mine", "--ckpt_path", "last", "--json", "found.json")
    assert code == 0
    assert "step 2" in out
    assert "trained weights" in by_check("found.json")["equal experts"]["evidence"]


@pytest.mark.slow
def test_devices_of_the_recipe_do_not_matter(run):
    assert run("audit", *SMALL, "--trainer.accelerator", "cuda", "--trainer.devices", "4")[0] == 0


@pytest.mark.slow
def test_a_router_with_a_capacity_of_its_own_is_advised_about_that(run):
    argv = [*SMALL, "--model.moe.router", "expert_choice", "--model.moe.capacity", "dropless", "--json", "own.json"]
    run("audit", *argv)
    found = by_check("own.json")["padding"]
    assert found["status"] == "note"
    assert "the router sets a capacity of its own" in found["fix"]


def test_help(run):
    code, out, _ = run("audit", "--help")
    assert code == 0
    assert "--json [PATH]" in out
    assert "--model.moe.router.normalize" in run("audit", "--model.moe.router.help", "top_k")[1]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--config NAME"),
        (["-c", "smal.yaml"], "smal.yaml"),
        ([*SMALL, "--out", "found.json"], "--out: audit has no option 'out': --json PATH writes the findings"),
        ([*SMALL, "--json="], "--json needs a file"),
        ([*SMALL, "--jsn"], "switchkit audit: unknown option '--jsn'. Did you mean '--json'?"),
        ([*SMALL, "--json", "."], "--json '.' is a folder"),
        ([*SMALL, "--json", "text.txt"], "text.txt is there already, and is no .json file"),
        ([*SMALL, "--json", "no/such/found.json"], "there is no folder 'no/such'"),
        ([*SMALL, "--model.moe.router.kk", "2"], "'kk'"),
        ([*SMALL, "--ckpt_path", "no.ckpt"], "no.ckpt"),
        ([*SMALL, "--model.losses", "[load]"], "noisy_top_k"),
    ],
)
def test_mistakes_are_one_line(run, argv, said):
    code, _, err = run("audit", *argv)
    assert code == 2
    assert said in err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("argv", [[*SMALL, "--json", "-"], ["--json", *SMALL], [*SMALL, "--json"]])
def test_json_to_the_output_stands_there_alone(run, argv):
    code, out, err = run("audit", *argv)
    assert code == 0
    assert json.loads(out)["leaks"] is False
    assert "Audit of" in err
    assert not Path("-").exists()
