"""Each loss equals its reference, reads its own outputs consistently, and survives extreme logits."""

import math

import coral_pytorch.dataset
import coral_pytorch.layers
import coral_pytorch.losses
import dlordinal.losses
import pytest
import torch
from sklearn.metrics import cohen_kappa_score, log_loss
from torch import nn

from genailab_helpers.classification.losses import LOSSES, Coral, CoralHead, Corn, QWKLoss

K = 5


def batch(n=64, seed=0, spread=3.0, dtype=torch.float64, n_outputs=K):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(n, n_outputs, generator=generator, dtype=dtype)
    return logits, torch.randint(K, (n,), generator=generator)


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param](K)


def references(logits, grades):
    levels = coral_pytorch.dataset.levels_from_labelbatch(grades, K)
    p = logits.detach().double().softmax(1)
    return {
        "cross_entropy": torch.as_tensor(log_loss(grades, p, labels=range(K))),
        "soft_labels": dlordinal.losses.SORDLoss(2.0, K, grades)(logits, grades),
        "squared_emd": dlordinal.losses.EMDLoss(K)(logits, grades),
        "qwk": dlordinal.losses.WKLoss(K, use_logits=True)(logits, grades),
        "coral": coral_pytorch.losses.coral_loss(logits[:, 1:], levels),
        "corn": coral_pytorch.losses.corn_loss(logits[:, 1:], grades, K)}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", range(3))
def test_each_loss_and_its_gradient_equal_their_reference(name, seed):
    logits, grades = batch(seed=seed, dtype=torch.float32)
    grades[grades == 3] = 2  # a grade that the batch lacks
    theirs, ours = references(logits.requires_grad_(), grades)[name], LOSSES[name](K)
    got = ours(logits[:, K - ours.n_outputs:], grades)
    assert got.item() == pytest.approx(theirs.item(), rel=1e-6, abs=1e-6)
    if theirs.requires_grad:
        slopes = (torch.autograd.grad(loss, logits, retain_graph=True)[0].float() for loss in (got, theirs))
        torch.testing.assert_close(*slopes, atol=1e-6, rtol=1e-5)


def test_the_qwk_loss_of_certain_predictions_is_one_minus_kappa():
    _, grades = batch(200, seed=1)
    noise = torch.randint(0, 2, (200,), generator=torch.Generator().manual_seed(2))
    predicted = (grades + noise).clamp(max=K - 1)
    logits = 1e4 * nn.functional.one_hot(predicted, K).double()
    kappa = cohen_kappa_score(grades, predicted, weights="quadratic")
    assert QWKLoss(K)(logits, grades).item() == pytest.approx(1 - kappa, abs=1e-9)


def test_decoders_equal_their_references():
    logits, _ = batch(10_000, n_outputs=K - 1)
    assert (Corn(K).decode(logits) == coral_pytorch.dataset.corn_label_from_logits(logits)).all()
    assert (Coral(K).decode(logits) == coral_pytorch.dataset.proba_to_label(logits.sigmoid())).all()
    logits, _ = batch(100)
    for name in ("cross_entropy", "soft_labels", "squared_emd", "qwk"):
        assert (LOSSES[name](K).decode(logits) == logits.argmax(1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_are_rank_monotone_on_ten_thousand_random_logits(loss, dtype):
    logits, _ = batch(10_000, spread=8.0, dtype=dtype, n_outputs=loss.n_outputs)
    p = loss.probabilities(logits)
    assert p.shape == (10_000, K)
    assert p.dtype == dtype
    assert (p >= 0).all()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(p.sum(1), torch.ones(10_000, dtype=dtype), atol=16 * eps, rtol=0)
    above = 1 - p.cumsum(1)[:, :-1]  # P(y > k)
    assert (above.diff(dim=1) <= 0).all()
    if loss.n_outputs < K and dtype == torch.float64:  # these decode to the median
        assert (loss.decode(logits) == (above > 0.5).sum(1)).all()


def test_probabilities_by_hand():
    # K = 3 and logits log 3, 0: s(log 3) = 3/4, s(0) = 1/2
    logits = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    assert Coral(3).probabilities(logits)[0].tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 2])
    assert Coral(3).probabilities(logits.flip(1))[0].tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 2])
    assert Corn(3).probabilities(logits)[0].tolist() == pytest.approx([1 / 4, 3 / 8, 3 / 8])


def test_probabilities_of_coral_keep_their_digits_far_out():
    # both sigmoids are 1 in float32; s(20) - s(18) = e^-18 - e^-20 to first order
    p = Coral(3).probabilities(torch.tensor([[20.0, 18.0]]))
    assert p[0, 1].item() == pytest.approx(math.exp(-18) - math.exp(-20), rel=1e-5)


@pytest.mark.parametrize("grades", [[0, 1, 2, 3, 4, 4], [2] * 6, [0] * 6])
def test_extreme_logits_give_finite_losses_gradients_and_probabilities(loss, grades):
    signs = torch.tensor([[1, -1] * 2 + [1], [-1, 1] * 2 + [-1], [1] * 5, [-1] * 5,
                          [1] * 3 + [-1] * 2, [0] * 5])
    logits = (1e4 * signs[:, :loss.n_outputs]).float().requires_grad_()
    value = loss(logits, torch.tensor(grades))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()
    p = loss.probabilities(logits.detach())
    assert torch.isfinite(p).all()
    assert p.sum(1).tolist() == pytest.approx([1] * 6, abs=1e-6)


def test_the_coral_head_shares_its_weights_and_starts_with_even_grades():
    head = CoralHead(7, K)
    theirs = coral_pytorch.layers.CoralLayer(7, K)
    theirs.load_state_dict({"coral_weights.weight": head.score.weight, "coral_bias": head.biases})
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head(x), theirs(x))
    assert isinstance(Coral(K).head(7), CoralHead)
    logits = head(torch.zeros(1, 7))  # as they are: probabilities would read them in any order
    torch.testing.assert_close((1 - logits.sigmoid())[0], torch.arange(1, K) / K)


@pytest.mark.parametrize("grades", [
    torch.tensor([0, 5]), torch.tensor([-1, 2]), torch.tensor([0.0, 1.0]), torch.tensor([0, 1, 2]),
    torch.tensor([[0], [1]])], ids=str)
def test_wrong_grades_are_refused(loss, grades):
    with pytest.raises(ValueError, match=r"grades: expected integers from 0 to 4, .*, got .* for 2$"):
        loss(torch.zeros(2, loss.n_outputs), grades)


@pytest.mark.parametrize("name", LOSSES)
def test_logits_are_shifted_where_the_loss_estimates_probabilities(name):
    loss, counts = LOSSES[name](3), torch.tensor([6, 3, 1])
    if name not in ("cross_entropy", "squared_emd"):
        assert loss.logit_shift(counts) == [0.0]
        return
    p = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
    shifted = p.log() + torch.tensor(loss.logit_shift(counts))
    by_bayes = p * counts / (p * counts).sum()
    torch.testing.assert_close(loss.probabilities(shifted), by_bayes, atol=1e-7, rtol=1e-6)
    assert loss.logit_shift(torch.tensor([7, 7, 7])) == [0.0] * 3


def test_wrong_logits_are_refused(loss):
    grades = torch.tensor([0, 1])
    for logits in (torch.zeros(2, loss.n_outputs + 1), torch.zeros(2), torch.zeros(2, loss.n_outputs, 1)):
        for call in (lambda z: loss(z, grades), loss.probabilities, loss.decode):
            with pytest.raises(ValueError, match=rf"\(N, {loss.n_outputs}\)"):
                call(logits)
    with pytest.raises(ValueError, match="num_classes"):
        type(loss)(1)


def test_a_batch_of_one_grade_predicted_with_certainty_is_no_zero_by_zero():
    certain = torch.tensor([[1e4] + [-1e4] * (K - 1)] * 3)
    assert QWKLoss(K)(certain, torch.zeros(3, dtype=torch.int64)).item() == 0
