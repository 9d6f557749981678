"""What `switchkit bench` measures and says. Nothing here is timed."""

from __future__ import annotations

import io
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from switchkit import Router, named
from switchkit.bench import command, contestants, layer, overhead, peers, run, tables, timing
from switchkit.bench.growth import growth
from switchkit.bench.shapes import CPU_SHAPES, Shape, goal, read_shape
from switchkit.cli import main as program
from switchkit.cli.errors import UserError

CPU = torch.device("cpu")
RECIPE = """\
model:
  class_path: LanguageModule
  init_args:
    net:
      class_path: Decoder
      init_args: {d_model: 16, num_layers: 2, num_heads: 2, d_ff: 32, num_experts: 4, context: 16}
    moe: {class_path: MoELayer, init_args: {router: switch}}
    losses: [balance]
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
data:
  class_path: TextData
  init_args: {path: text.txt, batch_size: 4, context: 16}
trainer: {max_steps: 9, gradient_clip_val: 1.0}
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own; and the allocator of the other tests is left as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "keep_memory", lambda: False)


def figures(*arguments: str, generation: bool = False) -> dict[str, Any]:
    left_out = [] if generation else ["--no-generation"]
    assert command.run("bench", [*arguments, *left_out, "--rounds", "2", "--json", "found.json"]) == 0
    return json.loads(Path("found.json").read_text(encoding="utf-8"))


# -- layers -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_dispatcher_is_measured_against_dense(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures("--shapes", "64,8,16,4,1", "96,8,16,4,2,gated", "--no-recipe")
    assert found["command"].startswith("switchkit bench --shapes 64,8,16,4,1")
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert [shape["shape"] for shape in found["layers"]] == ["64,8,16,4,1", "96,8,16,4,2,gated"]
    assert [shape["input"] for shape in found["layers"]] == [[1, 64, 8], [3, 32, 8]]
    for shape in found["layers"]:
        assert shape["rounds"] == 2
        assert shape["imbalance"] >= 1
        assert [row["name"] for row in shape["rows"]] == ["dense", "einsum", "padded", "sorted"]
        for row in shape["rows"]:
            assert row["ratio"] > 0
            assert 0 < row["min_ms"] <= row["ms"] <= row["max_ms"]
            assert row["quartiles"][0] <= row["quartiles"][1]
            assert row["memory_bytes"] > 0
    assert found["layers"][0]["rows"][0]["ratio"] == 1
    shown = capsys.readouterr().out
    assert "64,8,16,4,1" in shown
    assert "sorted" in shown


@pytest.mark.slow
def test_json_to_the_output_is_all_that_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--shapes",
        "16,8,8,2,1",
        "--dispatchers",
        "sorted",
        "--no-recipe",
        "--dtype",
        "bf16",
        "--threads",
        "1",
        "--no-generation",
    ]
    assert command.run("bench", [*arguments, "--rounds", "1", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["layers"][0]["rows"]] == ["dense", "sorted"]
    assert found["layers"][0]["dtype"] == "bf16"


def test_the_dense_layer_has_the_same_products() -> None:
    shape = Shape(32, 8, 16, 4, 2)
    for gated in (False, True):
        weights = sum(weight.numel() for weight in contestants.Dense(shape, gated).parameters())
        assert 3 * 2 * shape.tokens * weights == Shape(32, 8, 16, 4, 2, gated).flops


def test_contestants_agree_and_leave_no_gradient() -> None:
    shape = Shape(32, 8, 16, 4, 2)
    setup = contestants.Setup(CPU, "fp32", ("einsum", "padded", "sorted"))
    found, left_out = contestants.build(shape, setup, (2, 16))
    assert not left_out
    x, grad = contestants.inputs(shape, (2, 16), CPU, torch.float32)
    outputs = [contestants.output(contestant.layer, x) for contestant in found]
    for other in outputs[2:]:
        torch.testing.assert_close(other, outputs[1])
    for contestant in found:
        contestants.step(contestant.layer, x, grad)
        assert x.grad is None
        assert all(weight.grad is None for weight in contestant.layer.parameters())


@pytest.mark.slow
def test_what_has_no_room_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contestants, "room", lambda device: 2**10)
    found = figures("--shapes", "64,8,16,4,1", "--no-recipe")
    rows = {row["name"]: row for row in found["layers"][0]["rows"]}
    assert "left out" in rows["einsum"]["note"]
    assert "ratio" not in rows["einsum"]
    assert rows["sorted"]["ratio"] > 0
    assert "einsum: left out" in capsys.readouterr().out


def test_goals_are_those_of_two_cores() -> None:
    assert [goal(shape, "sorted", "cpu", "fp32") for shape in CPU_SHAPES] == [1.10, 1.40, 1.65]
    assert goal(CPU_SHAPES[0], "padded", "cpu", "fp32") is None
    assert goal(CPU_SHAPES[0], "sorted", "cuda", "fp32") is None


# -- memory -------------------------------------------------------------------------------------------------------


def test_memory_of_sorted_is_linear_and_of_einsum_is_not() -> None:
    setup = contestants.Setup(CPU, "fp32", ("einsum", "sorted"))
    found = growth(Shape(512, 8, 16, 4, 1), setup)
    assert found["tokens"] == [128, 256, 512]
    rows = {row["name"]: row["bytes"] for row in found["rows"]}
    for small, large in zip(rows["sorted"], rows["sorted"][1:], strict=False):
        assert large / small == pytest.approx(2, rel=0.1)
    assert rows["einsum"][2] > 3 * rows["einsum"][1]


def test_saved_bytes_count_a_storage_once() -> None:
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)

    def forward() -> torch.Tensor:
        hidden = (x @ weight).relu()
        return (hidden @ weight) * hidden[:3].sum()

    kept = layer.saved_bytes(forward, [x, weight])
    # `hidden`, saved three times; the second product; and the sum.
    assert kept == 4 * (6 * 4 + 6 * 4 + 1)


def test_every_router_has_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shapes", "64,8,16,4,1", "--no-layer", "--no-recipe", "--rounds", "1"]
    assert command.run("bench", [*arguments, "--no-generation"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in named(Router) if name not in shown] == []
    rows = {row["name"]: row for row in figures(*arguments)["routers"]["rows"]}
    assert rows.keys() - {"dense"} == named(Router).keys()
    assert all(row.get("note") or row["ratio"] > 0 for row in rows.values())
    assert "k=1" in rows["noisy_top_k"]["note"], "a router that refuses the shape says why"


def test_memory_table(capsys: pytest.CaptureFixture[str]) -> None:
    left_out = ("--no-layer", "--no-routers", "--no-recipe")
    found = figures("--shapes", "64,8,16,4,1", "--dispatchers", "sorted", *left_out, "--memory")
    assert found["layers"] == []
    assert [row["name"] for row in found["memory"][0]["rows"]] == ["dense", "sorted"]
    assert "x2.0" in capsys.readouterr().out


# -- recipes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe() -> str:
    Path("text.txt").write_text("".join(f"line {n} says little\n" for n in range(60)), encoding="utf-8")
    Path("small.yaml").write_text(RECIPE, encoding="utf-8")
    return "small.yaml"


@pytest.mark.slow
def test_training_step_of_a_recipe(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = figures("--no-layer", "--no-routers", "--recipe", recipe, "--steps", "4")["recipe"]
    assert found["tokens_per_step"] == 64
    assert found["flops_match"]
    assert found["ratio"] > 0
    assert [row["name"] for row in found["rows"]] == ["sparse", "dense"]
    assert all(row["tokens_per_second"] > 0 for row in found["rows"])
    assert [row["steps"] for row in found["overhead"]] == [4, 4]
    assert all(row["percent"] > -100 for row in found["overhead"])
    assert "tokens/s" in capsys.readouterr().out
    assert sorted(path.name for path in Path().iterdir()) == ["found.json", "small.yaml", "text.txt"]


@pytest.mark.parametrize("name", ["tiny_shakespeare", "tiny_shakespeare_gpu", "labml"])
def test_recipes_are_built_for_a_device(name: str, tmp_path: Path) -> None:
    """One of them has a callback of its own that saves, which a trainer without checkpoints refuses."""
    from switchkit.bench.step import found_recipe, read

    with overhead.quiet():
        found = read(["--config", found_recipe(name)], CPU, str(tmp_path))
    assert (found.device, found.module.training) == (CPU, True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_training_steps_under_a_compiler(recipe: str, unchecked: None, capsys: pytest.CaptureFixture[str]) -> None:
    found = figures("--no-layer", "--no-routers", "--recipe", recipe, "--steps", "2", "--compile")["recipe"]
    assert [row["name"] for row in found["rows"]] == ["sparse", "dense", "sparse, compiled", "dense, compiled"]
    assert found["mode"] == "default"
    assert all(row["tokens_per_second"] > 0 for row in found["rows"])
    assert 'Compiled in mode "default"' in " ".join(capsys.readouterr().out.split())


def test_a_dense_recipe_has_no_twin(recipe: str) -> None:
    Path(recipe).write_text(RECIPE.replace("context: 16}", "context: 16, sparse: []}", 1), encoding="utf-8")
    with pytest.raises(UserError, match="this model is dense"):
        command.run("bench", ["--no-layer", "--no-routers", "--recipe", recipe])


def test_the_packaged_twin_is_found() -> None:
    from switchkit import Decoder, LanguageModule
    from switchkit.bench.step import twin_of

    module = LanguageModule(vocab_size=5)
    assert isinstance(module.net, Decoder)
    assert twin_of("tiny_shakespeare", module)[1].endswith("tiny_shakespeare_dense.yaml")


def test_both_sides_take_turns() -> None:
    own: list[int] = []
    pool: Any = [{"tokens": n} for n in range(3)]
    turns = overhead.Turns(pool, lambda batch: own.append(batch["tokens"]), turns=2, turn=2, clock=timing.CpuClock())
    theirs = [batch["tokens"] for batch in turns]
    assert len(theirs) == len(turns) == 7
    assert theirs == [0, 1, 2, 0, 1, 2, 0]
    assert own == theirs[:6]
    assert {side: len(seconds) for side, seconds in turns.seconds.items()} == {"lightning": 2, "bare": 2}


def test_blocks_are_sums_and_lose_nothing() -> None:
    assert overhead._blocks([1.0, 2, 3, 4, 5, 6, 7], 3) == [6, 22]
    assert overhead._blocks([1.0, 2], 5) == [3]


# -- generation ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_generation_with_a_cache_and_without(capsys: pytest.CaptureFixture[str]) -> None:
    left_out = ("--no-layer", "--no-routers", "--no-recipe", "--new_tokens", "6")
    narrow, found = figures(*left_out, generation=True)["generation"]
    assert (narrow["d_model"], found["d_model"]) == (128, 256)
    assert (found["new_tokens"], found["rounds"], found["goal"]) == (6, 2, None)
    assert [row["name"] for row in found["rows"]] == ["cached", "uncached"]
    cached, uncached = found["rows"]
    assert found["ratio"] == pytest.approx(uncached["seconds"] / cached["seconds"])
    assert cached["tokens_per_second"] == pytest.approx(6 / cached["seconds"])
    assert "The cache makes it" in capsys.readouterr().out


def test_encoder_decoder_beside_hugging_faces() -> None:
    """Equal weights, so equal losses, dropped tokens included; both make a step."""
    pytest.importorskip("transformers")
    from switchkit.bench import seq2seq, tables

    size = seq2seq.Size("tiny", 8, 8, 4, capacity=3, length=12, goal=1.0, layers=2, batch=2, heads=2, vocabulary=20)
    found = seq2seq.measure(size, torch.device("cpu"), 1)
    assert found["loss_difference"] < 1e-5
    assert [row["name"] for row in found["rows"]] == ["switchkit", "Hugging Face"]
    ours, theirs = (row["ms"] for row in found["rows"])
    assert found["times_as_fast"] == pytest.approx(theirs / ours)
    assert "times as fast" in str(tables.seq2seq(found).caption)


# -- timing -------------------------------------------------------------------------------------------------------


def test_everyone_runs_in_every_round() -> None:
    calls: list[str] = []
    runs: dict[str, Callable[[], object]] = {name: lambda name=name: calls.append(name) for name in "abc"}
    found = timing.interleave(runs, timing.CpuClock(), rounds=4)
    assert [len(found[name].seconds) for name in "abc"] == [4, 4, 4]
    rounds = [calls[start : start + 3] for start in range(0, len(calls), 3)]
    assert len(rounds) == 4 + timing.WARM_UP
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1


def test_a_warm_contestant_runs_untimed_right_before_its_time() -> None:
    calls: list[str] = []
    runs: dict[str, Callable[[], object]] = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = timing.interleave(runs, timing.CpuClock(), rounds=2, warm=True)
    timed = calls[2 * min(timing.WARM_UP, 2) :]
    assert len(found["a"].seconds) == 2
    assert timed[::2] == timed[1::2]
    assert sorted(timed) == ["a"] * 4 + ["b"] * 4


def test_ratio_of_medians() -> None:
    ours, base = timing.Timing((2.0, 4.0, 90.0), ()), timing.Timing((2.0, 2.0, 2.0), ())
    assert timing.ratios(ours, base)[0] == 2
    assert timing.ratios(base, base) == (1, 1, 1)


def test_figures_of_a_gpu_fit_a_terminal() -> None:
    """80 columns, and no number is cut: nobody would know what it was."""
    figures = {
        "base": "dense",
        "ratio": 12.34,
        "quartiles": [11.75, 12.99],
        "ms": 106.85,
        "min_ms": 103.4,
        "flops_per_second": 589e12,
        "share_of_matmul": 0.87,
        "memory_bytes": 24353 * 2**20,
        "host_ms": 42.58,
    }
    names = "dense", "sorted, compiled", "Mixtral, grouped_mm"
    rows = [{"name": name, "waits_for_device": name.startswith("sorted") or None, **figures} for name in names]
    told = {"shape": "65536,2048,1408,64,8,gated", "dtype": "bf16", "rounds": 6, "imbalance": 1.05}
    told["matmul"] = {"size": 8192, "flops_per_second": 705884e9}
    shown = io.StringIO()
    Console(file=shown, width=80).print(tables.layer({**told, "rows": rows}))
    assert "…" not in shown.getvalue()
    for text in ("12.34", "11.75-12.99", "107", "103", "589", "87%", "24,353", "42.6", "706 TFLOP/s"):
        assert text in shown.getvalue(), text


@pytest.mark.slow
def test_the_ratio_of_medians_may_lie_outside_the_middle_half_of_the_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    """1 : 10 in two rounds of three, and yet as 5 : 6 by the medians: the table says which is which."""
    ours, base = timing.Timing((1.0, 5.0, 10.0), ()), timing.Timing((10.0, 6.0, 1.0), ())
    ratio, low, high = timing.ratios(ours, base)
    assert (ratio, low, high) == (5 / 6, pytest.approx((0.1 + 5 / 6) / 2), pytest.approx((5 / 6 + 10) / 2))
    figures("--shapes", "64,8,16,4,1", "--no-routers", "--no-recipe")
    told = " ".join(capsys.readouterr().out.split())
    assert "x dense: ratio of the medians, to a dense layer of equal FLOPs." in told
    assert "Middle half: of the ratios within each round, and the ratio of the medians may lie outside." in told


class Cuda:
    """What of torch.cuda is used, without a device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mode, self.events, self.waits = 0, 0, 0
        for name in ("synchronize", "get_sync_debug_mode", "set_sync_debug_mode", "Event"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def synchronize(self, device: object) -> None:
        self.waits += 1

    def get_sync_debug_mode(self) -> int:
        return self.mode

    def set_sync_debug_mode(self, mode: Any) -> None:
        self.mode = mode

    def Event(self, enable_timing: bool) -> Cuda:
        return self

    def record(self) -> None:
        self.events += 1

    def elapsed_time(self, other: object) -> float:
        return 50.0


def test_waits_for_the_device_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, device = Cuda(monkeypatch), torch.device("cuda")

    def reads() -> None:
        assert cuda.mode == "error"
        raise RuntimeError("called a synchronizing CUDA operation")

    def fails() -> None:
        raise RuntimeError("something else")

    assert layer.waits(reads, device) is True
    assert layer.waits(lambda: None, device) is False
    with pytest.raises(RuntimeError, match="something else"):
        layer.waits(fails, device)
    assert cuda.mode == 0
    assert layer.waits(fails, CPU) is None


def test_cuda_is_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, calls = Cuda(monkeypatch), []
    seconds, _ = timing.CudaClock(torch.device("cuda"), repeats=5).time(lambda: calls.append(1))
    assert (len(calls), cuda.events, cuda.waits) == (5, 2, 2)
    assert seconds == pytest.approx(0.01)


@pytest.mark.gpu
def test_on_a_device() -> None:
    found = figures("--device", "cuda", "--shapes", "256,64,64,4,2,gated", "--no-recipe", "--memory")
    rows = {row["name"]: row for row in found["layers"][0]["rows"]}
    assert rows["sorted"]["waits_for_device"] is False
    assert rows["sorted"]["memory_bytes"] > 0


# -- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.daily(but=["arguments9-expected the recipe of a decoder"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "64,8,16,4,1"], "Did you mean '--shapes'?"),
        (["--shapes", "64,8,16"], "expected T,d,f,E,k"),
        (["--shapes", "64,8,16,4,5"], "k=5 of E=4"),
        (["--shapes", "64,8,0,4,1"], "above 0"),
        (
            ["--dispatchers", "sortd"],
            "--dispatchers sortd: there is no such dispatcher. Did you mean 'sorted'? Known: ",
        ),
        (["--rounds", "0"], "at least 1"),
        (["--device", "nonsense"], "--device nonsense"),
        (["--recipe", "tiny_shakespear"], "Did you mean 'tiny_shakespeare'?"),
        (["--recipe", "tiny_shakespeare_dense"], "this model is dense"),
        (["--recipe", "t5_span"], "expected the recipe of a decoder"),
        (["--recipe", "tiny_shakespeare", "--no-recipe"], "contradict"),
        (["--no-layer", "--no-routers", "--no-recipe", "--no-generation"], "nothing to measure"),
        (["--new_tokens", "0"], "--new_tokens: expected an integer of at least 1"),
        (["--threads", "99999999"], "--threads: expected an integer from 1 to 1024"),
        (["--device", "meta"], "--device meta: expected cpu"),
        (["--no-seq2seq"], "--no-seq2seq leaves a part of --peers out"),
        (["--distributed", "2", "--memory"], "--distributed measures the training step alone: leave --memory out"),
        (["--distributed", "2", "--steps", "9"], "the training step alone: leave --steps out"),
        (["--distributed", "2", "--new_tokens", "9"], "the training step alone: leave --new_tokens out"),
        (["--distributed", "2", "--dtype", "bf16"], "the training step alone: leave --dtype out"),
        (["--no-recipe", "--steps", "9"], "--steps and --no-recipe contradict each other"),
        (["--no-generation", "--new_tokens", "9"], "--new_tokens and --no-generation contradict each other"),
        (["--json", "."], "--json '.' is a folder"),
        (["--json", "README.md"], "--json README.md is there already, and is no .json file"),
        (["--json", "no/such/folder.json"], "--json no/such/folder.json"),
        (["--dtype", "fp8"], "fp32"),
        (["--distributed", "0"], "--distributed: expected an integer of at least 1"),
        (["--distributed", "2", "--recipe", "tiny_shakespear"], "Did you mean 'tiny_shakespeare'?"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("README.md").touch()
    assert program(["bench", *arguments]) == 2
    out, told = capsys.readouterr()
    assert out == ""  # before anything is measured
    assert told.count("\n") == 1
    assert said in told
    assert "Traceback" not in told


def test_a_layer_that_the_memory_does_not_hold(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--shapes", f"{10**12},64,64,4,1", "--no-routers", "--no-recipe", "--no-generation"]
    assert program(["bench", *given]) == 2
    assert "bench: the memory does not hold this: " in capsys.readouterr().err


def test_peers_need_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'switchkit\[hf\]'"):
        command.run("bench", ["--peers", "--no-recipe"])


def test_shapes_read_as_they_are_written() -> None:
    for text in ("4096,256,1024,8,2", "16384,1024,4096,8,1,gated"):
        assert str(read_shape(text)) == text


# -- malloc -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_is_kept_on_glibc() -> None:
    code = "from switchkit.process import keep_memory; print(keep_memory())"
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True, timeout=60
    )
    assert done.stdout.strip() == str(platform.libc_ver()[0] == "glibc")


def test_elsewhere_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    from switchkit import process

    monkeypatch.setattr(process.sys, "platform", "darwin")
    assert process.keep_memory() is False
