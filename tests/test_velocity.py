"""The error of the velocity: its lines, what they are made from, and the section of the page that is made of them."""

import copy
from itertools import product

import numpy as np
import pytest
import torch

from orbitdit import OrbitQuantConfig, quantize_
from orbitdit.lines import read_lines
from orbitdit.shapes.pipeline import initial_noise, predict
from orbitdit.shapes.prompts import benchmark, tokenize
from scripts import velocity, velocity_page
from scripts.variants import VARIANTS, allocated
from scripts.velocity import NOISE, Run, Subject, groups_of, noisy


@pytest.fixture(scope="module")
def subject(folders):
    return Subject(folders / "glyphs", 1, 3, 8)


def by_hand(pipeline, other, steps=3, guidance=3):
    """Errors of `other` along the trajectory of the pipeline's transformer, without the pipeline's call."""
    texts = [p.text for p in benchmark(1, world=pipeline.world)]
    tokens = torch.tensor([tokenize(text, pipeline.world) for text in texts + [""] * len(texts)])
    words, pooled = pipeline.text_encoder(tokens)
    x = initial_noise(range(len(texts)))
    pipeline.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    raw, guided = [], []
    for t in pipeline.scheduler.timesteps:
        inputs = torch.cat([x, x]), (t / 1000).expand(len(tokens)), words, pooled
        v, q = predict(pipeline.transformer, *inputs), predict(other, *inputs)
        raw.append(float((q - v).norm() / v.norm()) ** 2)
        v, q = ((1 - guidance) * both[len(texts) :] + guidance * both[: len(texts)] for both in (v, q))
        guided.append(float((q - v).norm() / v.norm()) ** 2)
        x = pipeline.scheduler.step(v, t, x, return_dict=False)[0]
    return sum(raw) / steps, sum(guided) / steps


@torch.no_grad()
def test_the_error_is_that_along_the_trajectory(subject):
    model = copy.deepcopy(subject.model)
    assert subject.error(model) == {"error": 0, "guided": 0}
    quantize_(model, OrbitQuantConfig("w3a4"), progress=False)
    found = subject.error(model)
    assert (found["error"], found["guided"]) == pytest.approx(by_hand(subject.pipeline, model), rel=1e-4)
    assert 0 < found["error"] < found["guided"]
    assert len(subject.calls) == 3


def test_a_mean_token_of_equal_tokens_holds_all(subject):
    shares = [share for layer in subject.mean_energy.values() for share in layer]
    assert len(shares) == 3 * len(subject.weights)
    assert all(0 <= share <= 1 + 1e-5 for share in shares)
    alike, alone = torch.ones(2, 5, 8), torch.eye(4)[None]
    assert velocity.mean_energy(alike) == pytest.approx(1)
    assert velocity.mean_energy(alone) == pytest.approx(1 / 4)
    assert velocity.mean_energy(torch.cat([alike, -alike], 1)) == 0


LAYERS = [f"blocks.{n}.attn.{name}" for n in range(11) for name in ("to_q", "add_q_proj", "to_out.0")] + ["proj_in"]


def test_groups_of_layers():
    groups = groups_of(LAYERS)
    kinds = ["blocks.attn.to_q", "blocks.attn.add_q_proj", "blocks.attn.to_out.0", "proj_in"]
    assert list(groups) == ["all", "text stream", *kinds, "blocks.0", "blocks.5", "blocks.10"]
    assert groups["all"] == LAYERS
    assert groups["text stream"] == groups["blocks.attn.add_q_proj"] == LAYERS[1:-1:3]
    assert groups["blocks.10"] == LAYERS[30:33]
    assert [name for name in groups if velocity_page.is_block(name)] == ["blocks.0", "blocks.5", "blocks.10"]
    assert list(groups_of(["one.0.to_q"])) == ["all", "one.to_q", "one.0"]


def test_noise_is_as_large_as_said_and_goes(subject):
    before = {name: p.clone() for name, p in subject.model.state_dict().items()}
    one, other = list(subject.weights)[3:5]

    def noise(bits, seed=0):
        with noisy(subject.model, subject.weights, bits, seed):
            return {n: p - before[n] for n, p in subject.model.state_dict().items() if not torch.equal(p, before[n])}

    alone, both = noise({one: 2}), noise({one: 2, other: 2})
    assert list(alone) == [f"{one}.weight"]
    assert set(both) == {f"{one}.weight", f"{other}.weight"}
    assert torch.equal(both[f"{one}.weight"], alone[f"{one}.weight"])
    assert not torch.equal(noise({one: 2}, seed=1)[f"{one}.weight"], alone[f"{one}.weight"])
    weight = before[f"{one}.weight"]
    for bits, size in ((1, 0.272 / 0.728), (2, 0.0709 / 0.9291), (4, 0.0049 / 0.9951)):
        added = noise({one: bits})[f"{one}.weight"]
        assert float(added.square().sum() / weight.square().sum()) == pytest.approx(size, rel=0.1)
    with pytest.raises(KeyError), noisy(subject.model, subject.weights, {one: 2}, 0):
        raise KeyError
    assert all(torch.equal(p, before[name]) for name, p in subject.model.state_dict().items())


@pytest.mark.parametrize("average", [1.0, 2.0, 2.6])
def test_bits_are_allocated_as_an_exhaustive_search_does(average):
    errors = {"a": 3.0, "b": 0.001, "c": 0.5, "d": 1.0, "e": 0.0}
    found = allocated(errors, dict.fromkeys(errors, 7), average, NOISE)

    def total(bits):
        return sum(error * NOISE[b] for error, b in zip(errors.values(), bits, strict=True))

    every = [bits for bits in product((1, 2, 3, 4), repeat=5) if sum(bits) <= 5 * average]
    assert total(found.values()) == pytest.approx(min(map(total, every)))


def test_the_smaller_of_two_equal_errors_gets_more():
    assert allocated({"a": 1.0, "b": 1.0}, {"a": 100, "b": 10}, 1.3, NOISE) == {"a": 1, "b": 4}


def run(out, folders, *given):
    models = [f"--model={name}={folders / name}" for name in ("shapes", "glyphs")]
    velocity.main(["--out", str(out), *models, "--steps", "1", "--states", "8", "--commit", "abc", *given])
    return read_lines(out)


def test_all_runs_in_order(folders):
    names = [r.label for r in velocity.runs_of({"s": folders / "shapes", "g": folders / "glyphs"}, (0, 4))]
    assert len(set(names)) == len(names)
    assert names[:3] == ["s/paper/W3A3/0", "s/base/W3A3/0", "s/token-mean/W3A3/0"]
    variants = {(name, bits) for name, variant in VARIANTS.items() for bits in variant.bits if bits in velocity.BITS}
    assert {f"g/{name}/{bits}/4" for name, bits in variants} < set(names)
    assert "g/allotted/W2A4/0" not in names
    assert names.index("g/oracle/W2/0") + 1 == names.index("s/paper/W3A3/4")
    assert names[-1] == "g/oracle/W2/4"
    assert {"s/single_transformer_blocks.1/W2/0", "s/single_transformer_blocks.proj_out/W2/4"} < set(names)


def test_lines_are_written_once_and_go_on_after_a_stop(folders, tmp_path, capsys):
    out = tmp_path / "new" / "v.jsonl"
    chosen = [f"--only=glyphs/{name}/*" for name in ("paper", "base", "token-mean", "own-mean", "all", "*ff.net*")]
    given = *chosen, "--only=glyphs/oracle/*", "--seeds", "3"
    rows = run(out, folders, *given)
    assert [(r["what"], r["name"], r["bits"]) for r in rows] == [
        *(("variant", name, bits) for bits in velocity.BITS for name in ("paper", "base", "token-mean", "own-mean")),
        ("layers", "all", "W2"),
        *(("layers", f"transformer_blocks.ff.net.{part}", "W2") for part in ("0.proj", "2")),
        ("oracle", "oracle", "W2"),
    ]
    assert len({r["guided"] for r in rows}) == len(rows)
    assert {(r["seed"], r["states"], r["steps"], r["per_category"], r["commit"]) for r in rows} == {(3, 8, 1, 1, "abc")}
    whole, part, oracle = rows[-4], rows[-3], rows[-1]
    assert whole["weights"] == 1
    assert 0.1 < part["weights"] < 0.5
    assert part["guided"] < whole["guided"]
    assert oracle["guided"] < whole["guided"]
    assert 1.8 < oracle["average"] <= 2
    assert set(oracle["bits_of"].values()) <= {1, 2, 3, 4}
    assert "[12/12] glyphs/oracle/W2/3: error" in capsys.readouterr().out
    out.write_text(out.read_text()[:-20])
    again = run(out, folders, *given)
    said = capsys.readouterr().out
    assert "unfinished" in said
    assert "11 of 12 runs are in" in said
    assert again == rows
    assert len(run(out, folders, "--only=glyphs/all/*", "--seeds", "3", "--steps", "2")) == 13


def test_bad_use_is_one_line(folders, tmp_path):
    out = tmp_path / "v.jsonl"
    for given, message in (
        (["--only", "nothing"], "--only nothing matches no run, such as shapes/paper/W3A3/0"),
        (["--per-category", "3"], "--per-category 3 is more than a batch of 12 pictures"),
        (["--model", "x"], "--model 'x' is not NAME=FOLDER"),
        (["--model", "x=nowhere"], "nowhere is no folder: training/README.md says how"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(out, folders, *given)
    out.write_text("[1]\n")
    with pytest.raises(SystemExit, match=r"velocity: .*v\.jsonl, line 1 is no JSON object"):
        run(out, folders)


def line(model, what, name, bits, seed, guided, **more):
    facts = {"per_category": 1, "steps": 12, "states": 12, "torch": "2.11", "commit": "abc", "date": "2026-11-25"}
    return {**Run(model, what, name, bits, seed)._asdict(), "error": 1.0, "guided": guided, **facts, **more}


def layers(name, seed, guided, weights, energy=None):
    return line("a", "layers", name, "W2", seed, guided, weights=weights, mean_energy=energy)


def test_the_section_says_what_the_lines_say():
    assert velocity_page.section([]) == ""
    rows = [
        line("a", "variant", "base", "W3A3", 0, 9.0),
        line("a", "variant", "base", "W3A3", 0, 0.5),
        line("a", "variant", "base", "W3A3", 1, 0.25),
        line("a", "variant", "paper", "W3A3", 0, 0.75),
        line("a", "variant", "token-mean", "W3A3", 0, 0.40),
        line("a", "variant", "token-mean", "W3A3", 1, 0.15),
        line("a", "variant", "token-mean", "W3A3", 2, 0.01),
        line("a", "variant", "two-rounds", "W3A3", 0, 0.01, states=8),
        line("b", "variant", "base", "W2A4", 0, 0.125),
        line("b", "variant", "cross-blocks", "W2A4", 0, 0.25, error=0.5),
        layers("all", 0, 0.1, 1.0, 0.3),
        layers("all", 1, 0.2, 1.0, 0.3),
        layers("text stream", 0, 0.0001, 0.48),
        layers("blocks.to_q", 0, 0.01, 0.2, 0.41),
        layers("blocks.ff.0", 0, 0.06, 0.32, 0.5),
        layers("blocks.ff.0", 1, 0.14, 0.32, 0.5),
        layers("blocks.0", 0, 0.02, 0.11, 0.6),
        line("a", "oracle", "oracle", "W2", 0, 0.02, average=2.0, bits_of={"blocks.to_q": 1, "blocks.ff.0": 3}),
        line("a", "oracle", "oracle", "W2", 1, 0.06, average=1.9, bits_of={"blocks.to_q": 2, "blocks.ff.0": 3}),
    ]
    text = velocity_page.section(rows)
    for expected in (
        "| a, W3A3 | b, W2A4 |",
        "| the paper's recipe | 1.50 | - |",
        "| trellis codes and unbiased rows | 1 (0.375 ± 0.177) | 1 (0.125) |",
        "| mean token apart | 0.70 ± 0.14 | - |",
        "| Hartley matrix across blocks | - | 2.00 |",
        "| Hartley matrix across blocks | - | 0.50 |",
        "| all layers | 100.0 | 100.0 ± 0.0 | 30 | - |",
        "| text stream | 48.0 | 0.1 | - | - |",
        "| `blocks.to_q` | 20.0 | 10.0 | 41 | 1 or 2 |",
        "| block `blocks.0` | 11.0 | 20.0 | 60 | - |",
        "| all layers, the oracle's bits | 100.0 | 25.0 ± 7.1 | - | 1.95 on average |",
        "6 prompts, 12 steps",
    ):
        assert expected in text, expected
    assert "two rounds of rotation |" not in text
    assert (
        text.index("`blocks.ff.0` | 32.0 | 65.0 ± 7.1") < text.index("`blocks.to_q`") < text.index("block `blocks.0`")
    )
