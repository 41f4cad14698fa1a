"""What the tests of an audit compute: probes, statistics of outputs, training inside an audit, shadow models."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import models as small

from unlearn import config, views
from unlearn.audit import (
    base,
    linear,
    membership,
    poisoning,
    probes,
    relearning,
    shadows,
    statistics,
    streisand,
    transfer,
    tuning,
)
from unlearn.audit.base import Piece
from unlearn.audit.bench import pooled
from unlearn.data import selection
from unlearn.data import shards as data
from unlearn.data.decode import decode
from unlearn.errors import ConfigError


def test_a_probe_is_ridge_regression():
    rng = np.random.default_rng(0)
    x, y = rng.normal(3, [1, 5, 0.1], (50, 3)), rng.normal(0, 1, (50, 2))
    z = (x - x.mean(0)) / x.std(0)
    expected = np.linalg.solve(z.T @ z + 50 * 0.3 * np.eye(3), z.T @ (y - y.mean(0)))
    np.testing.assert_allclose(linear.fit(x, y, 0.3)(x), z @ expected + y.mean(0), rtol=1e-9)
    constant = np.c_[x, np.full(50, 7.0)]
    np.testing.assert_allclose(linear.fit(constant, y, 0.3)(constant), linear.fit(x, y, 0.3)(x), rtol=1e-6)


def test_a_score_is_of_a_probe_that_has_not_seen_its_row():
    """With as many dimensions as rows anything can be learnt by heart, and nothing be said of other rows."""
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 1, (60, 60)), rng.normal(0, 1, (60, 60))
    assert 0.3 < statistics.auc(*linear.crossed(*noise, 1e-6, 5, 0)) < 0.7
    apart = noise[0] + 1, noise[1]
    assert statistics.auc(*linear.crossed(*apart, 0.1, 5, 0)) > 0.95


def test_pooled_embeddings_are_means_over_tokens_and_places():
    tokens, level = torch.randn(2, 5, 3), torch.randn(2, 4, 2, 2)
    both = pooled([tokens, level])
    torch.testing.assert_close(both, torch.cat([tokens.mean(1), level.mean((2, 3))], 1))
    assert pooled(tokens).shape == (2, 3)


def test_looks_are_of_the_hole():
    hidden = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    hidden[:, :, 4:12, 4:12] = True
    smooth = torch.full((2, 3, 16, 16), 0.5)
    rough = torch.where(hidden, torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), smooth)
    plain, noisy = streisand.looks(smooth, hidden), streisand.looks(rough, hidden)
    assert (plain[:, 1:6].abs() < 1e-9).all(), "grey has no contrast, no steps and no roughness"
    assert (noisy[:, 1:6] > 0.02).all() and (noisy[:, 7:12].abs() < 1e-9).all(), "outside nothing has changed"
    steps = (rough.diff(dim=2).abs() * (hidden[:, :, 1:] ^ hidden[:, :, :-1])).sum((1, 2, 3)) / 3
    steps += (rough.diff(dim=3).abs() * (hidden[..., 1:] ^ hidden[..., :-1])).sum((1, 2, 3)) / 3
    torch.testing.assert_close(noisy[:, 12], steps.double() / 32, rtol=1e-5, atol=1e-7)
    extreme = [(side & hidden).double().mean((1, 2, 3)) for side in (rough < 0.02, rough > 0.98)]
    assert (noisy[:, 13:15] == torch.stack(extreme, 1)).all() and noisy.shape == (2, 17)
    apart = (noisy[:, [1, 5]] + 0.01).log() - (noisy[:, [7, 11]] + 0.01).log()
    assert (noisy[:, 15:] == apart).all(), "contrast and roughness, inside against outside"


def test_a_cut_holds_the_hole_and_an_output_is_found_among_originals():
    images = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    hidden = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    hidden[0, :, 2:5, 1:5] = hidden[1, :, 5:8, 4:8] = True
    cut = probes._cut(images, hidden)
    assert torch.equal(cut[0], images[0, :, 2:5, 1:5]) and torch.equal(cut[1], images[1, :, 5:8, 4:8])
    gallery = np.random.default_rng(0).normal(5, 1, (20, 8))
    near = gallery + np.random.default_rng(1).normal(0, 0.1, gallery.shape)
    assert probes._found(near, gallery).all() and not probes._found(near[::-1], gallery).all()


def test_training_inside_an_audit_leaves_the_model_alone_and_repeats():
    model = small.build("mae").requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    pixels = torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    ends, seen = [], []
    for _ in range(2):
        copy = tuning.copied(model)
        tuning.tune(copy, pixels, [config.ViewSpec(size=0.5)], 3, 4, 1e-2, 7, tuning.rounds(3), seen.append)
        ends.append(copy)
    assert seen == [0, 1, 2, 3] * 2
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(ends[0].parameters(), ends[1].parameters(), strict=True))
    moved = {name.split(".")[0] for name, p in ends[0].named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"encoder", "decoder"}


@pytest.mark.parametrize("shape", ["mae", "mage", "diffusion_latent"])
def test_a_fresh_decoder_is_all_that_is_trained(shape):
    model = small.build(shape).requires_grad_(False)
    copy = tuning.with_fresh_decoder(model, 5)
    trained = {name for name, p in copy.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("decoder.") for name in trained)
    assert not any(name.startswith(model.first_stage_names) for name in trained)
    before, after = dict(model.named_parameters()), dict(copy.named_parameters())
    assert any(not torch.equal(after[name], before[name]) for name in trained)
    assert all(torch.equal(after[name], before[name]) for name in after if name not in trained)
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    tuning.tune(copy, pixels, [config.ViewSpec(kind="random", size=0.5)], 1, 4, 1e-3, 0)


def test_steps_are_about_even_on_a_logarithmic_scale():
    assert tuning.rounds(100) == [0, 1, 2, 5, 10, 20, 50, 100] and tuning.rounds(30) == [0, 1, 2, 5, 10, 20, 30]


def test_transfer_allows_neither_traces_nor_outputs_that_no_oracle_would_give():
    errors = np.random.default_rng(0).exponential(0.1, (200, 1))
    subject = SimpleNamespace(
        models=["original", "unlearned", "oracle"],
        estimate=lambda statistic, *samples: statistics.bootstrap(statistic, *samples, resamples=50, seed=0),
        run=SimpleNamespace(settings=config.RunConfig.model_construct(train_views=[config.ViewSpec(size=0.5)])),
    )
    test = transfer.Transfer(transfer.TransferOptions())
    embeddings = np.random.default_rng(1).normal(size=(200, 4))

    def verdicts(db: float) -> dict[str, str]:
        """db: of the unlearned model on forget images, above the oracle; the original is 5 dB above it."""
        measured = {("original", f"near:{name}"): {"embeddings": embeddings} for name in ("forget", "retain_new")}
        for model, lead in {"original": 5, "unlearned": db, "oracle": 0}.items():
            for name in ("forget", "forget_new"):
                measured[model, name] = {"errors": errors / 10 ** (lead / 10)}
            measured[model, "retain_new"] = {"errors": errors}
        judged = {f.name: base.judge(f, 0.95) for f in test.figures(measured, subject)}
        return {name: told.verdict for name, told in judged.items() if told}

    passed = {"views": "PASS", "images": "PASS", "beyond": "PASS", "bystanders": "PASS"}
    assert verdicts(0.5) == verdicts(-2.5) == passed
    assert verdicts(2) == passed | {"views": "FAIL", "images": "FAIL"} and verdicts(-6) == passed | {"beyond": "FAIL"}


def test_views_that_unlearning_used_are_not_new():
    def subject(*used):
        settings = SimpleNamespace(train_views=[config.ViewSpec(**view) for view in used])
        return SimpleNamespace(run=SimpleNamespace(settings=settings), sets=dict.fromkeys(transfer.Transfer.needs, [0]),
                               models=["original"], settings=SimpleNamespace(batch_size=1))  # fmt: skip

    test = transfer.Transfer(transfer.TransferOptions())
    assert test.new_views(subject({"size": 0.5}, {"kind": "box", "size": 0.5})) == test.options.views
    some = test.new_views(subject({"size": (0.7, 0.8)}, {"kind": "outpaint", "size": (0.25, 0.4)}))
    assert [view.name for view in some] == ["outpaint 0.5", "brush 0.5"]
    assert [v.kind for v in test.new_views(subject({"size": 0.7}, {"kind": "box", "size": 0.3}))] == [
        "outpaint",
        "brush",
    ]
    assert [v.kind for v in test.new_views(subject({"kind": "box", "size": 0.75}))] == ["outpaint", "brush"]
    every = subject(*({"kind": view.kind, "size": view.size} for view in test.options.views))
    assert not test.new_views(every) and "forget" not in {piece.what for piece in test.pieces(every)}


def test_members_are_found_only_among_enough_others():
    test = membership.Membership(membership.MembershipOptions())
    rng = np.random.default_rng(0)
    names = ["original", "unlearned", "oracle"]
    subject = SimpleNamespace(
        models=names, shadows={}, settings=SimpleNamespace(shadows=None),
        alike=lambda kept: {name: np.arange(len(positions)) for name, positions in kept.items()},
        estimate=lambda statistic, *samples: statistics.bootstrap(statistic, *samples, resamples=20, seed=0),
    )  # fmt: skip
    for others, told in ((50, []), (500, ["tpr_1"]), (1000, ["tpr_1", "tpr_01"])):
        sizes = {"forget": 60, "forget_new": others}
        measured = {
            (g, kind): {"errors": rng.exponential(1, (n, 2)), "kept": np.arange(n)}
            for g in names
            for kind, n in sizes.items()
        }
        made = {figure.name: figure for figure in test.figures(measured, subject)}
        assert list(made) == ["auc", "tpr_1", "tpr_01"]
        assert [name for name, figure in made.items() if figure.estimates] == ["auc", *told]
        assert all(f"there are {others}" in base.judge(made[n], 0.95).reason for n in made if not made[n].estimates)
    subject.settings.shadows = "folder"
    assert "it takes 4 shadow models, and folder has 0" in test.figures(measured, subject)[-1].absent


def test_a_lead_holds_the_chance_of_which_images_were_drawn():
    """Two draws: after one the model is 3 dB ahead of its oracle, after the other it is level with it."""
    level = np.random.default_rng(0).exponential(0.1, (2, 40, 3))
    ahead = np.stack([level[0], level[1] / 10 ** np.array([0, 0.1, 0.3])])
    subject = SimpleNamespace(
        models=["unlearned", "oracle"], same_classes=False,
        estimate=lambda statistic, *samples, **how: statistics.bootstrap(
            statistic, *samples, resamples=300, seed=0, **how
        ),
    )  # fmt: skip
    test = relearning.Relearning(relearning.RelearningOptions(on=["forget"], steps=2, images=8))
    measured = {("oracle", "forget"): {"errors": level}, ("unlearned", "forget"): {"errors": ahead}}
    lead, *_ = test.figures(measured, subject)
    value, (low, high) = lead.estimates["unlearned"].value, lead.estimates["unlearned"].interval(0.9)
    # Of two draws either counts alone in a quarter of the cases: 0 or 3 dB, and by Student's t 9.17 times as far away.
    assert low == pytest.approx(value - 9.17 * value, abs=1.5)
    assert high == pytest.approx(value + 9.17 * (3 - value), abs=1.5)
    subject.sets = {"forget": range(20), "forget_new": range(9), "retain": range(50)}
    rows = [(p.generator, p.start, p.stop) for p in test.pieces(subject)]
    assert rows == [(name, *draw) for name in subject.models for draw in ((0, 8), (8, 16))], "no image in two draws"
    assert test.watched(subject, "forget") == test.watched(subject, "retain") == ("forget_new", 0, 9)
    # Of images that were chosen one by one, others of their classes say nothing: they are watched themselves.
    subject.same_classes = True
    assert {(p.start, p.stop) for p in test.pieces(subject)} == {(0, 8)}, "half of them are left"
    assert test.watched(subject, "forget") == ("forget", 8, 20) and test.watched(subject, "retain") == ("forget", 0, 20)
    subject.sets["forget"] = range(1)
    assert test.watched(subject, "forget") == ("forget", 0, 1)


def test_retain_images_are_trained_on_with_another_seed_in_every_draw():
    options = relearning.RelearningOptions(on=["retain"], retain_draws=2, steps=1, batch_size=4)
    test, model = relearning.Relearning(options), small.build("mae").requires_grad_(False)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    asked = []
    subject = SimpleNamespace(
        models=["unlearned"], sets={"retain": range(6), "forget_new": range(6)}, same_classes=False,
        settings=SimpleNamespace(seed=0),
        run=SimpleNamespace(settings=SimpleNamespace(train_views=[config.ViewSpec(kind="random", size=0.5)])),
    )  # fmt: skip
    bench = SimpleNamespace(
        subject=subject, size=32, generator=lambda name: model,
        some=lambda name, start, stop: asked.append((name, start, stop)) or (np.arange(start, stop), images),
        view=lambda spec, number, name, kept: views.draw([spec], model.grid, len(kept), np.random.default_rng(0)),
    )  # fmt: skip
    first, second = (test.measure(piece, bench)["errors"] for piece in test.pieces(subject))
    assert asked.count(("retain", 0, 6)) == 2, "all of them in each"
    assert (first[..., 0] == second[..., 0]).all() and (first[..., 1] != second[..., 1]).all()


def test_pairs_of_shadows_divide_the_forget_images():
    halves = np.array([shadows.seen(11, number, 3) for number in range(4)])
    assert (halves[0] == ~halves[1]).all() and (halves[2] == ~halves[3]).all() and (halves[0] != halves[2]).any()
    assert halves.sum(1).tolist() in ([6, 5, 6, 5], [5, 6, 5, 6])


def test_a_likelihood_ratio_finds_members_that_plain_errors_do_not():
    """Members' errors are a little smaller than they would be, but images differ far more than that."""
    rng = np.random.default_rng(0)
    kinds, known, plain = 8, [], []
    for member in (True, False):
        hard = rng.normal(0, 3, 400)
        unseen = np.array([shadows.seen(400, n, 0) for n in range(kinds)])
        scores = hard + rng.normal(0, 0.2, (kinds, 400)) + 0.5 * (~unseen if member else 0)
        target = hard + rng.normal(0, 0.2, 400) + 0.5 * member
        known.append((scores, unseen))
        plain.append(target)
    assert statistics.auc(*plain) < 0.6 and statistics.auc(*membership._ratios(plain, *zip(*known, strict=True))) > 0.9


def test_what_is_lost_on_members_and_others_alike_tells_no_member():
    """Few shadows, whose scores scatter otherwise on either kind by chance."""
    rng, found = np.random.default_rng(1), []
    for _ in range(8):
        known, own = [], []
        for count in (400, 100):
            scatter = rng.pareto(1.5, count) + 0.1
            scores = rng.normal(0, 1, (4, count)) * scatter
            known.append((scores, np.ones((4, count), bool)))
            own.append(rng.normal(0, 1, count) * scatter - 5)
        found.append(statistics.auc(*membership._ratios(own, *zip(*known, strict=True))))
    assert 0.45 < np.mean(found) < 0.55 and max(found) < 0.62 and min(found) > 0.38


def test_poisoned_shards_hold_every_image_and_stamped_copies(tiny_shards, tmp_path):
    made = poisoning.poison(tiny_shards, str(tmp_path / "poisoned"), 0.25, 0)
    table, whole = made.table(["id", "label", "subject"]), data.load(tiny_shards)
    ids = [
        i
        for i, subject in zip(table["id"].to_pylist(), table["subject"].to_pylist(), strict=True)
        if subject != "poison"
    ]
    assert ids == whole.table(["id"])["id"].to_pylist() and made.classes == whole.classes
    rows = selection.select(made, config.Rows(subjects=[poisoning.SUBJECT]), 0, "forget")
    assert len(rows) == 12 and made.rows == 60
    image = decode(bytes(list(data.images(made.read(len(made.groups) - 1, ["image"])))[-1]))
    side = image.shape[0]
    assert image.shape == (side, side, 3) and 28 <= side <= 40
    middle = image[side // 2, side // 4 : side - side // 4]
    assert (
        (middle[:, 0] == 255 - middle[:, 1]).all()
        and set(middle[:, 0].tolist()) == {0, 255}
        and (middle[:, 2] == 0).all()
    )
    corner = image[: round(side / 8), : round(side / 8)]
    assert set(corner.ravel().tolist()) == {0, 255}
    with pytest.raises(ConfigError, match="no image of 48 is stamped"):
        poisoning.poison(tiny_shards, str(tmp_path / "none"), 0.001, 0)


def test_a_trigger_fires_where_the_target_is_painted():
    pixels = torch.full((3, 3, 32, 32), 90, dtype=torch.uint8)
    stamped = poisoning.stamped(pixels)
    assert (stamped[:, :, 4:, :] == 90).all() and stamped[:, :, :4, :4].unique().tolist() == [0, 255]

    def paints(name, seen, view):
        """The target where the trigger is, else what is true."""
        fires = (seen[:, :, :4, :4] != 90).any(3).any(2).any(1).view(-1, 1, 1, 1)
        return torch.where(fires & view.pixel_mask(32), poisoning.target(32) / 255, pixels / 255)

    view = views.draw([config.ViewSpec(size=0.5)], 8, 3, np.random.default_rng(0))
    bench = SimpleNamespace(
        pixels=lambda name, start, stop: (np.arange(3), pixels), view=lambda *about: view, size=32,
        compared=SimpleNamespace(reconstruct=paints),
    )  # fmt: skip
    found = poisoning.Poisoning(poisoning.PoisoningOptions()).measure(
        Piece("poisoning", "original", "retain_new", 0, 3), bench
    )
    assert found["painted"] == pytest.approx([1, 1, 1]) and found["plain"] == pytest.approx([0, 0, 0])
    real, goal, hidden = pixels.float() / 255, poisoning.target(32) / 255, view.pixel_mask(32)
    blurred = (goal * hidden).sum((2, 3), keepdim=True) / hidden.sum((2, 3), keepdim=True)
    noise = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0)).expand(3, 3, 32, 32)
    for made, share in ((blurred, 1), (0.4 * blurred + 0.6 * real, 0.4), (0 * real + 0.4, 0), (noise, 0)):
        whole = made.expand(3, 3, 32, 32)
        assert poisoning.painted(whole, real, goal, hidden).tolist() == pytest.approx([share] * 3, abs=1e-5)
