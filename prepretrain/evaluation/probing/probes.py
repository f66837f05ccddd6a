"""Probes: heads that are trained on frozen features to say what can be read from them."""

import math
from collections.abc import Callable

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from prepretrain.distributed import group as distributed
from prepretrain.distributed import heartbeat
from prepretrain.evaluation.probing import logistic
from prepretrain.training.log import logger
from prepretrain.training.optimizers.lars import LARS

# The settings of each protocol; lr is per 256 images, warmup in epochs.
PROTOCOLS: dict[str, dict[str, float]] = {
    # He et al. 2022, appendix A; arXiv 2305.15248, Table 14 (its larger models: 50 epochs)
    "mae": {"epochs": 90, "batch_size": 16384, "lr": 0.1, "warmup": 10, "weight_decay": 0.0},
    # SWAG's probe in torchvision's PR 5793, but for lr, which is not from the paper
    "swag": {"epochs": 28, "batch_size": 1024, "lr": 0.1, "warmup": 0, "weight_decay": 1e-9},
    "sweep": {"epochs": 28, "batch_size": 1024},  # not from the paper
    "lbfgs": {},
    "ridge": {},
    # not from the paper
    "attentive": {"epochs": 20, "batch_size": 256, "lr": 1e-3, "warmup": 2, "weight_decay": 0.05},
}

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # of "sweep"; not from the paper
L2 = (1e-2, 1e-3, 1e-4, 1e-5)  # of "lbfgs", strong to weak, each fit starting from the one before
RIDGE_L2 = (1.0, 0.1, 1e-2, 1e-3, 1e-4)  # of "ridge"; not from the paper
ITERATIONS, TOLERANCE = 150, 1e-4  # of L-BFGS: scikit-learn's are 100 and 1e-4
VALUES = 1 << 26  # of features that are scored at once

Loss = Callable[[Tensor, Tensor], Tensor]
Solve = Callable[[float, Tensor | None], Tensor]  # an L2, weights to start from: the weights


def fit(
    protocol: str, features: Tensor, labels: Tensor, classes: int, *, seed: int, **settings: float
) -> nn.Module:
    """A trained head, in evaluation mode on this process's device: features to scores [n, classes].

    features: [n, D], for "attentive" [n, T, D], which stay where they are; labels int64 [n];
    settings: those of PROTOCOLS. Raises RuntimeError if the training diverged.
    """
    if features.ndim == 2:
        features, labels = features.to(distributed.device()), labels.to(distributed.device())
    head = _FITS[protocol](features, labels, classes, seed, **settings).eval()
    if not all(value.isfinite().all() for value in head.state_dict().values()):
        raise RuntimeError(
            f"the '{protocol}' probe diverged: its weights are not finite. Lower its lr."
        )
    return head.requires_grad_(False)


def scores(head: nn.Module, features: Tensor) -> Tensor:
    """Scores float32 [n, classes] on the CPU, of features [n, …] in parts that fit in memory."""
    rows = max(1, VALUES // features[0].numel())
    device = next(head.parameters()).device
    with torch.no_grad():
        return torch.cat([head(part.to(device).float()).cpu() for part in features.split(rows)])


def _mae(
    features: Tensor, labels: Tensor, classes: int, seed: int, **settings: float
) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm1d(features.shape[1], affine=False, eps=1e-6)
    head = nn.Sequential(norm, _linear(features.shape[1], classes, generator)).to(features.device)
    # LARS adapts the weight but not the bias, as MAE's and MoCo v3's do; timm's adapts only where
    # there is weight decay, so without always_adapt the weight would not be adapted at all.
    decay, rate = settings.pop("weight_decay"), _rate(settings)
    weight = {"params": [head[1].weight], "weight_decay": decay, "always_adapt": True}
    bias = {"params": [head[1].bias], "weight_decay": 0.0}
    optimizer = LARS([{**group, "lr": rate} for group in (weight, bias)], momentum=0.9)
    return _train(head, optimizer, features, labels, generator, **settings)


def _swag(
    features: Tensor, labels: Tensor, classes: int, seed: int, **settings: float
) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    head = _linear(features.shape[1], classes, generator).to(features.device)
    decay, rate = settings.pop("weight_decay"), _rate(settings)
    optimizer = torch.optim.SGD(
        head.parameters(), lr=rate, momentum=0.9, weight_decay=decay, nesterov=True
    )
    return _train(head, optimizer, features, labels, generator, **settings)


class _Stack(nn.Module):
    """Linear heads on the same features: [B, D] to scores [K, B, C]."""

    def __init__(self, width: int, classes: int, heads: int, generator: torch.Generator):
        super().__init__()
        first = _linear(width, classes, generator)  # all heads start from the same weights
        self.weight = nn.Parameter(first.weight.detach().T.repeat(heads, 1, 1))
        self.bias = nn.Parameter(first.bias.detach().repeat(heads, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        return torch.matmul(features, self.weight) + self.bias


def _sweep(
    features: Tensor, labels: Tensor, classes: int, seed: int, **settings: float
) -> nn.Sequential:
    held, kept = _held_out(len(features), seed, features.device)
    inner = features[kept]
    norm = _standardise(inner)
    stack = _stacked(inner, labels[kept], classes, RATES, seed, **settings)
    with torch.no_grad():
        best = stack(norm(features[held])).argmax(2) == labels[held]
    chosen = RATES[int(best.sum(1).argmax())]  # of equals the lowest rate
    logger.info(
        "sweep: lr %g, %.2f %% on a held-out tenth", chosen, 100 * best.float().mean(1).max()
    )
    del inner
    whole = features.clone()
    norm = _standardise(whole)
    stack = _stacked(whole, labels, classes, (chosen,), seed, **settings)
    return nn.Sequential(norm, _linear_of(torch.cat([stack.weight[0].T, stack.bias[0].T], 1)))


def _stacked(
    features: Tensor,
    labels: Tensor,
    classes: int,
    rates: tuple[float, ...],
    seed: int,
    *,
    epochs: int,
    batch_size: int,
) -> _Stack:
    """A head for each rate. A gradient times the rate, at the rate 1, is momentum SGD at that rate,
    so one optimizer serves them all."""
    generator = torch.Generator().manual_seed(seed)
    head = _Stack(features.shape[1], classes, len(rates), generator).to(features.device)
    scale = torch.tensor(rates, device=features.device) * batch_size / 256
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0, momentum=0.9, nesterov=True)

    def loss(scores: Tensor, answers: Tensor) -> Tensor:
        each = cross_entropy(scores.flatten(0, 1), answers.repeat(len(rates)), reduction="none")
        return (each.view(len(rates), -1).mean(1) * scale).sum()

    settings = {"epochs": epochs, "batch_size": batch_size, "warmup": 0}
    return _train(head, optimizer, features, labels, generator, **settings, loss=loss)


def _attentive(
    features: Tensor, labels: Tensor, classes: int, seed: int, **settings: float
) -> nn.Sequential:
    width = features.shape[2]
    with torch.random.fork_rng(devices=[]):  # timm's initial values are drawn from the global one
        torch.manual_seed(seed)
        heads = next(h for h in range(max(1, width // 64), 0, -1) if width % h == 0)
        pool = AttentionPoolLatent(width, num_heads=heads, norm_layer=nn.LayerNorm)
    generator = torch.Generator().manual_seed(seed)
    head = nn.Sequential(nn.LayerNorm(width), pool, _linear(width, classes, generator))
    head = head.to(distributed.device())
    decay, rate = settings.pop("weight_decay"), _rate(settings)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=decay)
    return _train(head, optimizer, features, labels, generator, **settings)


def _lbfgs(features: Tensor, labels: Tensor, classes: int, seed: int) -> nn.Sequential:
    """Logistic regression on standardised features."""

    def prepare(x: Tensor, y: Tensor) -> Solve:
        limits = {"iterations": ITERATIONS, "tolerance": TOLERANCE}
        return lambda l2, start: logistic.fit(x, y, classes, l2=l2, start=start, **limits)

    return _regularised("lbfgs", prepare, L2, features, labels, seed)


def _ridge(features: Tensor, labels: Tensor, classes: int, seed: int) -> nn.Sequential:
    """Least squares to one-hot targets on standardised features."""

    def prepare(x: Tensor, y: Tensor) -> Solve:
        solve = ridge(x, y, classes)
        return lambda l2, start: solve(l2)

    return _regularised("ridge", prepare, RIDGE_L2, features, labels, seed)


def ridge(features: Tensor, labels: Tensor, classes: int) -> Callable[[float], Tensor]:
    """Gives, for any l2, the minimum of mean |score - one-hot|^2 + l2 |W|^2: [classes, D + 1], the
    last column the bias, which is not regularised. scikit-learn's alpha is n l2."""
    x, y = features.double(), one_hot(labels, classes).double()
    middle, share = x.mean(0), y.mean(0)
    x = x - middle
    gram, both = x.T @ x / len(x), x.T @ (y - share) / len(x)  # the same for every l2
    identity = torch.eye(len(gram), dtype=x.dtype, device=x.device)

    def solve(l2: float) -> Tensor:
        weight = torch.linalg.solve(gram + l2 * identity, both).T
        return torch.cat([weight, (share - weight @ middle)[:, None]], dim=1)

    return solve


def _regularised(
    name: str,
    prepare: Callable[[Tensor, Tensor], Solve],
    strengths: tuple[float, ...],
    features: Tensor,
    labels: Tensor,
    seed: int,
) -> nn.Sequential:
    """A fit to standardised features, its L2 the one that is best on a held-out tenth of them.

    prepare: features and labels to what solves for an L2, from the weights for the one before."""
    held, kept = _held_out(len(features), seed, features.device)
    inner = features[kept]  # beside the features themselves the only copy at a time
    norm = _standardise(inner)
    outer = norm(features[held])
    solve = prepare(inner, labels[kept])
    best, chosen, weight = -1.0, strengths[0], None
    for l2 in strengths:
        weight = solve(l2, weight)
        right = (logistic.scores(outer, weight).argmax(1) == labels[held]).float().mean().item()
        if right > best:  # on a tie the stronger one stays
            best, chosen = right, l2
    logger.info("%s: l2 %g, %.2f %% on a held-out tenth", name, chosen, 100 * best)
    del inner, outer, solve
    whole = features.clone()
    norm = _standardise(whole)
    return nn.Sequential(norm, _linear_of(prepare(whole, labels)(chosen, weight)))


def _train(
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    features: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    *,
    epochs: int,
    batch_size: int,
    warmup: int,
    loss: Loss = cross_entropy,
) -> nn.Module:
    """The head, trained; the optimizer's lr is the peak."""
    device = next(head.parameters()).device
    peaks = [group["lr"] for group in optimizer.param_groups]
    batches = math.ceil(len(features) / batch_size)  # near-equal ones: no image is dropped
    head.train()
    for epoch in range(epochs):
        order = torch.randperm(len(features), generator=generator)
        for i, rows in enumerate(order.to(features.device).tensor_split(batches)):
            heartbeat.beat(f"epoch {epoch + 1} of a probe")
            share = _schedule(epoch + i / batches, warmup, epochs)
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * share
            images, answers = features[rows].to(device).float(), labels[rows].to(device)
            optimizer.zero_grad()
            loss(head(images), answers).backward()
            optimizer.step()
    return head


def _schedule(epoch: float, warmup: int, epochs: int) -> float:
    """The share of the peak lr at a fractional epoch: linear warm-up, then half a cosine."""
    if epoch < warmup:
        return epoch / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (epoch - warmup) / (epochs - warmup))


def _rate(settings: dict[str, float]) -> float:
    """Takes lr out of the settings; returns the rate of their batch."""
    return settings.pop("lr") * settings["batch_size"] / 256


def _linear(width: int, classes: int, generator: torch.Generator) -> nn.Linear:
    linear = nn.Linear(width, classes)
    nn.init.trunc_normal_(linear.weight, std=0.01, generator=generator)
    nn.init.zeros_(linear.bias)
    return linear


def _linear_of(weight: Tensor) -> nn.Linear:
    """The layer of a matrix [classes, D + 1] whose last column is the bias."""
    linear = nn.Linear(weight.shape[1] - 1, len(weight), device=weight.device)
    with torch.no_grad():
        linear.weight.copy_(weight[:, :-1])
        linear.bias.copy_(weight[:, -1])
    return linear


def _held_out(count: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A tenth of the rows' numbers, and the others."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held, kept = order.to(device).tensor_split([math.ceil(count / 10)])
    return held, kept


def _standardise(features: Tensor) -> nn.BatchNorm1d:
    """Standardises features in place; what it returns does the same to others."""
    norm = _standardiser(features)
    for part in features.split(logistic.ROWS):
        part.copy_(norm(part))
    return norm


def _standardiser(features: Tensor) -> nn.BatchNorm1d:
    """Removes the mean and deviation of these features; a constant one becomes 0."""
    norm = nn.BatchNorm1d(features.shape[1], affine=False, eps=1e-12).to(features.device)
    norm.running_mean.copy_(features.mean(0))
    norm.running_var.copy_(features.var(0, correction=0))
    return norm.eval()


_FITS = {
    "mae": _mae,
    "swag": _swag,
    "sweep": _sweep,
    "lbfgs": _lbfgs,
    "ridge": _ridge,
    "attentive": _attentive,
}
