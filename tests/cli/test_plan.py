"""switchkit plan: any recipe, without building it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from switchkit.cli.lightning import build
from switchkit.counts import count

SMALL = ["--config", "small.yaml"]
GPU = "{memory_gib: 0.001, bf16_tflops: 1, fp32_tflops: 1, node_gb_per_s: 1, network_gb_per_s: 1}"

HUGE = """\
model:
  class_path: LanguageModule
  init_args:
    vocab_size: 32128
    net:
      class_path: EncoderDecoder
      init_args: {d_model: 2080, encoder_layers: 15, num_heads: 32, head_width: 64, d_ff: 6144, num_experts: 2048,
                  sparse: every(1)}
    losses: []
"""


@pytest.mark.slow
def test_what_fits_and_how_to_train_it_so(run):
    code, out, _ = run("plan", *SMALL, "--nodes", "2", "--gpus", "4", "--trainer.precision", "bf16-true")
    assert code == 0
    sizes = count(build(SMALL).model.net, 16)
    assert f"{sizes.parameters:,} in all, {sizes.active:,} active for a token" in out
    for line in (
        "2 x 4 h100: 79 GiB each, 10% left free",
        "4 x 16 tokens on each device, bf16-true",
        "1 micro-batch, 512 tokens",
    ):
        assert line in out
    assert out.splitlines()[-1].startswith("the fastest: --trainer.num_nodes 2 --trainer.devices 4 --trainer.strategy")
    assert "expert_parallel_size=8: the 4 experts of blocks.1.mlp cannot be shared out" in out


def test_json_says_all_of_it(run):
    argv = [*SMALL, "--nodes=1", "--gpus=2", "--trainer.accumulate_grad_batches=3", "--json"]
    code, out, _ = run("plan", *argv)
    assert code == 0
    found = json.loads(out)
    assert (found["nodes"], found["gpus"], found["work"]["accumulate"]) == (1, 2, 3)
    assert len(found["fits"]) == 4
    assert not found["rest"]
    for one in found["fits"]:
        parts = {name: size for name, size in one["memory"].items() if name != "total"}
        assert one["memory"]["total"] == sum(parts.values())
        assert one["seconds_per_token"] == pytest.approx(one["seconds"]["total"] / (2 * 3 * 64))


@pytest.mark.slow
def test_the_fastest_has_all_that_was_asked_for(run):
    """In another precision, or of another length, the arrangement may need twice the memory."""
    asked = ["--precision", "bf16-true", "--batch_size", "2", "--context", "8", "--accumulate", "3"]
    end = " --trainer.precision bf16-true --trainer.accumulate_grad_batches 3 --data.batch_size 2 --data."
    code, out, err = run("plan", *SMALL, "--gpus", "2", *asked)
    assert code == 0, err
    assert out.splitlines()[-1].endswith(f"{end}context 8")
    for name, length in (("t5_span", "inputs_length"), ("t5_translate", "max_source")):
        code, out, err = run("plan", "--config", name, "--gpus", "2", *asked)
        assert code == 0, err
        assert out.splitlines()[-1].endswith(f"{end}{length} 8")


@pytest.mark.slow
def test_a_batch_of_tokens_has_fewer_sequences(run):
    recipe = ["plan", "--config", "t5_translate", "--data.batch_tokens", "1024", "--gpus", "1"]
    for more, batch in (([], 1024 // 256), (["--context", "64"], 1024 // 64), (["--context", "2048"], 1)):
        code, out, err = run(*recipe, *more, "--json")
        assert code == 0, err
        assert json.loads(out)["work"]["batch"] == batch
    code, out, err = run(*recipe, "--batch_size", "2")
    assert code == 0, err
    assert out.splitlines()[-1].endswith(" --data.batch_size 2 --data.batch_tokens null")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpus", "memory", "sizes"),
    [
        (1, "1.0", None),
        (4, "0.00009", {"expert_parallel_size": 2, "data_parallel_replicate": 2, "activation_checkpointing": True}),
    ],
)
def test_the_fastest_trains(run, gpus, memory, sizes):
    """Its options are those of `fit`; where copies of the whole model have no room, they have a strategy's own."""
    Path("gpu.yaml").write_text(GPU.replace("0.001", memory))
    asked = ["--precision", "bf16-true", "--batch_size", "2", "--context", "8", "--accumulate", "3"]
    argv = ["--gpus", str(gpus), "--gpu", "gpu.yaml", "--activation_checkpointing", "on", *asked]
    code, out, err = run("plan", *SMALL, *argv)
    assert code == 0, err
    words = shlex.split(out.splitlines()[-1].partition("the fastest: ")[2])
    code, out, err = run("fit", *SMALL, *words, "--print_config")
    assert code == 0, err
    made = yaml.safe_load(out)
    trainer = made["trainer"]
    assert (trainer["num_nodes"], trainer["devices"], trainer["precision"]) == (1, gpus, "bf16-true")
    assert trainer["accumulate_grad_batches"] == 3
    assert (made["data"]["init_args"]["batch_size"], made["data"]["init_args"]["context"]) == (2, 8)
    strategy = trainer["strategy"]
    if sizes is None:
        assert strategy == "ddp"
    else:
        assert strategy["class_path"].endswith(".ExpertParallelStrategy")
        assert sizes.items() <= strategy["init_args"].items()


def test_a_model_of_any_size_is_counted(run):
    Path("huge.yaml").write_text(HUGE)
    argv = ["--config", "huge.yaml", "--nodes", "64", "--context", "512", "--precision", "bf16-true"]
    code, out, _ = run("plan", *argv)
    assert code == 0
    # 30 layers of 2048 experts of 2 * 2080 * 6144, and the rest.
    assert "1,571,3" in out


def test_nothing_fits(run):
    Path("tiny.yaml").write_text(GPU)
    code, out, _ = run(
        "plan", *SMALL, "--gpu", "tiny.yaml", "--gpus", "2", "--batch_size", "64", "--precision", "32-true"
    )
    assert code == 1
    assert "nothing fits." in out
    assert re.search(r"ddp: [\d.]+ MiB of 0.922 MiB: most is activations, [\d.]+ MiB", out)


@pytest.mark.daily("labml")
@pytest.mark.parametrize("name", ["t5_span", "labml"])
def test_packaged_recipes(run, name):
    assert run("plan", "--config", name, "--gpus", "2")[0] == 0


@pytest.mark.daily("soft")
@pytest.mark.parametrize("name", ["hash", "base", "soft", "relu"])
def test_every_router_can_be_counted(run, name):
    code, _, err = run(
        "plan", *SMALL, "--model.moe.router", name, "--model.net.allow_leak", "true", "--model.moe.capacity", "dropless"
    )
    assert code == 0, err


@pytest.mark.slow
def test_of_a_checkpoint(run):
    assert run("fit", *SMALL, "--trainer.max_steps", "1")[0] == 0
    code, out, _ = run("plan", "--ckpt_path", "last", "--json")
    assert code == 0
    assert json.loads(out)["counts"]["parameters"] == count(build(SMALL).model.net, 16).parameters


MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}


def test_of_a_config_of_hugging_face(run):
    Path("config.json").write_text(json.dumps(MIXTRAL))
    code, out, err = run(
        "plan", "--hf_config", "config.json", "--context", "2048", "--precision", "bf16-true", "--json"
    )
    assert code in (0, 1), err
    assert json.loads(out)["counts"]["parameters"] == 46_702_792_704
    Path("config.json").write_text(json.dumps({**MIXTRAL, "rope_scaling": {"type": "yarn", "factor": 40}}))
    code, _, err = run("plan", "--hf_config", "config.json")
    assert code == 2
    assert "yarn" in err


def test_a_window_that_the_context_never_meets(run):
    """A config.json of Mistral's first release, and of T5, which has no longest sequence."""
    Path("config.json").write_text(json.dumps({**MIXTRAL, "model_type": "mistral", "sliding_window": 4096}))
    planned = "plan", "--hf_config", "config.json", "--precision", "bf16-true", "--json"
    code, out, err = run(*planned, "--context", "4096")
    assert code in (0, 1), err
    assert json.loads(out)["counts"]["parameters"] == 7_241_732_096
    assert json.loads(out)["work"]["context"] == 4096
    for context in ((), ("--context", "4097")):
        code, _, err = run(*planned, *context)
        assert code == 2
        assert "ask for a context of at most 4096" in err
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 2}
    Path("config.json").write_text(json.dumps({"model_type": "t5", **sizes}))
    assert run(*planned, "--context", "32")[0] == 0


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (
            ["--gpu", "h10"],
            "--gpu h10: unknown, and there is no such file. Did you mean 'h100'? Known: h100, h200, a100",
        ),
        (["--gpu", "gpu.yaml"], "gpu.yaml lacks memory_gib, fp32_tflops"),
        (["--nodes", "0"], "--nodes: expected an integer of at least 1, got '0'"),
        (["--headroom", "1"], "--headroom: expected a share from 0 to below 1, got '1'"),
        (["--imbalance", "0.5"], "--imbalance: expected a number of at least 1, got '0.5'"),
        (["--precision", "fp8"], "precision 'fp8' is not planned here: use 32-true"),
        (["--activation_checkpointing", "yes"], "--activation_checkpointing: invalid choice: 'yes'"),
        (["--activation_checkpointing", "of"], "Did you mean 'off'?"),
        (["--gpu"], "--gpu: expected one argument"),
        (["--confg", "x"], "--confg: fit has no option 'confg'. Did you mean 'config'?"),
        (["--stratgy", "ddp"], "--stratgy: fit has no option 'stratgy'. Did you mean 'trainer.strategy'?"),
        (["--context", "17"], "--context 17: the model reads 16 tokens at most"),
        (["--node", "3"], "unknown option '--node'. Did you mean '--nodes'?"),
        (["--hf_config", "config.json"], "--hf_config describes the whole model: leave --config out"),
        (["--model.moe.router", "swich"], "Did you mean 'switch'?"),
    ],
)
def test_bad_input_is_one_line(run, argv, told):
    Path("gpu.yaml").write_text(yaml.safe_dump({"bf16_tflops": 1, "node_gb_per_s": 1, "network_gb_per_s": 1}))
    code, out, err = run("plan", *SMALL, *argv)
    assert (code, out) == (2, "")
    assert told in err
    assert len(err.strip().splitlines()) == 1


def test_a_recipe_without_a_model(run):
    Path("none.yaml").write_text("trainer: {max_steps: 1}")
    code, _, err = run("plan", "--config", "none.yaml")
    assert code == 2
    assert "no model is given: give a recipe by --config NAME" in err


def test_help_is_quick_and_whole(run):
    code, out, _ = run("plan", "--help")
    assert code == 0
    for option in ("--nodes", "--gpu NAME|FILE", "--hf_config", "--imbalance"):
        assert option in out


@pytest.mark.slow
def test_json_goes_to_a_file_beside_the_table(run):
    code, out, _ = run("plan", *SMALL, "--gpus=1", "--json", "found.json")
    assert code == 0
    assert "the fastest" in out
    assert json.loads(Path("found.json").read_text()) == json.loads(run("plan", *SMALL, "--gpus=1", "--json")[1])
    code, _, err = run("plan", *SMALL, "--json", "small.yaml")
    assert (code, err.count("\n")) == (2, 1)
    assert "no .json file" in err


def test_an_option_without_its_value_takes_none_of_the_next(run):
    code, _, err = run("plan", *SMALL, "--model.net.d_model", "--gpus", "2")
    assert (code, err.count("\n")) == (2, 1)
    assert "--model.net.d_model needs a value: --model.net.d_model VALUE" in err
