"""Multinomial logistic regression with L2: the convex probe of the evaluators, on any device."""

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from prepretrain.distributed import heartbeat
from prepretrain.training.log import logger

ROWS = 65536  # of logits at once: 1.3 million images of 1,000 classes would need 10 GB otherwise


def fit(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    l2: float,
    intercept: bool = True,
    start: Tensor | None = None,
    iterations: int = 1000,
    tolerance: float = 1e-5,
) -> Tensor:
    """The minimum of mean cross-entropy + l2/2 |W|^2 by L-BFGS: [classes, D + 1], the last column
    the bias.

    Full batches, so the answer does not depend on an order or a seed; in the features' own
    precision (float32 is for large sets, whose tolerance is then 1e-4 or so). The bias is not
    regularised; without `intercept` it is 0. scikit-learn's C is 1 / (n l2), and its tolerance, on
    the largest entry of the gradient of the same mean loss, is 1e-4.
    """
    x, shape = features, (classes, features.shape[1] + 1)
    first = torch.zeros(shape, dtype=torch.float64) if start is None else start.double().cpu()
    loss = _loss(x, labels.to(x.device), shape, l2, intercept)
    found = minimize(
        loss,
        first.flatten().numpy(),
        jac=True,
        method="L-BFGS-B",
        options={
            "maxiter": iterations,
            "maxfun": 2 * iterations,
            "gtol": tolerance,
            "ftol": 64 * np.finfo(float).eps,
        },
    )
    if found.nit >= iterations:
        logger.debug(
            "logistic regression with l2 = %g stopped after %d iterations, gradient %.1e",
            l2,
            found.nit,
            abs(found.jac).max(),
        )
    return torch.from_numpy(found.x).view(shape).to(features.device)


def scores(features: Tensor, weight: Tensor) -> Tensor:
    """Scores [n, classes] of features [n, D] under what `fit` returned."""
    weight = weight.to(features)
    return torch.cat(
        [part @ weight[:, :-1].T + weight[:, -1] for part in features.split(ROWS)]
    ).float()


def _loss(
    x: Tensor, labels: Tensor, shape: tuple[int, int], l2: float, intercept: bool
) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        heartbeat.beat("a step of a logistic regression")
        weight = torch.from_numpy(flat).view(shape).to(x)
        total, gradient = x.new_zeros((), dtype=torch.float64), torch.zeros_like(weight)
        for rows, answers in zip(x.split(ROWS), labels.split(ROWS)):
            log_p = torch.log_softmax(rows @ weight[:, :-1].T + weight[:, -1], dim=1)
            total -= log_p.gather(1, answers[:, None]).sum()
            error = log_p.exp_()
            error.scatter_add_(1, answers[:, None], -torch.ones_like(error[:, :1]))
            gradient[:, :-1] += error.T @ rows
            if intercept:
                gradient[:, -1] += error.sum(0)
        linear = weight[:, :-1]
        gradient /= len(x)
        gradient[:, :-1] += l2 * linear
        value = total / len(x) + l2 / 2 * linear.square().sum()
        return value.item(), gradient.flatten().double().cpu().numpy()

    return value_and_gradient
