from __future__ import annotations

from switchkit.cli.arguments import environment, read_arguments


def test_a_command_line_is_sorted():
    found = read_arguments(
        ["--a.b", "1", "-c", "x", "--config=y", "--plugins", "p", "--c+=[d]", "--a.b=-2", "--print_config=skip_unset"]
    )
    assert found.configs == ["x", "y"]
    assert found.plugins == ["p"]
    assert found.edits == [("a.b", "1"), ("c+", "[d]"), ("a.b", "-2")]
    assert found.last("a.b") == "-2"
    assert found.print_config == "skip_unset"
    assert not found.help


def test_help_of_a_part():
    assert read_arguments(["--model.moe.router.help", "top_k"]).part_help == ("model.moe.router", "top_k")
    assert read_arguments(["--model.net.help", "--a=1"]).part_help == ("model.net", None)


def test_variables_of_a_command_are_edits_and_others_are_not():
    variables = {
        "SWITCHKIT_FIT__TRAINER__MAX_STEPS": "5",
        "SWITCHKIT_TEST__TRAINER__MAX_STEPS": "6",
        "SWITCHKIT_DATA": "/data",
        "SWITCHKIT_OFFLINE": "1",
        "SWITCHKIT_CACHE": "/cache",
        "SWITCHKIT_DEBUG": "1",
    }
    (source,) = environment("fit", variables)
    assert source.values == {"trainer": {"max_steps": "5"}}
    assert source.where("trainer.max_steps") == "SWITCHKIT_FIT__TRAINER__MAX_STEPS: trainer.max_steps"
