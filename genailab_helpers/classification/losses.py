"""Losses for grades: what a network is trained with, and how its outputs are read again.

Each loss is one object with its own head, probabilities and decoder, so that two of them can be compared by
swapping the object and nothing else. K grades are numbered 0 to K - 1; "y > k" is asked at the K - 1
thresholds k = 0 to K - 2. `CrossEntropy` knows nothing of order and serves plain classes too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GradeLoss:
    """What all losses have in common.

    Parameters
    ----------
    num_classes : int
        How many grades K there are, at least 2.

    Attributes
    ----------
    num_classes : int
        K.
    n_outputs : int
        Logits that the network gives for an image: K, or K - 1 where each stands for a threshold.
    per_threshold : bool
        Whether each logit stands for a threshold.
    proper : bool
        Whether the loss is a strictly proper score of softmax(z), so that it estimates the probability of
        each grade; see `logit_shift`.

    Raises
    ------
    ValueError
        If `num_classes` is below 2.
    """

    proper = per_threshold = False

    def __init__(self, num_classes: int) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes: expected 2 grades or more, got {num_classes}")
        self.num_classes, self.n_outputs = num_classes, num_classes - self.per_threshold

    def head(self, n_features: int) -> nn.Module:
        """Return a new last layer, from features (N, n_features) to logits (N, n_outputs)."""
        return nn.Linear(n_features, self.n_outputs)

    def __call__(self, logits: Tensor, grades: Tensor) -> Tensor:
        """Return the mean loss of a batch.

        Parameters
        ----------
        logits : torch.Tensor
            (N, n_outputs), floating point, as the head gives them.
        grades : torch.Tensor
            (N,) integers, 0 to K - 1.

        Returns
        -------
        torch.Tensor
            One number, in the dtype of `logits`, with gradient.

        Raises
        ------
        ValueError
            If shapes or dtypes are not these, the batch is empty or a grade is out of range.
        """
        self._checked(logits)
        if grades.is_floating_point() or grades.shape != logits.shape[:1] or not (
                0 <= grades.min() <= grades.max() < self.num_classes):
            raise ValueError(f"grades: expected integers from 0 to {self.num_classes - 1}, one per row of "
                             f"logits, got {grades.tolist()!s:.60} for {len(logits)}")
        return self._loss(logits, grades.long())

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probability of each grade, (N, K), rows summing to 1, for logits (N, n_outputs)."""
        return self._checked(logits).softmax(1)

    def decode(self, logits: Tensor) -> Tensor:
        """Return the predicted grades, (N,) int64, for logits (N, n_outputs)."""
        return self._checked(logits).argmax(1)

    def logit_shift(self, counts: Tensor) -> list[float]:
        """Return what to add to logits that were trained on equally many images of each class.

        Parameters
        ----------
        counts : torch.Tensor
            (K,) images of each class in the training set, all above 0.

        Returns
        -------
        list of float
            K numbers, all 0 where classes are balanced; [0.0] for a loss that is not `proper`.

        Notes
        -----
        By Bayes, p(y | x) is p_equal(y | x) times the share n_y / N over the 1 / K of equal draws, so its
        logits are z_y + log(K n_y / N) (Saerens, Latinne and Decaestecker, Adjusting the outputs of a
        classifier to new a priori probabilities, 2002). That needs a softmax which estimates p_equal. The
        softmax of SORD estimates softened labels, that of the QWK loss nothing; each logit of CORAL and CORN
        parts two mixtures of grades, whose composition the draws changed, too, and no shift undoes that.
        """
        return (self.num_classes * counts / counts.sum()).log().tolist() if self.proper else [0.0]

    def _checked(self, logits: Tensor) -> Tensor:
        if logits.shape[1:] != (self.n_outputs,):
            raise ValueError(f"logits: {type(self).__name__} for {self.num_classes} grades expects (N, "
                             f"{self.n_outputs}), got {tuple(logits.shape)}: end the network in .head()")
        return logits

    def _loss(self, logits: Tensor, grades: Tensor) -> Tensor:
        raise NotImplementedError


class CrossEntropy(GradeLoss):
    """Cross-entropy, for which every mistake is as bad as every other.

    Notes
    -----
    L = -log softmax(z)_y. Decoder: the most probable grade.
    """

    proper = True

    def _loss(self, logits: Tensor, grades: Tensor) -> Tensor:
        return F.cross_entropy(logits, grades)


class SoftLabels(GradeLoss):
    """Cross-entropy against targets that leave some weight on the neighbours of the grade (SORD).

    Notes
    -----
    `L = -sum_k t_k log softmax(z)_k` with `t_k = exp(-alpha |k - y|) / sum_j exp(-alpha |j - y|)`
    (Diaz and Marathe, Soft Labels for Ordinal Regression, CVPR 2019). Decoder: the most probable grade. The
    targets are softer than the truth, so the probabilities need temperature scaling.
    """

    alpha = 2.0  # how fast the targets fall: of five grades the middle one keeps .76, each neighbour gets .10

    def _loss(self, logits: Tensor, grades: Tensor) -> Tensor:
        distance = (torch.arange(self.num_classes).to(logits) - grades[:, None]).abs()
        return F.cross_entropy(logits, (-self.alpha * distance).softmax(1))


class SquaredEMD(GradeLoss):
    """Squared earth mover's distance: how far, in grades, probability lies from the truth.

    Notes
    -----
    L = sum_k (P(y <= k) - [y <= k])^2, the ranked probability score (Hou, Yu and Samaras, Squared Earth
    Mover's Distance-based Loss, 2016; Epstein 1969). Decoder: the most probable grade.
    """

    proper = True

    def _loss(self, logits: Tensor, grades: Tensor) -> Tensor:
        below = (grades[:, None] <= torch.arange(self.num_classes).to(logits)).to(logits)
        return (logits.softmax(1).cumsum(1) - below).square().sum(1).mean()


class QWKLoss(GradeLoss):
    """One minus the quadratic weighted kappa of the probabilities, over the batch.

    It judges the batch as a whole: give it batches in which several grades occur. It may leave a grade unused
    where kappa hardly minds, and its probabilities are not meant to be calibrated.

    Notes
    -----
    L = sum_ij w_ij O_ij / sum_ij w_ij E_ij with w_ij = (i - j)^2, O_ij = sum_n P_n(i) [y_n = j] and
    E_ij = sum_n P_n(i) sum_n [y_n = j] / N, in [0, 2] (de la Torre, Puig and Valls, Weighted kappa loss
    function for multi-class classification of ordinal data in deep learning, 2018, without the logarithm, as
    Vargas, Gutierrez and Hervas-Martinez 2020). Decoder: the most probable grade.
    """

    def _loss(self, logits: Tensor, grades: Tensor) -> Tensor:
        steps = torch.arange(self.num_classes).to(logits)
        weights = (steps[:, None] - steps).square()
        predicted, truth = logits.softmax(1), F.one_hot(grades, self.num_classes).to(logits)
        observed = (weights * (predicted.T @ truth)).sum()
        expected = (weights * torch.outer(predicted.sum(0), truth.mean(0))).sum()
        return observed / (expected + 1e-10)


class Coral(GradeLoss):
    """CORAL: one score for the severity and K - 1 thresholds, each a yes-or-no question.

    Notes
    -----
    L = -sum_k [y > k] log s(z_k) + [y <= k] log(1 - s(z_k)), s the logistic function, with z_k = w x + b_k
    from a head that shares w (Cao, Mirjalili and Raschka, Rank consistent ordinal regression, Pattern
    Recognition Letters 2020). Decoder: the number of thresholds with s(z_k) > 1/2. The biases descend at the
    optimum, not on the way there; the probabilities therefore take the logits in descending order (monotone
    rearrangement, Chernozhukov, Fernandez-Val and Galichon 2010), which the decoder does not notice.
    """

    per_threshold = True

    def head(self, n_features: int) -> nn.Module:
        """Return a new `CoralHead`, from features (N, n_features) to logits (N, K - 1)."""
        return CoralHead(n_features, self.num_classes)

    def _loss(self, logits: Tensor, grades: Tensor) -> Tensor:
        above = (grades[:, None] > torch.arange(self.n_outputs).to(logits)).to(logits)
        return F.binary_cross_entropy_with_logits(logits, above, reduction="none").sum(1).mean()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probability of each grade, (N, K), for logits (N, K - 1)."""
        above = self._checked(logits).sort(1, descending=True).values
        high = F.pad(above, (1, 0), value=torch.inf)
        low = F.pad(above, (0, 1), value=-torch.inf)
        # s(high) - s(low), written so that nothing cancels where both are near 1
        return high.sigmoid() * (-low).sigmoid() * -torch.expm1(low - high)

    def decode(self, logits: Tensor) -> Tensor:
        """Return the predicted grades, (N,) int64, for logits (N, K - 1)."""
        return (self._checked(logits) > 0).sum(1)


class CoralHead(nn.Module):
    """Last layer for CORAL: weights that all thresholds share, and a bias for each.

    Parameters
    ----------
    n_features : int
        Length of the feature vectors.
    num_classes : int
        How many grades K there are.

    Notes
    -----
    The biases start where all grades are equally probable: b_k = logit((K - 1 - k) / K).
    """

    def __init__(self, n_features: int, num_classes: int) -> None:
        super().__init__()
        self.score = nn.Linear(n_features, 1, bias=False)
        self.biases = nn.Parameter((torch.arange(num_classes - 1, 0, -1) / num_classes).logit())

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (N, K - 1) for features (N, n_features)."""
        return self.score(features) + self.biases


class Corn(GradeLoss):
    """CORN: at each threshold, is the grade higher still, given that it came so far?

    Notes
    -----
    L = -sum_k sum_{n: y_n >= k} [y_n > k] log s(z_nk) + [y_n = k] log(1 - s(z_nk)), divided by the number of
    all terms, sum_k #{n: y_n >= k}: equation 5 of Shi, Cao and Raschka (Deep neural networks for rank-
    consistent ordinal regression based on conditional probabilities, 2023). Code that divides by N or by
    K - 1 differs by a factor that changes from batch to batch. P(y > k) = prod_{j <= k} s(z_j).
    Decoder: the number of thresholds with P(y > k) > 1/2.
    """

    per_threshold = True

    def _loss(self, logits: Tensor, grades: Tensor) -> Tensor:
        steps = torch.arange(self.n_outputs).to(logits)
        asked, above = grades[:, None] >= steps, (grades[:, None] > steps).to(logits)
        return F.binary_cross_entropy_with_logits(logits[asked], above[asked])

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probability of each grade, (N, K), for logits (N, K - 1)."""
        logits = self._checked(logits)
        came_so_far = F.pad(F.logsigmoid(logits).cumsum(1), (1, 0))
        return (came_so_far + F.pad(F.logsigmoid(-logits), (0, 1))).exp()

    def decode(self, logits: Tensor) -> Tensor:
        """Return the predicted grades, (N,) int64, for logits (N, K - 1)."""
        return (self._checked(logits).sigmoid().cumprod(1) > 0.5).sum(1)


LOSSES: dict[str, type[GradeLoss]] = {
    "cross_entropy": CrossEntropy, "soft_labels": SoftLabels, "squared_emd": SquaredEMD, "qwk": QWKLoss,
    "coral": Coral, "corn": Corn,
}
