"""Generation: on a model that can be enumerated, and on real ones against full forwards."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from switchkit import Decoder, Factor, MoELayer, TopK
from switchkit.generation import Window, completions, continuation, generate, one_at_a_time, pad_left, stream
from switchkit.generation.beams import penalty, search
from switchkit.models import Cache, EncoderDecoder, Output
from switchkit.sampling import probabilities, sample

VOCAB, EOS = 4, 3


@dataclass(frozen=True)
class Seen(Cache):
    """A cache of nothing but the tokens themselves."""

    tokens: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    def select(self, index: Tensor) -> Seen:
        return Seen(tokens=self.tokens[index])


@dataclass
class Calls:
    sizes: list[int] = field(default_factory=list)
    cached: list[bool] = field(default_factory=list)


class Trigram(nn.Module):
    """Logits by a table of the last two tokens, a cache that must hold all but the new ones, and a count of calls."""

    uncacheable: str | None = None

    def __init__(self, context: int = 100, seed: int = 0) -> None:
        super().__init__()
        table = torch.randn(VOCAB, VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))
        self.table = nn.Parameter(2 * table)
        self.dropout = nn.Dropout(0.5)
        self.context, self.calls = context, Calls()

    def nats(self) -> list[list[list[float]]]:
        return self.table.detach().log_softmax(-1).tolist()

    def forward(self, tokens: Tensor, valid: Tensor | None = None, cache: Any = None) -> Output:
        self.calls.sizes.append(tokens.shape[1])
        self.calls.cached.append(cache is not None)
        seen = cache.tokens if isinstance(cache, Seen) else tokens[:, :0]
        whole = torch.cat([seen, tokens], 1)
        assert whole.shape[1] <= self.context
        before = torch.cat([whole[:, :1], whole[:, :-1]], 1)
        logits = self.dropout(self.table[before, whole])[:, seen.shape[1] :]
        return Output(logits, (), None if cache is None else Seen(tokens=whole))


def log_prob(nats: list[list[list[float]]], prompt: list[int], new: list[int]) -> float:
    """By the table, token after token."""
    whole, total = list(prompt), 0.0
    for token in new:
        before = whole[-2] if len(whole) > 1 else whole[-1]
        total += nats[before][whole[-1]][token]
        whole.append(token)
    return total


def endings(count: int) -> list[list[int]]:
    """Every sequence that ends with EOS, or is as long as it may be."""
    found = []
    for length in range(1, count + 1):
        for body in itertools.product(range(VOCAB), repeat=length):
            early = EOS in body[:-1]
            if not early and (body[-1] == EOS or length == count):
                found.append(list(body))
    return found


def rows_of(found: Any) -> list[list[int]]:
    return [row[real].tolist() for row, real in zip(found.tokens, found.valid, strict=True)]


# -- beams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.6, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_enough_beams_find_the_best_of_all_sequences(seed: int, alpha: float) -> None:
    """Of 4 symbols and 4 steps, 64 beams hold every beginning: the search must find what enumeration does."""
    net = Trigram(seed=seed)
    nats = net.nats()
    scores = {tuple(new): log_prob(nats, [1, 2], new) for new in endings(4)}
    assert len(scores) == 1 + 3 + 9 + 27 * 4
    best = max(scores, key=lambda new: scores[new] / ((5 + len(new)) / 6) ** alpha)
    found = generate(net, torch.tensor([[1, 2]]), max_new_tokens=4, num_beams=64, length_penalty=alpha, eos_id=EOS)
    assert rows_of(found) == [list(best)]
    assert float(found.log_prob[0]) == pytest.approx(scores[best], rel=1e-5)


def by_hand(
    net: Trigram, prompt: list[int], beams: int, count: int, alpha: float, ends: tuple[int, ...] = (EOS,)
) -> list[int]:
    """Beam search over lists, to the last step whatever is found before."""
    nats, running, done = net.nats(), [(0.0, [])], []
    for length in range(1, count + 1):
        nexts = [(log_prob(nats, prompt, [*new, t]), [*new, t]) for _, new in running for t in range(VOCAB)]
        nexts.sort(key=lambda pair: -pair[0])
        done += [(s / penalty(length, alpha), new) for s, new in nexts[:beams] if new[-1] in ends or length == count]
        running = [pair for pair in nexts if pair[1][-1] not in ends][:beams]
    return max(done)[1]


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("beams", [2, 3])
def test_few_beams_search_as_a_loop_over_lists_does(beams: int, alpha: float) -> None:
    prompts = [[0, 1], [2, 2], [1, 0], [2, 1], [0, 0]]
    for seed in range(3):
        net = Trigram(seed=seed)
        want = [by_hand(net, prompt, beams, 5, alpha) for prompt in prompts]
        options = {"max_new_tokens": 5, "num_beams": beams, "length_penalty": alpha, "eos_id": EOS}
        found = generate(net, torch.tensor(prompts), **options)
        assert rows_of(found) == want
        assert (found.tokens[~found.valid] == EOS).all()
        assert rows_of(generate(net, torch.tensor(prompts), use_cache=False, **options)) == want


@pytest.mark.parametrize("alpha", [2.0, 30.0])
@pytest.mark.parametrize("ends", [(0, EOS), (0, 1, EOS)])
def test_several_ends_leave_as_many_beginnings(ends: tuple[int, ...], alpha: float) -> None:
    """Where most of the best continuations end, and where a penalty makes the longest sequence win."""
    prompts = [[0, 1], [2, 2], [1, 0], [2, 1], [0, 0]]
    for seed in range(6):
        net = Trigram(seed=seed)
        with torch.no_grad():
            net.table[..., list(ends)] += 3 * (alpha > 2)
        want = [by_hand(net, prompt, 3, 5, alpha, ends) for prompt in prompts]
        options = {"max_new_tokens": 5, "num_beams": 3, "length_penalty": alpha, "eos_id": ends}
        assert rows_of(generate(net, torch.tensor(prompts), **options)) == want


def test_nothing_goes_on_where_every_token_ends() -> None:
    """Under a penalty that makes up for any log-probability, which a longer sequence would win by."""
    net = Trigram()
    best = [[max(range(VOCAB), key=lambda t, p=prompt: log_prob(net.nats(), p, [t]))] for prompt in ([0, 1], [2, 2])]
    found = generate(
        net,
        torch.tensor([[0, 1], [2, 2]]),
        max_new_tokens=5,
        num_beams=3,
        length_penalty=30.0,
        eos_id=range(VOCAB),
    )
    assert rows_of(found) == best


def test_the_whole_nucleus_is_the_softmax() -> None:
    """Sums over a large vocabulary in float32 reach 1 long before its last token."""
    logits = 3 * torch.randn(150_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(probabilities(logits, 1.0, None, 1.0), logits.softmax(-1))
    kept = probabilities(logits, 1.0, None, 0.9999) > 0
    ranked = logits.double().softmax(-1).sort(descending=True).values
    wanted = int((ranked.cumsum(0) - ranked < 0.9999).sum())
    assert abs(int(kept.sum()) - wanted) < 0.001 * wanted


def test_a_temperature_next_to_zero_takes_the_likeliest() -> None:
    logits = torch.tensor([100.0, 300.0, -200.0])
    for cuts in ((None, None), (2, None), (None, 0.5)):
        for temperature in (1e-37, 1e-46):
            assert probabilities(logits, temperature, *cuts).tolist() == [0, 1, 0]


def test_one_beam_is_greedy() -> None:
    net, prompt = Trigram(seed=5), torch.tensor([[0, 1], [1, 1], [2, 0]])
    greedy = generate(net, prompt, max_new_tokens=6, temperature=0, eos_id=EOS)
    found, total = search(Window(net, prompt), 1, 6, 0.0, EOS)
    assert [row.tolist() for row in found] == rows_of(greedy)
    torch.testing.assert_close(total, greedy.log_prob)


def test_the_penalty_is_that_of_gnmt() -> None:
    assert [penalty(1, 0.6), penalty(7, 1.0), penalty(9, 0)] == [1, 2, 1]


def test_a_search_stops_when_nothing_better_can_come() -> None:
    """EOS is all but certain everywhere: of 50 steps two are looked at."""
    net = Trigram()
    with torch.no_grad():
        net.table.zero_()
        net.table[..., EOS] = 12
    found = generate(net, torch.tensor([[0]]), max_new_tokens=50, num_beams=3, eos_id=EOS)
    assert rows_of(found) == [[EOS]]
    assert len(net.calls.sizes) == 1


# -- draws --------------------------------------------------------------------------------------------------------


def test_shares_of_sequences_follow_their_probabilities() -> None:
    """4,000 rows of two tokens: five standard deviations of a share are 0.04 at most."""
    net = Trigram(seed=2)
    prompt = torch.tensor([[0, 2]]).expand(4000, 2)
    generator = torch.Generator().manual_seed(0)
    found = generate(net, prompt, max_new_tokens=2, temperature=1.5, generator=generator).tokens
    shares = torch.bincount(found[:, 0] * VOCAB + found[:, 1], minlength=VOCAB**2) / 4000
    first = (net.table[0, 2] / 1.5).softmax(-1)
    second = (net.table[2] / 1.5).softmax(-1)
    want = (first.unsqueeze(1) * second).flatten().detach()
    assert (shares - want).abs().max() < 0.04
    assert (shares - want.flip(0)).abs().max() > 0.1, "the bound tells a wrong distribution"


def test_the_cuts_hold_the_mass_that_they_name() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0], [1.0, 1.0, 1.0, 1.0]])
    p = logits.softmax(-1)
    torch.testing.assert_close(probabilities(logits, 1.0, None, None), p)
    cut = torch.stack([torch.tensor([0, p[0, 1], p[0, 2], 0]) / (p[0, 1] + p[0, 2]), torch.tensor([0.5, 0.5, 0, 0])])
    torch.testing.assert_close(probabilities(logits, 1.0, 2, None), cut)
    # 0.64 + 0.24 reach 0.7, and two of four equal ones reach exactly a half.
    torch.testing.assert_close(probabilities(logits, 1.0, None, 0.7)[0], cut[0])
    torch.testing.assert_close(probabilities(logits, 1.0, None, 0.5)[1], cut[1])
    torch.testing.assert_close(probabilities(logits, 2.0, None, None), (logits / 2).softmax(-1))


def test_equal_logits_but_for_rounding_give_equal_draws() -> None:
    """What a cache changes: near-equal tokens change places in the ranking, and must not change the draw."""
    logits = torch.randn(200, 1) + 1e-7 * torch.randn(200, 6)
    moved = logits + 1e-7 * torch.randn(200, 6)
    assert not torch.equal(logits.argsort(-1), moved.argsort(-1))
    for top_k, top_p in ((None, None), (6, None), (None, 1.0)):
        a, b = (sample(1.0, top_k, top_p, torch.Generator().manual_seed(3), x) for x in (logits, moved))
        assert torch.equal(a, b)


def test_the_draws_of_a_row_do_not_depend_on_when_others_end() -> None:
    net = Trigram(seed=1)
    prompt = torch.tensor([[0, 1], [1, 0], [2, 2]])

    def rows(eos_id: int | None) -> Tensor:
        draw = torch.Generator().manual_seed(4)
        return generate(net, prompt, max_new_tokens=8, eos_id=eos_id, generator=draw).tokens

    free, ending = rows(None), rows(EOS)
    stops = [row.tolist().index(EOS) if EOS in row else 8 for row in free]
    assert len(set(stops)) > 1
    for row, stop in enumerate(stops):
        assert ending[row, :stop].tolist() == free[row, :stop].tolist()
        assert (ending[row, stop:] == EOS).all()


def test_every_row_ends_by_itself_and_is_no_longer_computed() -> None:
    net = Trigram(seed=1)
    prompt = torch.tensor([[0, 1], [1, 0], [2, 2], [0, 0], [2, 1]])
    together = generate(net, prompt, max_new_tokens=9, temperature=0, eos_id=EOS)
    for row, new in enumerate(rows_of(together)):
        alone = generate(net, prompt[row : row + 1], max_new_tokens=9, temperature=0, eos_id=EOS)
        assert rows_of(alone) == [new]
        assert float(together.log_prob[row]) == pytest.approx(log_prob(net.nats(), prompt[row].tolist(), new), rel=1e-5)
    steps = list(stream(net, prompt, max_new_tokens=9, temperature=0, eos_id=EOS))
    assert torch.equal(torch.stack(steps, 1), together.tokens)


def test_any_of_several_tokens_ends_a_row() -> None:
    """A row is cut after the first of them that a model without an end would have given; the filling is the first."""
    net = Trigram(seed=2)
    prompt = torch.tensor([[0, 1], [1, 0], [2, 2], [0, 0], [2, 1]])
    free = generate(net, prompt, max_new_tokens=9, temperature=0).tokens.tolist()
    found = generate(net, prompt, max_new_tokens=9, temperature=0, eos_id=(EOS, 2))
    cuts = [next((i + 1 for i, token in enumerate(row) if token in (EOS, 2)), 9) for row in free]
    assert rows_of(found) == [row[:cut] for row, cut in zip(free, cuts, strict=True)]
    assert {row[cut - 1] for row, cut in zip(free, cuts, strict=True)} >= {EOS, 2}
    assert set(found.tokens[~found.valid].tolist()) == {EOS}
    for row, tokens in enumerate(prompt):
        alone = list(continuation(net, tokens, 9, temperature=0, eos_id=[EOS, 2]))
        assert alone == [token for token in free[row][: cuts[row]] if token not in (EOS, 2)]
    beams = generate(net, prompt, max_new_tokens=4, num_beams=64, length_penalty=0, eos_id=(EOS, 2))
    assert all(not {EOS, 2} & set(row[:-1]) for row in rows_of(beams))


# -- the window ---------------------------------------------------------------------------------------------------


def test_with_a_cache_a_step_is_one_token() -> None:
    net, prompt = Trigram(), torch.tensor([[0, 1, 2, 1]])
    cached = generate(net, prompt, max_new_tokens=5, temperature=0)
    assert net.calls == Calls([4, 1, 1, 1, 1], [True] * 5)
    net.calls = Calls()
    whole = generate(net, prompt, max_new_tokens=5, temperature=0, use_cache=False)
    assert net.calls == Calls([4, 5, 6, 7, 8], [False] * 5)
    assert torch.equal(cached.tokens, whole.tokens)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [1, 2])
def test_no_cache_is_kept_where_none_is_wanted(beams: int, use_cache: bool) -> None:
    prompt = torch.tensor([1, 0])
    for run, given in ((generate, prompt.view(1, 2)), (continuation, prompt), (completions, [prompt])):
        net = Trigram()
        found = run(net, given, max_new_tokens=3, num_beams=beams, use_cache=use_cache)
        assert len(found.tokens if run is generate else list(found)) > 0
        assert net.calls.cached == [use_cache] * 3
        assert (max(net.calls.sizes[1:]) == 1) == use_cache


def test_what_a_cache_would_change_is_computed_without_one() -> None:
    net = Trigram()
    net.uncacheable = "a capacity binds"
    generate(net, torch.tensor([[0, 1]]), max_new_tokens=2)
    assert net.calls == Calls([2, 3], [False, False])


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_full_context_forgets_its_older_half(use_cache: bool) -> None:
    """Context 6, a prompt of 9: six are read, then of 7 three are kept, and three more steps fill the six again."""
    net = Trigram(context=6)
    prompt = torch.tensor([[0, 1, 2, 1, 0, 2, 1, 1, 0]])
    found = generate(net, prompt, max_new_tokens=10, temperature=0, use_cache=use_cache)
    sizes = [6, 3, 4, 5, 6, 3, 4, 5, 6, 3]
    assert net.calls.sizes == ([6, 3, 1, 1, 1, 3, 1, 1, 1, 3] if use_cache else sizes)
    whole, new = prompt[0].tolist(), []
    for size in sizes:
        logits = net.eval()(torch.tensor([(whole + new)[-size:]])).logits
        new.append(int(logits[0, -1].argmax()))
    assert found.tokens.tolist() == [new]


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_context_of_one_token_keeps_the_newest(use_cache: bool) -> None:
    net = Trigram(context=1)
    found = generate(net, torch.tensor([[0, 1]]), max_new_tokens=4, temperature=0, use_cache=use_cache)
    wanted = [1]
    for _ in range(4):
        wanted.append(int(net.table[wanted[-1], wanted[-1]].argmax()))
    assert found.tokens.tolist() == [wanted[1:]]
    assert net.calls.sizes == [1] * 4


def test_of_padded_prompts_longer_than_the_context_the_newest_part_is_read() -> None:
    net = decoder(context=4)
    prompts = [torch.randint(11, (n,)) for n in (6, 2)]
    found = generate(net, *pad_left(prompts), max_new_tokens=1, temperature=0)
    for row, prompt in enumerate(prompts):
        alone = generate(net, prompt[-4:].unsqueeze(0), max_new_tokens=1, temperature=0)
        torch.testing.assert_close(found.log_prob[row], alone.log_prob[0])
    # A row of one token is half padding still when the older half of both is forgotten.
    net = decoder(context=6)
    prompts = [torch.randint(11, (n,)) for n in (6, 1)]
    found = generate(net, *pad_left(prompts), max_new_tokens=2, temperature=0)
    alone = generate(net, prompts[1].unsqueeze(0), max_new_tokens=2, temperature=0)
    torch.testing.assert_close(found.log_prob[1], alone.log_prob[0])


def test_modes_and_gradients_are_left_as_they_were() -> None:
    net = Trigram().train()
    net.dropout.eval()
    modes = [part.training for part in net.modules()]
    tokens = stream(net, torch.tensor([[0, 1]]), max_new_tokens=3)
    for token in tokens:
        assert [part.training for part in net.modules()] == modes
        assert not token.requires_grad
        assert torch.is_grad_enabled()
    generate(net, torch.tensor([[0, 1]]), max_new_tokens=3, num_beams=2)
    assert [part.training for part in net.modules()] == modes

    class Fails(Trigram):
        def forward(self, *_: Any, **__: Any) -> Output:
            raise RuntimeError("no")

    broken = Fails().train()
    with pytest.raises(RuntimeError, match="no"):
        generate(broken, torch.tensor([[0, 1]]), max_new_tokens=3)
    assert broken.training


@pytest.mark.parametrize("use_cache", [True, False])
def test_only_so_many_ids_may_come_next(use_cache: bool) -> None:
    """A model's last ones may belong to no symbol: every way of decoding leaves them out."""
    net, prompt = Trigram(), torch.tensor([[1, 0]])
    with torch.no_grad():
        net.table[..., 2:] += 9
    for options in ({"temperature": 0}, {"num_beams": 2}, {}):
        given = {"max_new_tokens": 6, "symbols": 2, "use_cache": use_cache, **options}
        assert set(generate(net, prompt, **given).tokens.flatten().tolist()) <= {0, 1}
        count = given.pop("max_new_tokens")
        assert set(continuation(net, prompt[0], count, **given)) <= {0, 1}
        assert {token for row in completions(net, [prompt[0]] * 2, count, **given) for token in row} <= {0, 1}
    assert generate(net, prompt, max_new_tokens=1, temperature=0).tokens.item() >= 2


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-9}])
def test_every_way_of_drawing_hears_of_the_cuts(cut: dict[str, Any]) -> None:
    """Each of these leaves the likeliest token alone."""
    net, prompt = Trigram(), torch.tensor([1, 0])
    greedy = generate(net, prompt.view(1, 2), max_new_tokens=12, temperature=0).tokens[0].tolist()
    assert generate(net, prompt.view(1, 2), max_new_tokens=12, **cut).tokens[0].tolist() == greedy
    assert list(continuation(net, prompt, 12, **cut)) == greedy
    assert completions(net, [prompt] * 2, 12, **cut) == [greedy] * 2


def test_no_tokens_are_none() -> None:
    for beams in (1, 2):
        found = generate(Trigram(), torch.tensor([[0], [1]]), max_new_tokens=0, num_beams=beams)
        assert (found.tokens.shape, found.valid.shape, found.log_prob.tolist()) == ((2, 0), (2, 0), [0, 0])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"temperature": math.nan}, "temperature must be a finite number >= 0"),
        ({"top_k": 0}, "top_k must be at least 1; got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]; got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]; got 1.5"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0; got -1"),
        ({"num_beams": 0}, r"num_beams must be at least 1 \(1: no search\); got 0"),
        ({"num_beams": 2, "top_k": 3}, "num_beams=2 searches and draws nothing"),
        ({"num_beams": 2, "length_penalty": -0.5}, r"length_penalty must be a finite number >= 0 .*got -0.5"),
        ({"tokens": torch.empty(1, 0, dtype=torch.long)}, "the prompt is empty"),
        ({"tokens": None}, "there is no prompt"),
        ({"valid": torch.tensor([[True, False]])}, "row 0 of the prompt ends in padding: pad on the left"),
        ({"valid": torch.tensor([[False, False]])}, "row 0 of the prompt is empty"),
        ({"valid": torch.tensor([[True]])}, r"the prompt has shape \[1, 2\] and its valid \[1, 1\]"),
        ({"generator": [torch.Generator()] * 2}, "one for each of 1 rows; got a list of 2"),
        ({"generator": []}, "one for each of 1 rows; got a list of 0"),
        ({"source": torch.tensor([[1]])}, "a Trigram goes on from tokens and reads no source"),
    ],
)
def test_bad_options(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        generate(Trigram(), **{"tokens": torch.tensor([[0, 1]]), "max_new_tokens": 2, **given})


def test_stream_refuses_at_once() -> None:
    with pytest.raises(ValueError, match="top_k"):
        stream(Trigram(), torch.tensor([[0, 1]]), max_new_tokens=2, top_k=0)
    for beams in (1, 2):
        with pytest.raises(ValueError, match="max_new_tokens must be at least 0; got -3"):
            continuation(Trigram(), torch.tensor([0, 1]), -3, num_beams=beams)


def test_pad_left() -> None:
    tokens, valid = pad_left([torch.tensor([5]), torch.tensor([6, 7, 8])], pad_id=2)
    assert tokens.tolist() == [[2, 2, 5], [6, 7, 8]]
    assert valid.tolist() == [[False, False, True], [True, True, True]]
    with pytest.raises(ValueError, match="the prompt is empty"):
        pad_left([torch.tensor([5]), torch.tensor([], dtype=torch.long)])


# -- real models --------------------------------------------------------------------------------------------------

SIZES = {"d_model": 16, "num_heads": 2, "d_ff": 24, "num_experts": 4, "sparse": "every(1)"}


def decoder(**more: Any) -> Decoder:
    net = Decoder(11, **{"num_layers": 2, "context": 16, "moe": partial(MoELayer, router=TopK), **SIZES, **more})
    return spread(net)


def encoder_decoder(**more: Any) -> EncoderDecoder:
    moe = partial(MoELayer, router=TopK)
    return spread(EncoderDecoder(11, **{"encoder_layers": 2, "moe": moe, **SIZES, **more}))


def spread(net: Any) -> Any:
    """Weights that tell tokens apart."""
    for p in net.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.4)
    return net.eval()


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("use_cache", [True, False])
def test_log_probabilities_are_taken_in_float32_at_least(
    dtype: torch.dtype, wanted: torch.dtype, use_cache: bool
) -> None:
    window = Window(decoder().to(dtype), torch.tensor([[1, 2]]), use_cache=use_cache)
    assert window.logits().dtype == wanted


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_decoder_with_a_cache_and_without_over_the_end_of_its_context(positions: str, beams: int) -> None:
    net = decoder(positions=positions)
    tokens, valid = pad_left([torch.randint(11, (n,)) for n in (3, 7, 1)])

    def run(use_cache: bool) -> Any:
        draw = {"generator": torch.Generator().manual_seed(1)} if beams == 1 else {}
        options = {"max_new_tokens": 24, "num_beams": beams, "eos_id": 4, "use_cache": use_cache}
        return generate(net, tokens, valid, **options, **draw)

    cached, whole = run(True), run(False)
    assert torch.equal(cached.tokens, whole.tokens)
    torch.testing.assert_close(cached.log_prob, whole.log_prob)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_several_prompts_as_one_would_be_alone(positions: str) -> None:
    """Drawn too, with a generator for each; one for all gives other draws to the second row."""
    net = decoder(positions=positions)
    prompts = [torch.randint(11, (n,)) for n in (2, 6, 4)]
    assert one_at_a_time(net, prompts, 8) is None
    for options in ({"temperature": 0}, {"top_k": 5}, {"num_beams": 2}):
        draws = [torch.Generator().manual_seed(seed) for seed in range(3)] if "top_k" in options else None
        found = completions(net, prompts, 8, eos_id=4, **options, **({"generator": draws} if draws else {}))
        for seed, prompt in enumerate(prompts):
            own = {"generator": torch.Generator().manual_seed(seed)} if draws else {}
            assert list(continuation(net, prompt, 8, eos_id=4, **options, **own)) == found[seed]
    assert "does not fit into the context of 16" in str(one_at_a_time(net, prompts, 12))
    assert one_at_a_time(net, prompts, 11) is None, "the last token is not read any more"
    assert one_at_a_time(net, prompts[:1] * 2, 99) is None
    assert "does not say whether padding" in str(one_at_a_time(nn.Linear(1, 1), prompts, 1))


def test_several_sources_as_one_would_be_alone() -> None:
    net = encoder_decoder(start_id=2)
    sources = [torch.randint(1, 11, (n,)) for n in (1, 7, 3)]
    for options in ({"temperature": 0}, {"num_beams": 2, "temperature": 0}):
        found = completions(net, sources, 8, eos_id=4, **options)
        assert found == [list(continuation(net, source, 8, eos_id=4, **options)) for source in sources]


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_padding_changes_nothing(positions: str) -> None:
    net = decoder(positions=positions)
    prompts = [torch.randint(11, (n,)) for n in (2, 6, 4)]
    together = generate(net, *pad_left(prompts), max_new_tokens=8, temperature=0, eos_id=4)
    for row, prompt in enumerate(prompts):
        alone = generate(net, prompt.unsqueeze(0), max_new_tokens=8, temperature=0, eos_id=4)
        assert rows_of(alone)[0] == rows_of(together)[row]
        torch.testing.assert_close(alone.log_prob[0], together.log_prob[row])


@pytest.mark.parametrize("beams", [1, 3])
def test_an_encoder_decoder_reads_its_source(beams: int) -> None:
    net = encoder_decoder(start_id=2)
    sources = [torch.randint(11, (n,)) for n in (5, 2, 8)]
    source = torch.stack([torch.nn.functional.pad(s, (0, 8 - len(s))) for s in sources])
    real = torch.arange(8) < torch.tensor([5, 2, 8]).unsqueeze(1)
    draw = {"temperature": 0} if beams == 1 else {"num_beams": beams}

    def run(**given: Any) -> Any:
        return generate(net, max_new_tokens=7, eos_id=4, **draw, **given)

    cached = run(source=source, source_valid=real)
    whole = run(source=source, source_valid=real, use_cache=False)
    assert torch.equal(cached.tokens, whole.tokens)
    torch.testing.assert_close(cached.log_prob, whole.log_prob)
    assert len({tuple(row) for row in rows_of(cached)}) > 1, "the source decides"
    for row, alone in enumerate(sources):
        assert rows_of(run(source=alone.unsqueeze(0)))[0] == rows_of(cached)[row]
    if beams == 1:
        first = net(torch.tensor([[2]]), source=sources[0].unsqueeze(0)).logits[0, -1].argmax()
        assert int(first) == rows_of(cached)[0][0]
    with pytest.raises(ValueError, match="an? EncoderDecoder reads a source, and none was given"):
        run(tokens=torch.tensor([[1]]))


def test_a_capacity_that_binds_is_decoded_without_a_cache() -> None:
    net = decoder(moe=partial(MoELayer, router=TopK, capacity=partial(Factor, train=0.5, eval=0.5)))
    assert net.uncacheable is not None
    prompt = torch.randint(11, (1, 5))
    found = generate(net, prompt, max_new_tokens=6, temperature=0).tokens
    whole = prompt
    for _ in range(6):
        whole = torch.cat([whole, net(whole).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, whole[:, 5:])


def test_sources_whose_encoder_has_a_capacity_do_not_share_a_batch() -> None:
    """Padding counts in it; the decoder alone would have a cache."""
    net = encoder_decoder(moe=partial(MoELayer, router=TopK, capacity=partial(Factor, 1.0, 1.0)), decoder_sparse=[])
    assert net.uncacheable is None
    assert "Factor limits the capacity" in str(one_at_a_time(net, [torch.tensor([1, 2]), torch.tensor([3])], 4))


@pytest.mark.parametrize("group", ["batch", 4])
def test_rows_and_beams_do_not_share_a_capacity(group: str | int) -> None:
    """The score of a beam is that of its sequence, and the text of a row is the one that it has alone."""
    moe = partial(MoELayer, router=TopK, group=group, capacity=partial(Factor, train=0.5, eval=0.5))
    net, prompts = decoder(moe=moe), torch.randint(11, (2, 5))
    for options in ({"num_beams": 3, "length_penalty": 0.0}, {"temperature": 0}):
        found = generate(net, prompts, max_new_tokens=8, **options)
        for row, prompt in enumerate(prompts):
            whole = torch.cat([prompt, found.tokens[row]]).unsqueeze(0)
            nats = torch.stack([net(whole[:, :n]).logits[0, -1].log_softmax(-1) for n in range(5, 13)])
            torch.testing.assert_close(found.log_prob[row], nats.gather(1, whole[0, 5:, None]).sum())


def test_beams_of_a_source_do_not_share_a_capacity() -> None:
    net = encoder_decoder(moe=partial(MoELayer, group="batch", capacity=partial(Factor, train=0.5, eval=0.5)))
    source = torch.randint(11, (1, 6))
    found = generate(net, source=source, max_new_tokens=7, num_beams=3)
    whole = torch.cat([torch.tensor([[net.start_id]]), found.tokens], 1)
    nats = torch.stack([net(whole[:, :n], source=source).logits[0, -1].log_softmax(-1) for n in range(1, 8)])
    torch.testing.assert_close(found.log_prob[0], nats.gather(1, whole[0, 1:, None]).sum())


@pytest.mark.parametrize("beams", [1, 2])
def test_sources_do_not_share_the_capacity_of_an_encoder(beams: int) -> None:
    """Where the decoder alone would have a cache: each row is what it is alone, with `use_cache` and without."""
    tight = partial(MoELayer, router=TopK, capacity=partial(Factor, 0.5, 0.5), group="batch")
    net = encoder_decoder(moe=tight, decoder_sparse=[])
    assert net.uncacheable is None
    source = torch.randint(11, (3, 6))
    options = {"max_new_tokens": 5, "num_beams": beams, "temperature": 0 if beams == 1 else 1}
    alone = torch.cat([generate(net, source=row.unsqueeze(0), **options).log_prob for row in source])
    for use_cache in (True, False):
        found = generate(net, source=source, use_cache=use_cache, **options)
        torch.testing.assert_close(found.log_prob, alone)


def test_a_model_of_ones_own_needs_no_cache() -> None:
    class Plain(nn.Module):
        """Nothing but tokens in and logits out."""

        def __init__(self) -> None:
            super().__init__()
            self.net = decoder()

        def forward(self, tokens: Tensor) -> Output:
            return self.net(tokens)

    net, prompt = Plain(), torch.randint(11, (2, 3))
    want = generate(net.net, prompt, max_new_tokens=5, temperature=0).tokens
    assert torch.equal(generate(net, prompt, max_new_tokens=5, temperature=0).tokens, want)


def test_a_fresh_cache_is_empty() -> None:
    assert Cache().length == 0
