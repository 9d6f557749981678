from __future__ import annotations

import pytest

from switchkit.cli.arguments import environment, read_arguments
from switchkit.cli.errors import UserError
from switchkit.cli.options import OF_FIT, OptionParser
from switchkit.cli.settings import root_parameters


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


def test_words_are_kept_where_they_may_be():
    argv = ["one.yaml", "--a.b", "1", "two", "--plugins", "p", "q"]
    found = read_arguments(argv, words=True)
    assert (found.words, found.edits, found.plugins) == (["one.yaml", "two"], [("a.b", "1")], ["p", "q"])
    with pytest.raises(UserError, match="'one.yaml' is not an option"):
        read_arguments(argv)


@pytest.mark.parametrize(
    ("argv", "own", "rest"),
    [
        ("--size 3 --a.b 1 --json", (3, "-", False), "--a.b 1"),
        ("--config x --json - --size=3 word", (3, "-", False), "--config x word"),
        ("--all --a.b --json x.json --size -1", (-1, "x.json", True), "--a.b"),
        ("--plugins p q --json -c x", (None, "-", False), "--plugins p q -c x"),
        ("--json|--net={a: b, c: d}|--size|4", (4, "-", False), "--net={a: b, c: d}"),
    ],
)
def test_a_commands_own_options_stand_among_those_of_fit(argv, own, rest):
    parser = OptionParser("try", "")
    parser.add_argument("--size", type=int)
    parser.add_argument("--all", action="store_true")
    parser.add_json("all")
    found, others = parser.parse_beside(argv.split("|" if "|" in argv else None))
    assert (found.size, found.json, found.all) == own
    assert others == ([rest] if "|" in argv else rest.split())


def test_what_is_near_an_option_of_either_is_told_by_whoever_has_it():
    parser = OptionParser("try", "")
    parser.add_argument("--sizes")
    with pytest.raises(UserError, match="^switchkit try: unknown option '--size'. Did you mean '--sizes'?"):
        parser.parse_beside(["--size", "3"])
    for told_by_fit in ("--confg", "--max_steps", "--model.sizs", "-s"):
        assert parser.parse_beside([told_by_fit, "3"])[1] == [told_by_fit, "3"]


def test_options_of_fit_are_those_that_it_has():
    assert set(OF_FIT) == {*root_parameters("fit"), "trainer", "config", "print_config"}


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
